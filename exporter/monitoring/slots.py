"""The slots at the source: what they hold back, when they were read, for which tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from exporter.errors import ExporterError, UsageError, nearest
from exporter.source import slots
from exporter.source.slots import Found
from exporter.state import slots as remembered
from exporter.wire import Connection, connect


class Slot(NamedTuple):
    """A slot of ours at the source. ``ours``: this destination reads it."""

    found: Found
    ours: bool
    read_at: datetime | None
    tables: tuple[str, ...]

    @property
    def status(self) -> str:
        """Return in a word or a few what becomes of it."""
        if self.found.lost:
            return "lost"
        if self.found.active_pid:
            return f"read by {self.found.active_pid}"
        return "ok" if self.ours else "of another destination"

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "slot": self.found.name,
            "database": self.found.database,
            "status": self.status,
            "bytes_held_back": self.found.held,
            "read_at": self.read_at,
            "tables": list(self.tables),
        }


def current() -> list[Slot]:
    """Return the slots of this source. Raises DatabaseError."""
    with connect("DATABASE_URL_CORE") as source, connect("DATABASE_URL_ANALYTICS") as destination:
        return list(found_slots(source, destination))


def found_slots(source: Connection, destination: Connection) -> Iterator[Slot]:
    """Yield the slots of this source."""
    known = remembered.read_at(destination) if remembered.exist(destination) else {}
    for found in slots.find(source):
        tables = ()
        if found.database == source.info.dbname:
            rows = source.execute(
                "select schemaname || '.' || tablename from pg_publication_tables"
                " where pubname = %s order by 1",
                (found.name,),
            ).fetchall()
            tables = tuple(name for (name,) in rows)
        yield Slot(found, found.name in known, known.get(found.name), tables)


def drop(name: str) -> str:
    """End a slot and its publication; return what was done. Raises UsageError, SourceError."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(connect("DATABASE_URL_CORE"))
        ours = {one.name: one for one in slots.find(source)}
        published = source.execute(
            "select from pg_publication where pubname = %s", (name,)
        ).fetchone()
        if name not in ours and (published is None or not name.startswith(slots.PREFIX)):
            raise UsageError(f"there is no slot {name} at the source", hint=nearest(name, ours))
        slots.drop(source, name)
        with contextlib.suppress(ExporterError, psycopg.Error):
            destination = stack.enter_context(connect("DATABASE_URL_ANALYTICS"))
            if remembered.exist(destination):
                remembered.forget(destination, name)
        return f"dropped {name}, the slot and the publication: a load makes new ones, and copies"
