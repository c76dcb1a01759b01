"""The work of ``exporter state``: show, reset and set the stored positions."""

from __future__ import annotations

from typing import Any

from exporter import state
from exporter.commands.shared import refuse_function
from exporter.config import Definition
from exporter.errors import UsageError
from exporter.raw.table import oid_and_emptiness
from exporter.source import find_table, reader_of, window
from exporter.state import Binding, Bound, Position, State
from exporter.wire import Connection, connect


def show(definitions: list[Definition]) -> list[dict[str, Any]]:
    """Return what is stored of each definition. Reads the destination only."""
    with connect("DATABASE_URL_ANALYTICS") as destination:
        exist = state.tables_exist(destination)
        return [
            _as_dict(one.key, state.read(destination, one.destination) if exist else State())
            for one in definitions
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
        state.write(destination, definition.destination, now)
    return _as_dict(definition.key, now)


def set_to(definition: Definition, value: str, id: str | None) -> dict[str, Any]:
    """Store the given position, in PostgreSQL's own spelling of it.

    Raises UsageError for values that the definition's columns do not take, and where an
    append-only log would land rows twice.
    """
    again = f"exporter state reset {definition.key}, and exporter load {definition.key}"
    refuse_function(definition, "exporter state set", again)
    if definition.source.read == "changes":
        raise UsageError(
            f"{definition.where}: {definition.key} is read by its changes: its position is that of"
            " the slot",
            hint=f"exporter state reset {definition.key} has the table copied again",
        )
    with (
        connect("DATABASE_URL_ANALYTICS") as destination,
        connect(definition.source.variable) as source,
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
        now = State(
            position,
            position,
            horizon=stored.horizon,
            exported_at=stored.exported_at,
            binding=stored.binding,
        )
        state.write(destination, definition.destination, now)
    return _as_dict(definition.key, now)


def adopt(definition: Definition) -> dict[str, Any]:
    """Bind the position to the source and the raw table of now. Raises UsageError without one.

    What another server called its transactions tells nothing here: the next load compares all
    rows from the watermark on.
    """
    key, target = definition.key, definition.destination
    refuse_function(definition, "exporter state adopt", f"exporter load {key}")
    with (
        connect("DATABASE_URL_ANALYTICS") as destination,
        connect(definition.source.variable) as source,
    ):
        stored = _locked(destination, definition)
        if stored.cursor is None:
            raise UsageError(f"{key} has no position", hint=f"exporter load {key}")
        reader = reader_of(definition, source)
        with reader.opened(stored, None):
            adopted = reader.adopted(stored)
            reading = stored.binding.reading if stored.binding else reader.reading()
            raw, _ = oid_and_emptiness(destination, target)
            binding = Binding(reader.found, raw, reading)
        now = adopted._replace(binding=binding)
        state.write(destination, target, now)
    return _as_dict(key, now)


def line(stored: dict[str, Any]) -> str:
    """Return one stored position as a line for people."""
    key, cursor, watermark = stored["key"], stored["cursor"], stored["watermark"]
    if stored["first_load_unfinished"]:
        return f"{key}: an unfinished first load; the next load goes on with it"
    if cursor is None:
        return f"{key}: nothing yet; the next load reads everything"
    text = f"{key}: cursor {Position(**cursor)}"
    bound = stored["bound_to"]
    if bound and bound["reading"]["way"] == "changes" and not stored["slot"]:
        text = f"{key}: is copied again by the next load, then its changes follow"
    elif stored["slot"]:
        text = f"{key}: has the changes up to {cursor['value']} of the WAL, from {stored['slot']}"
    elif watermark:
        text += f"; the next load reads from {Position(**watermark)}"
    if bound:
        source = bound["source"]
        text += (
            f"\n  bound to {source['table']} (oid {source['oid']}) of database"
            f" {source['database'].partition('/')[2]}, cluster {source['cluster'] or 'unknown'},"
            f" timeline {source['timeline'] or 'unknown'}; raw table oid {bound['raw']}"
        )
    return text


def _locked(destination: Connection, definition: Definition) -> State:
    state.create_tables(destination)
    state.lock(destination, definition.destination)
    state.take_over(destination, definition.destination)
    return state.read(destination, definition.destination)


def _as_dict(key: str, stored: State) -> dict[str, Any]:
    return {
        "key": key,
        "cursor": state.as_dict(stored.cursor),
        "watermark": state.as_dict(stored.watermark),
        "exported_at": stored.exported_at,
        "first_load_unfinished": stored.is_first,
        "slot": stored.slot.name if stored.slot and stored.slot.until else None,
        "bound_to": stored.binding.as_json() if stored.binding else None,
    }
