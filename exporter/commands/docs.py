"""``exporter docs``: the source tables in dbt docs."""

from __future__ import annotations

import os

import click

from exporter.commands import shared as cli


@click.command("docs", epilog=cli.examples("dbt docs generate && exporter docs && dbt docs serve"))
@cli.shared
def command(call: cli.Call) -> None:
    """Put the source tables into the lineage that dbt docs shows.

    Completes what `dbt docs generate` wrote; `dbt docs serve` then shows it.
    """
    from exporter.config import project
    from exporter.scaffold import lineage

    definitions = call.definitions((), destination=False)
    root = call.root()
    folder = os.environ.get("DBT_TARGET_PATH") or project.read(root / "dbt_project.yml").get(
        "target-path", "target"
    )
    cli.out(*lineage.complete(root / folder, definitions))
