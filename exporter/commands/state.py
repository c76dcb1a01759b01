"""``exporter state``: the stored positions, seen and changed."""

from __future__ import annotations

import json
from typing import Any

import click

from exporter.commands.shared import ANALYTICS, CORE, KEY, Call, Group, as_json, examples, shared


@click.group("state", cls=Group)
def command() -> None:
    """Show, forget, set or bind anew the stored position of a definition."""


@command.command(
    epilog=examples(
        "exporter state show",
        "exporter state show StatEvent --json",
    ),
)
@click.argument("keys", nargs=-1, metavar="[KEY]...", type=KEY)
@as_json
@shared
def show(call: Call, keys: tuple[str, ...], as_json: bool) -> None:
    """Print the stored positions. Without a KEY, of all definitions."""
    from exporter.commands import positions  # noqa: PLC0415  what --help does not need

    for one in positions.show(call.definitions(keys, ANALYTICS)):
        _print(one, as_json)


@command.command(
    epilog=examples(
        "exporter state reset StatEvent",
    ),
)
@click.argument("key", metavar="KEY", type=KEY)
@as_json
@shared
def reset(call: Call, key: str, as_json: bool) -> None:
    """Forget the position: the next load reads everything, and rewrites only what differs."""
    from exporter.commands import positions  # noqa: PLC0415

    _print(positions.reset(call.definitions((key,), ANALYTICS)[0]), as_json)


@command.command(
    epilog=examples(
        "exporter state adopt StatEvent",
    ),
)
@click.argument("key", metavar="KEY", type=KEY)
@as_json
@shared
def adopt(call: Call, key: str, as_json: bool) -> None:
    """Keep the position for a source or a raw table that was moved or made anew on purpose."""
    from exporter.commands import positions  # noqa: PLC0415

    _print(positions.adopt(call.definitions((key,), CORE, ANALYTICS)[0]), as_json)


@command.command(
    "set",
    epilog=examples(
        "exporter state set StatEvent '2026-01-31 12:00' evt_000000000042",
    ),
)
@click.argument("key", metavar="KEY", type=KEY)
@click.argument("value", metavar="VALUE")
@click.argument("id", metavar="[ID]", required=False)
@as_json
@shared
def set_position(call: Call, key: str, value: str, id: str | None, as_json: bool) -> None:
    """Go on behind VALUE (and ID), as if that row of the source were the last one landed."""
    from exporter.commands import positions  # noqa: PLC0415

    definition = call.definitions((key,), CORE, ANALYTICS)[0]
    _print(positions.set_to(definition, value, id), as_json)


def _print(told: dict[str, Any], as_json: bool) -> None:
    from exporter.commands import positions  # noqa: PLC0415

    click.echo(json.dumps(told) if as_json else positions.line(told))
