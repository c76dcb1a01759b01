"""What is remembered of a replication slot: how far its changes are in the destination."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple, Protocol

from psycopg import sql

from exporter.config import Destination
from exporter.errors import LockedError
from exporter.state import position
from exporter.state.binding import Source
from exporter.wire import Connection
from exporter.wire.replication import lsn_text

SLOTS = sql.Identifier(position.SCHEMA, "_exporter_slots")
_TABLE = """
create table if not exists {} (
    slot text primary key,
    cluster text,
    database text not null,
    timeline int,
    lsn pg_lsn,
    last_commit bytea,
    exported_at timestamptz,
    read_at timestamptz,
    updated_at timestamptz not null default now()
);
-- what a table of an earlier version lacks
alter table {}
    add column if not exists last_commit bytea,
    add column if not exists read_at timestamptz
"""


class Slot(NamedTuple):
    """A slot by its name. ``lsn``: all that was committed before it is in the destination.

    None while the slot is not known to be there. ``exported_at`` is the last stamp given,
    ``last_commit`` the last commit that has landed: its position and its time.
    """

    name: str
    lsn: str | None = None
    exported_at: str | None = None
    timeline: int | None = None
    last_commit: bytes | None = None


class Known(NamedTuple):
    """What is remembered of a slot, for people.

    All that was committed by ``read_at`` is in the destination; that was ``seconds`` ago. None
    before the slot was read to its end.
    """

    name: str
    cluster: str | None
    database: str  # its oid and its name
    lsn: str | None
    read_at: datetime | None
    seconds: float | None


def create_table(destination: Connection) -> None:
    """Create the table where it is missing, or of an earlier version."""
    if not _has(destination, "read_at"):
        with destination.transaction():
            position.create_schema(destination, position.SCHEMA)
            destination.execute(sql.SQL(_TABLE).format(SLOTS, SLOTS))


def exist(destination: Connection) -> bool:
    """Tell whether any slot has ever been read for this destination."""
    return _has(destination, "slot")


def _has(destination: Connection, column: str) -> bool:
    found = destination.execute(
        "select from pg_attribute where attrelid = to_regclass(%s) and attname = %s",
        (f"{position.SCHEMA}._exporter_slots", column),
    ).fetchone()
    return found is not None


def lock(destination: Connection, cluster: str | None, database: str) -> None:
    """Let one session at a time read the slot of a source. Raises LockedError."""
    number = position.number_of(f"slot {cluster} {database}")
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
            "select slot, lsn::text, exported_at::text, timeline, last_commit from {}"
            " where database = %s and coalesce(cluster, '') = coalesce(%s, '')"
        ).format(SLOTS),
        (database, cluster),
    ).fetchone()
    return Slot(*row) if row else None


def of(destination: Connection, source: Source) -> Slot | None:
    """Return the slot that is read for a source, None before there is one."""
    return of_source(destination, source.cluster, source.database)


def known(destination: Connection) -> dict[str, Known]:
    """Return the slots that are read for this destination, by their names."""
    if not exist(destination):
        return {}
    rows = destination.execute(
        # By name: the table of an earlier version lacks the column.
        sql.SQL(
            "select slot, cluster, database, lsn::text, (to_jsonb(s)->>'read_at')::timestamptz,"
            " extract(epoch from clock_timestamp()"
            " - (to_jsonb(s)->>'read_at')::timestamptz)::float8 from {} s order by 1"
        ).format(SLOTS)
    ).fetchall()
    return {row[0]: Known(*row) for row in rows}


def now(destination: Connection) -> str:
    """Return the destination's clock, for ``reached``."""
    row = destination.execute("select clock_timestamp()::text").fetchone()
    assert row is not None
    return str(row[0])


class Owner(Protocol):
    """The server and the database that a slot is of."""

    @property
    def cluster(self) -> str | None:
        """The cluster; None where it may not be asked for."""

    @property
    def database(self) -> str:
        """The oid of the database, and its name."""


def remember(destination: Connection, slot: Slot, owner: Owner) -> None:
    """Keep a slot's name before it is made: it is then never without its owner."""
    destination.execute(
        sql.SQL(
            "insert into {} (slot, cluster, database, lsn, timeline) values (%s, %s, %s, %s, %s)"
            " on conflict (slot) do update"
            " set (lsn, timeline, updated_at) = (excluded.lsn, excluded.timeline, now())"
        ).format(SLOTS),
        (slot.name, owner.cluster, owner.database, slot.lsn, slot.timeline),
    )


def reached(
    destination: Connection,
    name: str,
    lsn: str,
    commit: bytes | None,
    stamp: str | None,
    read_at: str | None,
) -> None:
    """Store a position. Belongs in the transaction that lands the changes up to it.

    ``read_at``: where all has landed that was committed by then, by the destination's clock.
    """
    destination.execute(
        sql.SQL(
            "update {} set lsn = %s, last_commit = coalesce(%s, last_commit),"
            " exported_at = coalesce(%s::timestamptz, exported_at),"
            " read_at = coalesce(%s::timestamptz, read_at),"
            " updated_at = clock_timestamp() where slot = %s"
        ).format(SLOTS),
        (lsn, commit, stamp, read_at, name),
    )


def moved(destination: Connection, slot: Slot, fork: int) -> None:
    """Take note that the source is on another timeline, which left the one before at ``fork``.

    Tables whose copies may have rows from behind it miss what became of them.
    """
    with destination.transaction():
        destination.execute(
            sql.SQL(
                "update {} set timeline = %s, lsn = least(lsn, %s::pg_lsn) where slot = %s"
            ).format(SLOTS),
            (slot.timeline, lsn_text(fork), slot.name),
        )
        destination.execute(
            sql.SQL(
                "update {} set slot = null where slot ->> 'name' = %s and (slot ->> 'snapshot'"
                " is not null or (slot ->> 'until')::pg_lsn > %s::pg_lsn)"
            ).format(position.STATE),
            (slot.name, lsn_text(fork)),
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
