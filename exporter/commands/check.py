"""``exporter check``: everything that a load needs, looked at beforehand."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from exporter.commands.shared import ANALYTICS, CORE, KEY, Call, as_json, examples, out, shared
from exporter.terminal import text

if TYPE_CHECKING:
    from exporter.monitoring.check import Finding


@click.command(
    "check",
    epilog=examples(
        "exporter check",
        "exporter check StatEvent",
        "exporter check --grants > grants.sql",
    ),
)
@click.argument("keys", nargs=-1, metavar="[KEY]...", type=KEY)
@click.option("--grants", is_flag=True, help="Print the least rights that would do, as GRANTs.")
@as_json
@shared
def command(call: Call, keys: tuple[str, ...], grants: bool, as_json: bool) -> None:
    """Look at definitions, servers, rights, indexes and drift. Changes nothing.

    The exit status is 1 where a load would fail.
    """
    from exporter.monitoring import check  # noqa: PLC0415  what --help does not need

    if grants:
        for line in check.least_grants(call.definitions(keys, CORE, ANALYTICS)):
            out(line)
        return
    failed = False
    for one in check.look(call.root(), keys):
        failed = failed or one.status == "fail"
        if as_json:
            out(json.dumps(one.as_dict()))
            continue
        for line in _lines(one):
            out(line)
    sys.exit(1 if failed else 0)


def _lines(one: Finding) -> list[str]:
    said = f"{one.subject}: {one.message}"
    if one.check != one.subject:
        said = f"{one.subject} {one.check}: {one.message}"
    first, *rest = text.wrapped(said, (text.width() or 80) - 6, "", "  ")
    status = text.coloured(f"{one.status:<4}", one.status)
    fixes = [f"      → {fix}" for fix in one.fix]
    return [f"{status}  {first}", *(f"      {line}" for line in rest), *fixes]
