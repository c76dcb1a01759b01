"""``exporter slots``: what change capture keeps at the source."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import click

from exporter.commands import shared as cli
from exporter.terminal import text


@click.group("slots", cls=cli.Group)
def command() -> None:
    """Show or drop the replication slots that change capture keeps at the source."""


@command.command(epilog=cli.examples("exporter slots show"))
@cli.as_json
@cli.shared
def show(call: cli.Call, as_json: bool) -> None:
    """Show the slots, how much WAL each holds back, and when it was read."""
    from exporter.monitoring import slots

    call.root(cli.CORE, cli.ANALYTICS)
    found = slots.current()
    if as_json:
        cli.out(*(json.dumps(one.as_dict(), default=datetime.isoformat) for one in found))
        return
    now = datetime.now(timezone.utc)
    rows = [
        (
            one.found.name,
            one.status,
            f"{(one.found.held or 0) / 1024**2:,.0f} MB",
            text.duration(max(0.0, (now - one.read_at).total_seconds())) + " ago"
            if one.read_at
            else "",
            ", ".join(one.tables),
        )
        for one in found
    ]
    head = ("SLOT", "STATUS", "HELD BACK", "READ", "TABLES")
    if rows:
        cli.out(*text.table(head, rows, right=("HELD BACK",), width=text.width()))
    else:
        call.console.say("no slot of the exporter at the source", "info")


@command.command(epilog=cli.examples("exporter slots drop exporter_analytics_0a1b2c3d"))
@click.argument("name", metavar="SLOT")
@cli.shared
def drop(call: cli.Call, name: str) -> None:
    """End a slot and its publication. A load that reads its tables again copies them first."""
    from exporter.monitoring import slots

    call.root(cli.CORE, cli.ANALYTICS)
    cli.out(slots.drop(name))
