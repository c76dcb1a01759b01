"""What is remembered of a replication slot: how far its changes are in the destination."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from psycopg import sql

from exporter.config import Destination
from exporter.errors import LockedError
from exporter.state import position
from exporter.state.binding import Source
from exporter.wire import Connection

SLOTS = sql.Identifier(position.SCHEMA, "_exporter_slots")
_TABLE = """
create table if not exists {} (
    slot text primary key,
    cluster text,
    database text not null,
    timeline int,
    lsn pg_lsn,
    exported_at timestamptz,
    updated_at timestamptz not null default now()
)
"""


class Slot(NamedTuple):
    """A slot by its name. ``lsn``: all that was committed before it is in the destination.

    None while the slot is not known to be there. ``exported_at`` is the last stamp given.
    """

    name: str
    lsn: str | None = None
    exported_at: str | None = None
    timeline: int | None = None


def create_table(destination: Connection) -> None:
    """Create the table where it is missing."""
    found = destination.execute(
        "select to_regclass(%s)", (f"{position.SCHEMA}._exporter_slots",)
    ).fetchone()
    if found == (None,):
        with destination.transaction():
            position.create_schema(destination, position.SCHEMA)
            destination.execute(sql.SQL(_TABLE).format(SLOTS))


def exist(destination: Connection) -> bool:
    """Tell whether any slot has ever been read for this destination."""
    found = destination.execute(
        "select to_regclass(%s) is not null", (f"{position.SCHEMA}._exporter_slots",)
    ).fetchone()
    return bool(found and found[0])


def lock(destination: Connection, database: str) -> None:
    """Let one session at a time read the slot of a source. Raises LockedError."""
    number = position.number_of(f"slot {database}")
    row = destination.execute("select pg_try_advisory_lock(%s)", (number,)).fetchone()
    if not row or not row[0]:
        raise LockedError(
            f"another run reads the slot of {database.partition('/')[2]}",
            hint="let it end: it lands the changes of all tables",
        )


def of_source(destination: Connection, cluster: str | None, database: str) -> Slot | None:
    """Return the slot that is read for a source, None before there is one."""
    row = destination.execute(
        sql.SQL(
            "select slot, lsn::text, exported_at::text, timeline from {} where database = %s"
            " and coalesce(cluster, '') = coalesce(%s, '')"
        ).format(SLOTS),
        (database, cluster),
    ).fetchone()
    return Slot(*row) if row else None


def of(destination: Connection, source: Source) -> Slot | None:
    """Return the slot that is read for a source, None before there is one."""
    return of_source(destination, source.cluster, source.database)


def read_at(destination: Connection) -> dict[str, datetime]:
    """Return when each slot that is known here was read last."""
    rows = destination.execute(sql.SQL("select slot, updated_at from {}").format(SLOTS)).fetchall()
    return dict(rows)


def remember(destination: Connection, slot: Slot, cluster: str | None, database: str) -> None:
    """Keep a slot's name before it is made: it is then never without its owner."""
    destination.execute(
        sql.SQL(
            "insert into {} (slot, cluster, database, lsn, timeline) values (%s, %s, %s, %s, %s)"
            " on conflict (slot) do update set (lsn, updated_at) = (excluded.lsn, now())"
        ).format(SLOTS),
        (slot.name, cluster, database, slot.lsn, slot.timeline),
    )


def reached(destination: Connection, name: str, lsn: str, stamp: str | None) -> None:
    """Store a position. Belongs in the transaction that lands the changes up to it."""
    destination.execute(
        sql.SQL(
            "update {} set lsn = %s, exported_at = coalesce(%s::timestamptz, exported_at),"
            " updated_at = clock_timestamp() where slot = %s"
        ).format(SLOTS),
        (lsn, stamp, name),
    )


def forget(destination: Connection, name: str) -> None:
    """Remove what is remembered of a slot, and of the tables that it belongs to."""
    with destination.transaction():
        destination.execute(sql.SQL("delete from {} where slot = %s").format(SLOTS), (name,))
        destination.execute(
            sql.SQL("update {} set slot = null where slot ->> 'name' = %s").format(position.STATE),
            (name,),
        )


def leave(destination: Connection, name: str, tables: list[str]) -> None:
    """Take note that of the slot's tables none but these are read on: the others miss changes."""
    destination.execute(
        sql.SQL(
            "update {} set slot = null where slot ->> 'name' = %s and relation <> all(%s)"
        ).format(position.STATE),
        (name, tables),
    )


def leave_one(destination: Connection, target: Destination) -> None:
    """Take note that a table misses changes until it is copied, from the start."""
    destination.execute(
        sql.SQL(
            'update {} set slot = slot || \'{{"until": null, "snapshot": null}}\''
            " where relation = %s"
        ).format(position.STATE),
        (str(target),),
    )
