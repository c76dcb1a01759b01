"""``exporter slots``: what change capture keeps at the sources."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from typing import TYPE_CHECKING

import click

from exporter.commands import shared as cli
from exporter.terminal import text

if TYPE_CHECKING:
    from exporter.monitoring.slots import Slot


@click.group("slots", cls=cli.Group)
def command() -> None:
    """Show or drop the replication slots that change capture keeps at the sources."""


@command.command(epilog=cli.examples("exporter slots show"))
@cli.as_json
@cli.shared
def show(call: cli.Call, as_json: bool) -> None:
    """Show the slots, how much WAL each holds back and has to read, and when it was read."""
    from exporter.monitoring import slots

    silent: list[str] = []
    found = slots.current(_sources(call), silent.append)
    if as_json:
        cli.out(*(json.dumps(one.as_dict(), default=datetime.isoformat) for one in found.slots))
    elif found.slots:
        head = ("SLOT", "DATABASE", "STATUS", "HELD BACK", "BEHIND", "READ", "TABLES")
        rows = [_cells(one) for one in found.slots]
        cli.out(*text.table(head, rows, right=("HELD BACK", "BEHIND"), width=text.width()))
    elif not silent:
        call.console.say("no slot of the exporter at the source", "info")
    for concern in found.concerns():
        call.console.say("\n  → ".join((concern.message, *concern.fix)), "warning", event="slot")
    for why in silent:
        call.console.say(why, "error", event="slot")
    sys.exit(1 if silent else 0)


def _cells(slot: Slot) -> tuple[str, ...]:
    from exporter.source import megabytes

    known = slot.known
    ago = known.seconds if known else None
    return (
        slot.found.name,
        slot.found.database or "",
        slot.status,
        "-" if slot.found.held is None else megabytes(slot.found.held),
        "-" if slot.behind is None else megabytes(slot.behind),
        "-" if ago is None else f"{text.duration(max(0.0, ago))} ago",
        ", ".join(slot.tables),
    )


@command.command(epilog=cli.examples("exporter slots drop exporter_analytics_0a1b2c3d"))
@click.argument("name", metavar="SLOT")
@cli.shared
def drop(call: cli.Call, name: str) -> None:
    """End a slot and its publication. A load that reads its tables again copies them first."""
    from exporter.monitoring import slots

    def say(why: str) -> None:
        call.console.say(why, "warning", event="slot")

    cli.out(slots.drop(name, _sources(call), say))


def _sources(call: cli.Call) -> dict[str, bool]:
    """Return the sources of the project, and the one that the environment names anyhow."""
    from exporter.config import environment, project
    from exporter.monitoring.slots import sources_of

    root = call.root(cli.ANALYTICS)
    found = sources_of(project.declared(root))
    if os.environ.get(cli.CORE) or not found:
        found.setdefault(cli.CORE, False)
    environment.require(root, *found)
    return found
