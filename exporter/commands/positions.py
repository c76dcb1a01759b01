"""The work of ``exporter state``: show, reset and set the stored positions."""

from __future__ import annotations

from typing import Any

from exporter.config import Definition
from exporter.errors import UsageError
from exporter.source import window
from exporter.source.catalog import find_table
from exporter.state import position as state
from exporter.state.position import Position, State
from exporter.wire.connection import Connection, connect


def show(definitions: list[Definition]) -> list[dict[str, Any]]:
    """Return what is stored of each definition. Reads the destination only."""
    with connect("DATABASE_URL_ANALYTICS") as destination:
        exist = state.tables_exist(destination)
        return [
            _as_dict(key, state.read(destination, key) if exist else State())
            for key in (definition.key for definition in definitions)
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
        # The stamp stays: the models would pass over rows with a lower one.
        now = State(exported_at=stored.exported_at)
        state.write(destination, definition.key, now)
    return _as_dict(definition.key, now)


def set_to(definition: Definition, value: str, id: str | None) -> dict[str, Any]:
    """Store the given position, in PostgreSQL's own spelling of it.

    Raises UsageError for values that the definition's columns do not take, and where an
    append-only log would land rows twice.
    """
    with (
        connect("DATABASE_URL_ANALYTICS") as destination,
        connect("DATABASE_URL_CORE") as source,
    ):
        stored = _locked(destination, definition)
        table = find_table(source, definition, destination)
        cursor, id_column = window.cursor_columns(definition, table)
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
            onward = state.advanced(destination, stored, position, stored.cursor.value, cursor.base)
            if onward.watermark == position:
                raise UsageError(
                    f"{definition.key} is append-only and has landed rows up to {stored.cursor}:"
                    " they would be there twice",
                    hint="set a later position",
                )
        # Without the transaction id of the last read, every row behind the position is read.
        now = State(position, position, horizon=stored.horizon, exported_at=stored.exported_at)
        state.write(destination, definition.key, now)
    return _as_dict(definition.key, now)


def line(stored: dict[str, Any]) -> str:
    """Return one stored position as a line for people."""
    key, cursor, watermark = stored["key"], stored["cursor"], stored["watermark"]
    if stored["first_load_unfinished"]:
        return f"{key}: an unfinished first load; the next load goes on with it"
    if cursor is None:
        return f"{key}: nothing yet; the next load reads everything"
    start = f"; the next load reads from {Position(**watermark)}" if watermark else ""
    return f"{key}: cursor {Position(**cursor)}{start}"


def _locked(destination: Connection, definition: Definition) -> State:
    state.create_tables(destination)
    state.lock(destination, definition)
    return state.read(destination, definition.key)


def _as_dict(key: str, stored: State) -> dict[str, Any]:
    return {
        "key": key,
        "cursor": state.as_dict(stored.cursor),
        "watermark": state.as_dict(stored.watermark),
        "exported_at": stored.exported_at,
        "first_load_unfinished": stored.next_block is not None,
    }
