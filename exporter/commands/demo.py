"""``exporter demo``: the main job on an embedded server."""

from __future__ import annotations

import click

from exporter.commands import shared as cli


@click.command(
    "demo",
    epilog=cli.examples(
        "exporter demo", "exporter demo --changes", "exporter demo --rows 1000000 --keep"
    ),
)
@click.option(
    "--rows",
    type=click.IntRange(min=100),
    default=100_000,
    show_default=True,
    help="How many events, or entries of accounts, the source gets.",
)
@click.option("--changes", is_flag=True, help="Show change capture: two tables, a slot.")
@click.option("--keep", is_flag=True, help="Leave the server up until Ctrl-C, and print its URLs.")
def command(rows: int, changes: bool, keep: bool) -> None:
    """Run the main job on an embedded PostgreSQL server."""
    from exporter.demo import shipped

    if changes:
        from exporter.demo.changes import run
    else:
        from exporter.demo.demo import run
    run(shipped.project(), rows, keep)
