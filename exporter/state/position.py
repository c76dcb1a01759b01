"""The stored position, the record of runs, and the lock: tables and calls in the destination."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from psycopg import sql
from psycopg.types.json import Jsonb

from exporter.config import Destination
from exporter.errors import LockedError
from exporter.state.binding import Binding
from exporter.wire import Connection

SCHEMA = "analytics_raw"
STATE = sql.Identifier(SCHEMA, "_exporter_state")
RUNS = sql.Identifier(SCHEMA, "_exporter_runs")
_TABLES = f"""
create table if not exists {SCHEMA}._exporter_state (
    relation text,
    key text not null,
    cursor_value text,
    cursor_id text,
    watermark_value text,
    watermark_id text,
    snapshot_xmin text,
    horizon text,
    pending_value text,
    pending_at text,
    source text,
    file text,
    next_block bigint,
    run text,
    exported_at timestamptz,
    columns jsonb,
    binding jsonb,
    sweep jsonb,
    slot jsonb,
    updated_at timestamptz not null default now()
);
create table if not exists {SCHEMA}._exporter_runs (
    id bigint generated always as identity primary key,
    key text not null,
    command text not null,
    status text not null,
    started_at timestamptz not null default clock_timestamp(),
    finished_at timestamptz,
    rows_read bigint not null default 0,
    rows_written bigint not null default 0,
    rows_unchanged bigint not null default 0,
    rows_deleted bigint not null default 0,
    rows_swept bigint not null default 0,
    batches bigint not null default 0,
    bytes bigint not null default 0,
    cursor_value text,
    cursor_id text,
    error text
);
-- what tables of an earlier version lack
alter table {SCHEMA}._exporter_state
    add column if not exists run text,
    add column if not exists relation text,
    add column if not exists binding jsonb,
    add column if not exists sweep jsonb,
    add column if not exists slot jsonb,
    drop constraint if exists _exporter_state_pkey;
create unique index if not exists _exporter_state_relation on {SCHEMA}._exporter_state (relation);
alter table {SCHEMA}._exporter_runs
    add column if not exists rows_deleted bigint not null default 0,
    add column if not exists rows_swept bigint not null default 0;
create index if not exists _exporter_runs_key on {SCHEMA}._exporter_runs (key, id);
comment on table {SCHEMA}._exporter_state is 'dbt-exporter: positions, one row a raw table';
comment on table {SCHEMA}._exporter_runs is 'dbt-exporter: one row a run';
"""


class Position(NamedTuple):
    """A place in the order of a read: PostgreSQL's own text of the cursor and of the id."""

    value: str
    id: str | None = None

    def __str__(self) -> str:
        return f"{self.value}, {self.id}" if self.id is not None else self.value


def as_dict(position: Position | None) -> dict[str, str | None] | None:
    """Return a position as the objects of ``--json`` have it."""
    return {"value": position.value, "id": position.id} if position else None


class Bound(NamedTuple):
    """The last cursor value that no open transaction can precede; ``type`` is the cursor's."""

    value: str
    type: str


class Round(NamedTuple):
    """How far a round of the sweep is, which looks at all blocks of a table, some at each load.

    It finds the rows of the transaction ``since`` and of later ones, or all rows. The next round
    finds those of ``xmin``, the oldest one that was open when this round began, and of later ones.
    Times are ISO text, UTC.
    """

    since: str | None
    xmin: str
    began: str
    seen: str  # when its last blocks were read
    place: int  # the block to go on from
    file: str  # what the blocks are of
    over: bool = False


class Copied(NamedTuple):
    """By which slot a table is read on, and the snapshot in which it was copied before.

    ``until``: the position behind which the copy is as if it had never been; None while the copy
    goes on. ``files`` are those of its heaps: a table that is written anew sends no changes.
    ``sent`` is what of the publication sends the table: altered meanwhile, it has missed some.
    ``resumed``: the rest of the copy is of a later snapshot than this one.
    ``emptied_by`` is the transaction of the last TRUNCATE that a history has got.
    """

    name: str
    snapshot: str | None
    until: str | None
    files: dict[str, str]
    sent: str | None = None
    resumed: bool = False
    emptied_by: int | None = None


class State(NamedTuple):
    """What is remembered of a raw table.

    ``cursor``: the furthest position that has landed; of a scan, the oldest transaction that it may
    have missed. ``watermark``: where the next read by the cursor starts.
    ``snapshot_xmin``: the oldest transaction that the snapshot up to ``cursor`` may have missed.
    ``binding`` says which tables the position describes: none where an earlier version stored it.
    ``file`` and ``next_block``: how far an unfinished first load is; ``run`` who may go on with it.
    ``sweep``: how far the round is that looks for what the cursor has passed over. ``slot``: of a
    table that is read by its changes, whose cursor is the WAL position that was reached.
    """

    cursor: Position | None = None
    watermark: Position | None = None
    snapshot_xmin: str | None = None
    horizon: str | None = None
    pending_value: str | None = None
    pending_at: str | None = None
    source: str | None = None
    file: str | None = None
    next_block: int | None = None
    run: str | None = None
    exported_at: str | None = None
    binding: Binding | None = None
    sweep: Round | None = None
    slot: Copied | None = None

    @property
    def is_first(self) -> bool:
        """Whether a first load has begun and not ended."""
        return self.cursor is None and self.next_block is not None


_POSITIONS = ("cursor", "watermark")
_OBJECTS = ("binding", "sweep", "slot")
_PLAIN = [name for name in State._fields if name not in (*_POSITIONS, *_OBJECTS)]
_COLUMNS = ["cursor_value", "cursor_id", "watermark_value", "watermark_id", *_PLAIN]
_COLUMNS += _OBJECTS
_NAMES = ", ".join(_COLUMNS)
# An earlier version told states apart by the definition's key alone.
_MINE = "(relation = %s or (relation is null and key = %s))"
_READ = f"""
select {_NAMES.replace("exported_at", "exported_at::text")}
from {SCHEMA}._exporter_state where {_MINE} order by relation is null limit 1
"""  # noqa: S608  the names are our own
_COLUMNS_OF = f"""
select columns from {SCHEMA}._exporter_state where {_MINE} order by relation is null limit 1
"""  # noqa: S608
_WRITE = f"""
insert into {SCHEMA}._exporter_state (relation, key, {_NAMES})
values ({", ".join(["%s"] * (len(_COLUMNS) + 2))})
on conflict (relation) do update set (key, {_NAMES}, updated_at)
    = (excluded.key, {", ".join(f"excluded.{name}" for name in _COLUMNS)}, now())
"""  # noqa: S608


def create_tables(destination: Connection) -> None:
    """Create the two tables where they are missing, or of an earlier version."""
    newest = destination.execute(
        "select count(*) from pg_attribute where not attisdropped and (attrelid, attname) in"
        " ((to_regclass(%(state)s), 'slot'), (to_regclass(%(runs)s), 'rows_swept'))",
        {"state": f"{SCHEMA}._exporter_state", "runs": f"{SCHEMA}._exporter_runs"},
    ).fetchone()
    if newest != (2,):
        with destination.transaction():
            create_schema(destination, SCHEMA)
            destination.execute(_TABLES)


def create_schema(destination: Connection, name: str) -> None:
    """Create a schema where it is missing, and keep others from it until the transaction ends.

    Two first runs at once would both try: creating is not atomic under "if not exists".
    """
    destination.execute("select pg_advisory_xact_lock(%s)", (number_of(name),))
    found = destination.execute("select from pg_namespace where nspname = %s", (name,)).fetchone()
    if found is None:  # "if not exists" would ask for a right that a mere loader need not have
        destination.execute(sql.SQL("create schema if not exists {}").format(sql.Identifier(name)))


def remembered_columns(
    destination: Connection, target: Destination
) -> dict[str, str | None] | None:
    """Return the columns of the last load with their types, None for one that was gone by then."""
    row = destination.execute(
        _COLUMNS_OF,
        (str(target), target.key),
    ).fetchone()
    return row[0] if row else None


def remember_columns(
    destination: Connection, target: Destination, columns: dict[str, str | None]
) -> None:
    """Keep them for the next load. Belongs in the transaction that changes raw."""
    destination.execute(
        sql.SQL(
            "insert into {} (relation, key, columns) values (%s, %s, %s)"
            " on conflict (relation) do update set columns = excluded.columns"
        ).format(STATE),
        (str(target), target.key, Jsonb(columns)),
    )


def tables_exist(destination: Connection) -> bool:
    """Tell whether anything has ever been loaded here."""
    row = destination.execute("select to_regclass(%s)", (f"{SCHEMA}._exporter_runs",)).fetchone()
    return bool(row and row[0])


def lock(destination: Connection, target: Destination) -> None:
    """Take the definition's lock for this session. Raises LockedError where another holds it."""
    number = lock_number(target)
    row = destination.execute("select pg_try_advisory_lock(%s)", (number,)).fetchone()
    if row and row[0]:
        return
    who = holder(destination, target) or "a session that has ended"
    raise LockedError(
        f"{target.key}: another run holds the lock of {target}: {who}",
        hint="let it end, or stop it with select pg_terminate_backend(<session>)",
    )


def unlock(destination: Connection, target: Destination) -> None:
    """Give up the definition's lock, which this session has: as often as it was taken."""
    number = lock_number(target)
    while destination.execute("select pg_advisory_unlock(%s)", (number,)).fetchone() == (True,):
        pass


def holder(destination: Connection, target: Destination) -> str | None:
    """Return who holds the definition's lock, None where nobody does."""
    row = destination.execute(
        "select l.pid, a.application_name, host(a.client_addr), a.backend_start::timestamptz(0)"
        " from pg_locks l left join pg_stat_activity a on a.pid = l.pid"
        " where l.locktype = 'advisory' and l.granted and l.objsubid = 1"
        " and l.database = (select oid from pg_database where datname = current_database())"
        " and (l.classid::bigint << 32 | l.objid::bigint) = %s",
        (lock_number(target),),
    ).fetchone()
    if row is None:
        return None
    pid, name, host, since = row
    return f"session {pid} ({name or '?'}, from {host or 'a local socket'}, since {since})"


def read(destination: Connection, target: Destination) -> State:
    """Return what is remembered of a definition: nothing before its first load."""
    row = destination.execute(_READ, (str(target), target.key)).fetchone()
    if row is None:
        return State()
    values = dict(zip(_COLUMNS, row, strict=True))

    def position(name: str) -> Position | None:
        value = values[f"{name}_value"]
        return None if value is None else Position(value, values[f"{name}_id"])

    plain = {name: values[name] for name in _PLAIN}
    binding = Binding.of_json(values["binding"]) if values["binding"] else None
    sweep = Round(**values["sweep"]) if values["sweep"] else None
    slot = Copied(**values["slot"]) if values["slot"] else None
    return State(
        position("cursor"),
        position("watermark"),
        **plain,
        binding=binding,
        sweep=sweep,
        slot=slot,
    )


def take_over(destination: Connection, target: Destination) -> None:
    """Give the raw table the state that an earlier version kept by the definition's key."""
    destination.execute(
        sql.SQL(
            "update {0} set relation = %s where relation is null and key = %s"
            " and not exists (select from {0} where relation = %s)"
        ).format(STATE),
        (str(target), target.key, str(target)),
    )


def write(
    destination: Connection, target: Destination, state: State, bound: Bound | None = None
) -> None:
    """Store the position. Belongs in the transaction that lands the rows.

    With a ``bound`` the watermark becomes the cursor, or the bound where that is earlier.
    """
    if bound is not None and state.cursor is not None:
        beyond = is_beyond(destination, state.cursor, bound)
        state = state._replace(watermark=Position(bound.value) if beyond else state.cursor)
    values: list[object] = []
    for position in (state.cursor, state.watermark):
        values += position or (None, None)
    values += (getattr(state, name) for name in _PLAIN)
    values.append(Jsonb(state.binding.as_json()) if state.binding else None)
    values.append(Jsonb(state.sweep._asdict()) if state.sweep else None)
    values.append(Jsonb(state.slot._asdict()) if state.slot else None)
    destination.execute(_WRITE, [str(target), target.key, *values])


def is_beyond(destination: Connection, position: Position, bound: Bound) -> bool:
    """Tell whether a position lies beyond a bound. The server compares: its types are exact."""
    row = destination.execute(
        sql.SQL("select %s::{type} > %s::{type}").format(type=sql.SQL(bound.type)),
        (position.value, bound.value),
    ).fetchone()
    return bool(row and row[0])


def stamp(destination: Connection, state: State) -> str:
    """Return the ``_exported_at`` of a load's first batch.

    It is after every stamp given before, also where the server's clock was set back: a model that
    asks for rows newer than its newest would pass over a row with an older stamp.
    """
    row = destination.execute(
        "select greatest(clock_timestamp(), %s::timestamptz + interval '1 microsecond')::text",
        (state.exported_at,),
    ).fetchone()
    assert row is not None
    return str(row[0])


def stamp_after(destination: Connection, stamps: Sequence[str]) -> str:
    """Return an ``_exported_at`` that is after all of these, as ``stamp`` does after one."""
    row = destination.execute(
        "select greatest(clock_timestamp(), max(s) + interval '1 microsecond')::text"
        " from unnest(%s::timestamptz[]) s",
        (list(stamps),),
    ).fetchone()
    assert row is not None
    return str(row[0])


def later(stamp: str, batches: int) -> str:
    """Return the stamp of a later batch: each is a microsecond after the one before it."""
    after = moment(stamp) + timedelta(microseconds=batches)
    return f"{after.isoformat(' ', 'microseconds')}+00"


def moment(stamp: str) -> datetime:
    """Return the time of a stamp as our sessions spell it, in UTC.

    Python reads an offset of hours alone, and a fraction of any length, from 3.11 on.
    """
    seconds, _, fraction = stamp.partition("+")[0].partition(".")
    micros = int((fraction or "0").ljust(6, "0"))
    return datetime.fromisoformat(seconds) + timedelta(microseconds=micros)


def lock_number(target: Destination) -> int:
    """Return the number of the advisory lock that loads of the raw table hold."""
    return number_of(str(target))


def number_of(name: str) -> int:
    """Return the advisory lock's number: positive, 63 bits, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"dbt-exporter {name}".encode()).digest()[:8], "big") >> 1
