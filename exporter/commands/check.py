"""``exporter check``: everything that a load needs, checked beforehand."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from exporter.commands import shared as cli
from exporter.terminal import text

if TYPE_CHECKING:
    from exporter.monitoring.finding import Finding


@click.command(
    "check",
    epilog=cli.examples(
        "exporter check",
        "exporter check StatEvent",
        "exporter check --grants > grants.sql",
    ),
)
@click.argument("keys", nargs=-1, metavar="[KEY]...", type=cli.KEY)
@click.option("--grants", is_flag=True, help="Print the least rights that are enough, as SQL.")
@cli.as_json
@cli.shared
def command(call: cli.Call, keys: tuple[str, ...], grants: bool, as_json: bool) -> None:
    """Check definitions, servers, rights, indexes and drift. Changes nothing.

    The exit status is 1 where a load would fail.
    """
    from exporter.monitoring import check

    if grants:
        cli.out(*check.least_grants(call.definitions(keys)))
        return
    failed = False
    for finding in check.findings(call.root(), keys):
        failed = failed or finding.status == "fail"
        cli.out(*([json.dumps(finding._asdict())] if as_json else _lines(finding)))
    sys.exit(1 if failed else 0)


def _lines(finding: Finding) -> list[str]:
    about = finding.subject
    if finding.check != finding.subject:
        about += f" {finding.check}"
    message = f"{about}: {finding.message}"
    first, *others = text.wrapped(message, (text.width() or 80) - 6, "", "  ")
    status = text.coloured(f"{finding.status:<4}", finding.status)
    fixes = [f"→ {fix}" for fix in finding.fix]
    return [f"{status}  {first}", *(f"      {line}" for line in (*others, *fixes))]
