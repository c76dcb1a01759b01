"""``exporter state``: the stored positions, seen and changed."""

from __future__ import annotations

import json
from typing import Any

import click

from exporter.commands.shared import ANALYTICS, CORE, KEY, Call, Group, as_json, examples, shared


@click.group("state", cls=Group)
def command() -> None:
    """Show, forget or set the stored position of a definition."""


@command.command(epilog=examples("exporter state show", "exporter state show StatEvent --json"))
@click.argument("keys", nargs=-1, metavar="[KEY]...", type=KEY)
@as_json
@shared
def show(call: Call, keys: tuple[str, ...], as_json: bool) -> None:
    """Print the stored positions. Without a KEY, of all definitions."""
    from exporter.commands import positions

    for stored in positions.show(call.definitions(keys, ANALYTICS)):
        _print(stored, as_json)


@command.command(epilog=examples("exporter state reset StatEvent"))
@click.argument("key", metavar="KEY", type=KEY)
@as_json
@shared
def reset(call: Call, key: str, as_json: bool) -> None:
    """Forget the position: the next load reads everything, and rewrites only what differs."""
    from exporter.commands import positions

    _print(positions.reset(call.definitions((key,), ANALYTICS)[0]), as_json)


@command.command(
    "set", epilog=examples("exporter state set StatEvent '2026-01-31 12:00' evt_000000000042")
)
@click.argument("key", metavar="KEY", type=KEY)
@click.argument("value", metavar="VALUE")
@click.argument("id", metavar="[ID]", required=False)
@as_json
@shared
def set_position(call: Call, key: str, value: str, id: str | None, as_json: bool) -> None:
    """Go on behind VALUE (and ID), as if that row of the source were the last one landed."""
    from exporter.commands import positions

    definition = call.definitions((key,), CORE, ANALYTICS)[0]
    _print(positions.set_to(definition, value, id), as_json)


def _print(stored: dict[str, Any], as_json: bool) -> None:
    from exporter.commands import positions

    click.echo(json.dumps(stored) if as_json else positions.line(stored))
