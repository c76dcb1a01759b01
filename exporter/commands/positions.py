"""``exporter state``: the stored positions, as a person sees and changes them."""

from __future__ import annotations

from typing import Any

from exporter import state
from exporter.config import Definition
from exporter.errors import UsageError
from exporter.source import find_table, window
from exporter.state import Bound, Position, State
from exporter.wire import Connection, connect


def show(definitions: list[Definition]) -> list[dict[str, Any]]:
    """Return what is stored of each definition. Reads the destination only."""
    with connect("DATABASE_URL_ANALYTICS") as destination:
        if not state.tables_exist(destination):
            return [_told(definition.key, State()) for definition in definitions]
        return [
            _told(definition.key, state.read(destination, definition.destination))
            for definition in definitions
        ]


def reset(definition: Definition) -> dict[str, Any]:
    """Forget the position. Raises UsageError where the next load would land rows twice."""
    if definition.destination.mode == "append":
        raise UsageError(
            f"{definition.key} is append-only: read from the start, its rows would be there twice",
            hint=f"exporter load {definition.key} --full-refresh starts over",
        )
    with connect("DATABASE_URL_ANALYTICS") as destination:
        stored = _locked(destination, definition)
        # The stamp stays: a later one that is lower would be passed over by the models.
        now = State(exported_at=stored.exported_at)
        state.write(destination, definition.destination, now)
    return _told(definition.key, now)


def set_to(definition: Definition, value: str, id: str | None) -> dict[str, Any]:
    """Store a position that a person gives, in PostgreSQL's own spelling of it.

    Raises UsageError for what is no position of this definition, and where an append-only log
    would take rows twice.
    """
    with (
        connect("DATABASE_URL_ANALYTICS") as destination,
        connect("DATABASE_URL_CORE") as source,
    ):
        stored = _locked(destination, definition)
        table = find_table(source, definition.source, destination)
        cursor, id_column = window.cursor_columns(definition.source, table)
        if id is not None and id_column is None:
            raise UsageError(
                f"{definition.where}: {definition.key} has no source.cursor.id_field",
                hint="leave out the ID",
            )
        value = window.typed(source, cursor, value, "VALUE")
        if id is not None and id_column is not None:
            id = window.typed(source, id_column, id, "ID")
        position = Position(value, id)
        if definition.destination.mode == "append" and stored.cursor:
            landed = Bound(stored.cursor.value, cursor.base)
            if not state.is_beyond(destination, position, landed):
                raise UsageError(
                    f"{definition.key} is append-only and has landed rows up to {stored.cursor}:"
                    " they would be there twice",
                    hint="set a later position",
                )
        # Without the transaction id of the last read, every row behind the position is read.
        now = State(position, position, horizon=stored.horizon, exported_at=stored.exported_at)
        state.write(destination, definition.destination, now)
    return _told(definition.key, now)


def line(told: dict[str, Any]) -> str:
    """Return one position as a line for people."""
    cursor, watermark = told["cursor"], told["watermark"]
    if told["first_load_unfinished"]:
        return f"{told['key']}: an unfinished first load; the next load goes on with it"
    if cursor is None:
        return f"{told['key']}: nothing yet; the next load reads everything"
    place = Position(**cursor)
    from_where = f"; the next load reads from {Position(**watermark)}" if watermark else ""
    return f"{told['key']}: cursor {place}{from_where}"


def _locked(destination: Connection, definition: Definition) -> State:
    state.create_tables(destination)
    state.lock(destination, definition.destination)
    return state.read(destination, definition.destination)


def _told(key: str, stored: State) -> dict[str, Any]:
    return {
        "key": key,
        "cursor": state.as_dict(stored.cursor),
        "watermark": state.as_dict(stored.watermark),
        "exported_at": stored.exported_at,
        "first_load_unfinished": stored.next_block is not None,
    }
