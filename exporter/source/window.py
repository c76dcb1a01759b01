"""What may be read now, and how far the stored position may advance.

The idea: a row's stamp is at or after the start of its transaction, so a transaction that is
still open can commit rows behind everything that we see now, but never behind its own start.
Everything visible is landed at once; the *watermark*, from which the next read starts, stays
behind the *horizon*, the start of the oldest transaction that was open. The rows between the two
are looked at again, and PostgreSQL's ``xmin`` tells which of them can be new.
"""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter.config.definition import Definition
from exporter.errors import DefinitionError, SourceError, UsageError
from exporter.source.catalog import Column, Table, missing_column
from exporter.state.position import Position, State
from exporter.wire.connection import Connection, own_sessions

_TIMES = ("timestamp without time zone", "timestamp with time zone", "date")
_NUMBERS = ("smallint", "integer", "bigint")
# A session reports that its transaction began some microseconds after now() was taken.
_MARGIN = timedelta(milliseconds=100)
_XID_TRUST = 1_000_000_000  # half of the distance at which age() of a transaction id turns over


class Horizon(NamedTuple):
    """What the source's other sessions can still commit behind. Times are ISO text, UTC."""

    clock: str
    oldest_open: str  # '-infinity' where it cannot be told
    blind: bool  # sessions of other roles are hidden from us
    standby: bool
    identity: str  # system, timeline and database: transaction ids mean something within one
    top: str | None = None  # integer cursors: the greatest value, seen at ``top_at``
    top_at: str | None = None


class Snapshot(NamedTuple):
    """The transaction that reads."""

    xmin: str
    xid_usable: bool  # the stored xmin still tells new from old


class Window(NamedTuple):
    """One read of the source. ``safe`` is the last value that no open transaction can precede."""

    cursor: Column
    id: Column | None
    safe: str | None
    upper: str | None  # append mode: what is held back, exclusive
    lookback: timedelta | int
    xmin_since: str | None  # rows at or before ``State.cursor`` are read only from this xid on
    pending: tuple[str, str] | None  # to be stored: an integer seen, and when


class Span(NamedTuple):
    """Cursor values of a backfill, as they were typed: from ``since`` to before ``until``."""

    since: str | None
    until: str | None


# Whether the cursor is an integer, and whether this role may ask which server it is.
_ASKED = """
select exists (
    select from pg_attribute a join pg_class c on c.oid = a.attrelid
        join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = %s and c.relname = %s and a.attname = %s and not a.attisdropped
        and a.atttypid in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)
), has_function_privilege('pg_control_system()', 'execute')
    and has_function_privilege('pg_control_checkpoint()', 'execute')
"""
# This program's own sessions read, and write nothing here. They are told by process: anybody may be
# called dbt-exporter. Those of other machines are not known, and hold the horizon back like others.
# Asked before the prepared transactions are looked at: one that is between the two states is in one
# of them at least.
_OPEN = """
with open as materialized (
    select min(xact_start) as oldest, count(*) filter (
        where usesysid is not null and state is null and not pg_has_role(usesysid, 'usage')
    ) as hidden
    from pg_stat_activity a
    where datname = current_database() and pid <> pg_backend_pid()
        and backend_type not in ('autovacuum worker', 'walsender')
        and not exists (
            select from unnest(%s::int[], %s::timestamptz[]) ours (pid, began)
            where ours.pid = a.pid and ours.began = a.backend_start)
)
select clock_timestamp()::text,
    case when pg_is_in_recovery() then least(clock_timestamp(), pg_last_xact_replay_timestamp())
        else least(oldest, clock_timestamp()) end::text,
    hidden > 0 and not pg_has_role('pg_read_all_stats', 'usage'), pg_is_in_recovery()
from open
"""
_PREPARED = "select exists (select from pg_prepared_xacts where database = current_database())"
_DATABASE = (
    "select format('%s/%s', oid, datname) from pg_database where datname = current_database()"
)
_IDENTITY = (
    "select format('%s/%s/%s', c.system_identifier, k.timeline_id, d.oid) from"
    " pg_control_system() c, pg_control_checkpoint() k, pg_database d"
    " where d.datname = current_database()"
)


def cursor_columns(definition: Definition, table: Table) -> tuple[Column, Column | None]:
    """Return the cursor's and the id's column. Raises SourceError for what cannot be one."""
    names = [column.name for column in table.columns]
    for key, name in (
        ("cursor.field", definition.source.cursor.field),
        ("cursor.id_field", definition.source.cursor.id_field),
    ):
        if name is not None and name not in names:
            raise missing_column(definition, f"source.{key}", name, names)
    for name in definition.destination.conflict_columns:
        if name not in names:
            raise missing_column(definition, "conflict_columns", name, names)
    cursor = table.column(definition.source.cursor.field)
    if not is_time(cursor) and not is_number(cursor):
        raise SourceError(
            f"{definition.where}: exporter.source.cursor.field {cursor.name} is {cursor.type}",
            hint="a cursor is a timestamp, a date or an integer that grows with every change",
        )
    lookback = definition.source.cursor.lookback
    if lookback is not None and is_time(cursor) != isinstance(lookback, timedelta):
        example = "'5 minutes'" if is_time(cursor) else "a whole number such as 1000"
        raise DefinitionError(
            f"{definition.where}: exporter.source.cursor.lookback does not fit {cursor.name},"
            f" which is {cursor.type}; write {example}"
        )
    return cursor, table.column(
        definition.source.cursor.id_field
    ) if definition.source.cursor.id_field else None


def is_time(column: Column) -> bool:
    """Tell whether a cursor of this column is a time."""
    return _base(column) in _TIMES


def is_number(column: Column) -> bool:
    """Tell whether a cursor of this column is an integer."""
    return _base(column) in _NUMBERS


def _base(column: Column) -> str:
    head, _, rest = column.raw_type.partition("(")  # timestamp(3) without time zone
    return head + rest.partition(")")[2] if rest else head


def observe(source: Connection, definition: Definition, state: State) -> Horizon:
    """Look at what is open on the source. Must run before the snapshot is taken."""
    asked = source.execute(
        _ASKED, (definition.source.schema, definition.source.table, definition.source.cursor.field)
    ).fetchone()
    assert asked is not None
    number, controls = asked
    top, top_at = _top(source, definition) if number else (None, None)
    row = source.execute(_OPEN, own_sessions(source)).fetchone()
    rest = source.execute(f"{_PREPARED}, ({_IDENTITY if controls else _DATABASE})").fetchone()
    assert row is not None
    assert rest is not None
    clock, oldest, blind, standby = row
    prepared, identity = rest
    if prepared:
        # When a prepared transaction began is not recorded. It was open, or had not begun, when
        # we last looked, so it began at or after that horizon.
        oldest = state.horizon or "-infinity"
    return Horizon(clock, oldest, blind, standby, identity or "", top, top_at)


def _top(source: Connection, definition: Definition) -> tuple[str | None, str | None]:
    statement = sql.SQL("select max({})::text, clock_timestamp()::text from {}").format(
        sql.Identifier(definition.source.cursor.field),
        definition.source.name,
    )
    row = source.execute(statement).fetchone()
    assert row is not None
    return row[0], row[1]


def take_snapshot(source: Connection, state: State, horizon: Horizon) -> Snapshot:
    """Return what the running REPEATABLE READ transaction sees."""
    row = source.execute(
        "select pg_snapshot_xmin(pg_current_snapshot())::text,"
        " pg_snapshot_xmax(pg_current_snapshot())::text"
    ).fetchone()
    assert row is not None
    stored = int(state.snapshot_xmin) if state.snapshot_xmin else None
    usable = (
        stored is not None
        and state.source == horizon.identity
        and 0 <= int(row[1]) - stored < _XID_TRUST
    )
    return Snapshot(row[0], usable)


def decide(
    source: Connection,
    definition: Definition,
    table: Table,
    state: State,
    horizon: Horizon,
    snapshot: Snapshot,
) -> Window:
    """Return the window of this read. Time arithmetic is the server's, for full precision."""
    cursor, id_column = cursor_columns(definition, table)
    pending = None
    lookback: timedelta | int
    if is_time(cursor):
        lookback = _time_lookback(definition)
        safe = _safe_time(source, cursor, state, horizon, lookback)
    else:
        lookback = _integer_lookback(definition)
        safe, pending = _safe_number(state, horizon, lookback)
    xmin = None
    if table.has_xmin and snapshot.xid_usable:
        xmin = str(int(state.snapshot_xmin or 0) % 2**32)
    return Window(
        cursor=cursor,
        id=id_column,
        safe=safe,
        upper=safe if definition.destination.mode == "append" else None,
        lookback=lookback,
        xmin_since=xmin,
        pending=pending,
    )


def _time_lookback(definition: Definition) -> timedelta:
    declared = definition.source.cursor.lookback
    if isinstance(declared, timedelta):
        return declared
    # An application's clock on a network with NTP is seconds off, its transactions last minutes
    # at most. An append-only table cannot take a row twice: it would be held back instead.
    return timedelta(0) if definition.destination.mode == "append" else timedelta(minutes=5)


def _integer_lookback(definition: Definition) -> int:
    declared = definition.source.cursor.lookback
    return declared if isinstance(declared, int) else 0


def _safe_time(
    source: Connection, cursor: Column, state: State, horizon: Horizon, lookback: timedelta
) -> str | None:
    kind = _base(cursor)
    digits = cursor.typmod if cursor.typmod >= 0 else 6
    back = lookback + _MARGIN + timedelta(seconds=10**-digits)  # now() may have been rounded down
    if kind == "timestamp with time zone":
        statement = "select (%(open)s::timestamptz - %(back)s)::text"
    elif kind == "date":
        statement = "select ((%(open)s::timestamptz - %(back)s)::date - 1)::text"
    else:
        # The column may hold any zone's local time. West of UTC it runs behind our clock, and the
        # newest value shows by how much.
        statement = (
            "select (%(open)s::timestamptz::timestamp - %(back)s + greatest(least("
            "case when isfinite(%(far)s::timestamp)"
            " then %(far)s::timestamp - %(clock)s::timestamptz::timestamp else interval '0' end,"
            " interval '0'), interval '-12 hours'))::text"
        )
    far = state.cursor.value if state.cursor else None
    row = source.execute(
        statement,
        {"open": horizon.oldest_open, "back": back, "clock": horizon.clock, "far": far},
    ).fetchone()
    return str(row[0]) if row and row[0] is not None else None


def _safe_number(
    state: State, horizon: Horizon, lookback: int
) -> tuple[str | None, tuple[str, str] | None]:
    """Return the safe value, and the observation to keep.

    A sequence hands out numbers in order, so whatever is below a number that was seen at a time
    belongs to a transaction that began before that time. It is final when those are all over.
    """
    seen = (horizon.top, horizon.top_at) if horizon.top and horizon.top_at else None
    pending = (
        (state.pending_value, state.pending_at)
        if state.pending_value and state.pending_at
        else None
    )
    if seen and horizon.oldest_open > seen[1]:
        return str(int(seen[0]) - lookback - 1), None
    if pending and horizon.oldest_open > pending[1]:
        return str(int(pending[0]) - lookback - 1), seen
    previous = state.watermark.value if state.watermark else None
    return previous, pending or seen


def condition(
    window: Window, cursor: Position | None, watermark: Position | None, nulls: str
) -> sql.Composable:
    """Return the WHERE condition of an increment."""
    field = sql.Identifier(window.cursor.name)
    parts: list[sql.Composable] = []
    if watermark is not None:
        parts.append(after(window, watermark))
        if cursor is not None and window.xmin_since is not None:
            parts.append(
                sql.SQL("({} or {})").format(
                    after(window, cursor), changed_since(window.xmin_since)
                )
            )
    if window.upper is not None:
        parts.append(held_back(window))
    inside = sql.SQL(" and ").join(parts) if parts else sql.SQL("true")
    if nulls != "load":
        return sql.SQL("{} and {} is not null").format(inside, field)
    if not parts:
        return inside
    late = changed_since(window.xmin_since) if window.xmin_since else sql.SQL("true")
    return sql.SQL("({} or ({} is null and {}))").format(inside, field, late)


def held_back(window: Window) -> sql.Composable:
    """Return the condition that keeps an append-only log behind the horizon; else true."""
    if window.upper is None:
        return sql.SQL("true")
    return sql.SQL("{} <= {}").format(
        sql.Identifier(window.cursor.name), _literal(window.cursor, window.upper)
    )


def changed_since(xid: str) -> sql.Composable:
    """Return the condition for rows written by that transaction id or a later one."""
    return sql.SQL("age(xmin) <= age({}::xid)").format(sql.Literal(xid))


def after(window: Window, position: Position) -> sql.Composable:
    """Return the condition for rows behind a position."""
    field = sql.Identifier(window.cursor.name)
    value = _literal(window.cursor, position.value)
    if window.id is None or position.id is None:
        return sql.SQL("{} > {}").format(field, value)
    return sql.SQL("({}, {}) > ({}, {})").format(
        field, sql.Identifier(window.id.name), value, _literal(window.id, position.id)
    )


def within(source: Connection, window: Window, span: Span) -> sql.Composable:
    """Return the condition for rows of a span. Raises UsageError for what is no cursor value."""
    field = sql.Identifier(window.cursor.name)
    parts: list[sql.Composable] = [sql.SQL("{} is not null").format(field)]
    for option, sign, text in (("--since", ">=", span.since), ("--until", "<", span.until)):
        if text is not None:
            value = typed(source, window.cursor, text, option)
            parts.append(
                sql.SQL("{} {} {}").format(field, sql.SQL(sign), _literal(window.cursor, value))
            )
    return sql.SQL(" and ").join(parts)


def typed(source: Connection, column: Column, text: str, option: str) -> str:
    """Return PostgreSQL's own text of a value that a person typed. Raises UsageError."""
    try:
        row = source.execute(sql.SQL("select {}::text").format(_literal(column, text))).fetchone()
    except psycopg.DataError:
        example = "'2026-01-31 12:00'" if is_time(column) else "42" if is_number(column) else None
        raise UsageError(
            f"{option} {text!r} is no {column.type}, which {column.name} is",
            hint=f"write it such as {example}" if example else None,
        ) from None
    return str(row[0]) if row else text


def order(window: Window, nulls: str) -> sql.Composable:
    """Return the ORDER BY list. Rows without a cursor go first: they never advance the position."""
    columns = [sql.Identifier(column.name) for column in (window.cursor, window.id) if column]
    first = sql.SQL(" nulls first") if nulls == "load" else sql.SQL("")
    return sql.SQL(", ").join([columns[0] + first, *columns[1:]])


def _literal(column: Column, value: str) -> sql.Composable:
    return sql.SQL("{}::{}").format(sql.Literal(value), sql.SQL(column.type))
