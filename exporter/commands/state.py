"""``exporter state``: the stored positions, seen and changed."""

from __future__ import annotations

import json
from typing import Any

import click

from exporter.commands import shared as cli


@click.group("state", cls=cli.Group)
def command() -> None:
    """Show, forget, set or bind anew the stored position of a definition."""


@command.command(epilog=cli.examples("exporter state show", "exporter state show StatEvent --json"))
@click.argument("keys", nargs=-1, metavar="[KEY]...", type=cli.KEY)
@cli.as_json
@cli.shared
def show(call: cli.Call, keys: tuple[str, ...], as_json: bool) -> None:
    """Print the stored positions. Without a KEY, of all definitions."""
    from exporter.commands import positions

    for stored in positions.show(call.definitions(keys, source=False)):
        _print(stored, as_json)


@command.command(epilog=cli.examples("exporter state reset StatEvent"))
@click.argument("key", metavar="KEY", type=cli.KEY)
@cli.as_json
@cli.shared
def reset(call: cli.Call, key: str, as_json: bool) -> None:
    """Forget the position: the next load reads everything, and rewrites only what differs."""
    from exporter.commands import positions

    _print(positions.reset(call.definition(key, source=False)), as_json)


@command.command(
    epilog=cli.examples("exporter state adopt StatEvent"),
)
@click.argument("key", metavar="KEY", type=cli.KEY)
@cli.as_json
@cli.shared
def adopt(call: cli.Call, key: str, as_json: bool) -> None:
    """Keep the position for a source or a raw table that was moved or made anew on purpose."""
    from exporter.commands import positions

    _print(positions.adopt(call.definition(key)), as_json)


@command.command(
    "set", epilog=cli.examples("exporter state set StatEvent '2026-01-31 12:00' evt_000000000042")
)
@click.argument("key", metavar="KEY", type=cli.KEY)
@click.argument("value", metavar="VALUE")
@click.argument("id", metavar="[ID]", required=False)
@cli.as_json
@cli.shared
def set_position(call: cli.Call, key: str, value: str, id: str | None, as_json: bool) -> None:
    """Continue after VALUE (and ID), as if that row of the source were the last one landed."""
    from exporter.commands import positions

    definition = call.definition(key)
    _print(positions.set_to(definition, value, id), as_json)


def _print(stored: dict[str, Any], as_json: bool) -> None:
    from exporter.commands import positions

    click.echo(json.dumps(stored) if as_json else positions.line(stored))
