"""``exporter slots``: what change capture keeps at the source."""

from __future__ import annotations

import click

from exporter.commands import shared as cli
from exporter.errors import UsageError


@click.group("slots", cls=cli.Group, invoke_without_command=True)
@cli.shared
@click.pass_context
def command(context: click.Context, call: cli.Call) -> None:
    """Show the replication slots at the source, and the WAL that they hold back."""
    if context.invoked_subcommand is None:
        _show(call)
