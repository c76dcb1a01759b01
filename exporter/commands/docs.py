"""``exporter docs``: the source tables in dbt docs."""

from __future__ import annotations

import os

import click

from exporter.commands.shared import CORE, Call, examples, out, shared


@click.command("docs", epilog=examples("dbt docs generate && exporter docs && dbt docs serve"))
@shared
def command(call: Call) -> None:
    """Put the source tables into the lineage that dbt docs shows.

    Completes what `dbt docs generate` wrote; `dbt docs serve` then shows it.
    """
    from exporter.config import project
    from exporter.scaffold import lineage

    definitions = call.definitions((), CORE)
    root = call.root()
    folder = os.environ.get("DBT_TARGET_PATH") or project.read(root / "dbt_project.yml").get(
        "target-path", "target"
    )
    out(*lineage.complete(root / folder, definitions))
