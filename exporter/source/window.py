"""What a read by the cursor covers, and how far the stored position may advance.

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

from exporter.config import Cursor, SourceTable
from exporter.errors import DefinitionError, SourceError, UsageError
from exporter.source.catalog import missing_column
from exporter.source.snapshot import TRUE, Horizon, changed_since
from exporter.source.table import Column, Table
from exporter.state import Bound, Position, State
from exporter.wire import Connection

_TIMES = ("timestamp without time zone", "timestamp with time zone", "date")
_NUMBERS = ("smallint", "integer", "bigint")
# A session reports that its transaction began some microseconds after now() was taken.
_MARGIN = timedelta(milliseconds=100)
_RECENT = 1000  # rows: that fewer of the newest ones are dated ahead is taken for granted


class Span(NamedTuple):
    """Cursor values of a backfill, as they were typed: from ``since`` to before ``until``."""

    since: str | None
    until: str | None


class Seen(NamedTuple):
    """The greatest value of an integer cursor, and when it was seen: ISO text, UTC."""

    value: str
    at: str


def cursor_columns(declared: SourceTable, table: Table) -> tuple[Column, Column | None]:
    """Return the cursor's and the id's column. Raises SourceError for what cannot be one."""
    names = [column.name for column in table.columns]
    wanted = _declared(declared)
    for key, name in (("field", wanted.field), ("id_field", wanted.id_field)):
        if name is not None and name not in names:
            raise missing_column(declared, f"source.cursor.{key}", name, names)
    cursor = table.column(wanted.field)
    if not is_time(cursor) and not is_number(cursor):
        raise SourceError(
            f"{declared.where}: exporter.source.cursor.field {cursor.name} is {cursor.type}",
            hint="a cursor is a timestamp, a date or an integer that grows with every change",
        )
    lookback = wanted.lookback
    if lookback is not None and is_time(cursor) != isinstance(lookback, timedelta):
        example = "'5 minutes'" if is_time(cursor) else "a whole number such as 1000"
        raise DefinitionError(
            f"{declared.where}: exporter.source.cursor.lookback does not fit {cursor.name},"
            f" which is {cursor.type}; write {example}"
        )
    return cursor, table.column(wanted.id_field) if wanted.id_field else None


def _declared(declared: SourceTable) -> Cursor:
    if declared.cursor is None:
        raise DefinitionError(f"{declared.where}: exporter.source.cursor is required for this")
    return declared.cursor


def is_scanned(declared: SourceTable, table: Table) -> bool:
    """Tell whether a table with a cursor is looked at as a whole: it is small, or has no index."""
    below = declared.scan_below if declared.read == "auto" else 0
    index = _declared(declared).field in table.indexed
    return table.has_xmin and (table.size <= below or not index)


def advice(declared: SourceTable, cursor: Column) -> str:
    """Return what to do about rows that the cursor passes over."""
    if is_number(cursor):
        why = f"a change does not raise {cursor.name}, or numbers come out of their order"
        what = "a greater source.cursor.lookback"
    else:
        why = f"a change does not set {cursor.name}, or something sets it to an earlier time"
        what = "a trigger that sets it, a longer source.cursor.lookback"
    return f"{why}: {what}, or source.read: scan ({declared.where})"


def is_time(column: Column) -> bool:
    """Tell whether a cursor of this column is a time."""
    return _base(column) in _TIMES


def is_number(column: Column) -> bool:
    """Tell whether a cursor of this column is an integer."""
    return _base(column) in _NUMBERS


def _base(column: Column) -> str:
    head, _, rest = column.raw_type.partition("(")  # timestamp(3) without time zone
    return head + rest.partition(")")[2] if rest else head


class Window(NamedTuple):
    """One read by the cursor, in the order of ``columns``: the cursor, and the id if there is one.

    ``bound`` is the last value that no open transaction can precede. With ``append`` nothing
    beyond it is read. Rows at or before the stored cursor are read only from the transaction
    ``since`` on, where it is known. ``pending`` is to be stored: an integer that was seen.
    """

    declared: SourceTable
    cursor: Column
    id: Column | None
    append: bool
    bound: Bound | None = None
    since: str | None = None
    pending: Seen | None = None

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that order the rows."""
        return (self.cursor, self.id) if self.id else (self.cursor,)

    @property
    def field(self) -> sql.Identifier:
        """The cursor's name."""
        return sql.Identifier(self.cursor.name)

    def after(self, position: Position) -> sql.Composable:
        """Return the condition for rows behind a position."""
        value = _literal(self.cursor, position.value)
        if self.id is None or position.id is None:
            return sql.SQL("{} > {}").format(self.field, value)
        return sql.SQL("({}, {}) > ({}, {})").format(
            self.field, sql.Identifier(self.id.name), value, _literal(self.id, position.id)
        )

    def literal(self, value: str) -> sql.Composable:
        """Return a cursor value as SQL."""
        return _literal(self.cursor, value)

    @property
    def held_back(self) -> sql.Composable:
        """The condition that keeps an append-only log behind the horizon; else true."""
        if not self.append or self.bound is None:
            return TRUE
        return sql.SQL("{} <= {}").format(self.field, _literal(self.cursor, self.bound.value))

    def onward(self, cursor: Position | None, watermark: Position | None) -> sql.Composable:
        """Return the condition of an increment: what is new, and what may have come late."""
        parts: list[sql.Composable] = []
        if watermark is not None:
            parts.append(self.after(watermark))
            if cursor is not None and self.since is not None:
                parts.append(
                    sql.SQL("({} or {})").format(self.after(cursor), changed_since(self.since))
                )
        if self.append and self.bound is not None:
            parts.append(self.held_back)
        inside = sql.SQL(" and ").join(parts) if parts else TRUE
        if _declared(self.declared).nulls != "load":
            return sql.SQL("{} and {} is not null").format(inside, self.field)
        if not parts:
            return inside
        late = changed_since(self.since) if self.since else TRUE
        return sql.SQL("({} or ({} is null and {}))").format(inside, self.field, late)

    def within(self, source: Connection, span: Span) -> sql.Composable:
        """Return the condition for rows of a span. Raises UsageError for what is no cursor value.

        The server reads what was typed.
        """
        parts: list[sql.Composable] = [sql.SQL("{} is not null").format(self.field)]
        for option, sign, text in (("--since", ">=", span.since), ("--until", "<", span.until)):
            if text is not None:
                value = _literal(self.cursor, typed(source, self.cursor, text, option))
                parts.append(sql.SQL("{} {} {}").format(self.field, sql.SQL(sign), value))
        return sql.SQL(" and ").join(parts)

    @property
    def order(self) -> sql.Composable:
        """The ORDER BY clause. Rows without a cursor go first: they never advance the position."""
        first = sql.SQL(" nulls first" if _declared(self.declared).nulls == "load" else "")
        # By the table's columns: a bare name could be that of an expression that is selected.
        place = self.declared.schema, self.declared.table
        names = [sql.Identifier(*place, column.name) for column in self.columns]
        return sql.SQL(" order by ") + sql.SQL(", ").join([names[0] + first, *names[1:]])


def newest_number(source: Connection, declared: SourceTable) -> Seen | None:
    """Return the greatest value of an integer cursor; None for other cursors."""
    number = source.execute(
        "select from pg_attribute a join pg_class c on c.oid = a.attrelid"
        " join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname = %s and c.relname = %s and a.attname = %s and not a.attisdropped"
        " and a.atttypid in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)",
        (declared.schema, declared.table, _declared(declared).field),
    ).fetchone()
    if number is None:
        return None
    statement = sql.SQL("select max({})::text, clock_timestamp()::text from {}").format(
        sql.Identifier(_declared(declared).field), declared.name
    )
    row = source.execute(statement).fetchone()
    return Seen(*row) if row and row[0] is not None else None


def decide(
    source: Connection,
    table: Table,
    stored: State,
    horizon: Horizon,
    *,
    append: bool,
    seen: Seen | None,
    since: str | None,
) -> Window:
    """Return the window of this read. Time arithmetic is the server's, for full precision.

    ``seen`` is what ``newest_number`` gave before the horizon was observed.
    """
    declared = _declared(table.declared)
    cursor, id_column = cursor_columns(table.declared, table)
    pending = None
    if is_time(cursor):
        safe = _safe_time(source, table, cursor, horizon, append=append)
    else:
        back = declared.lookback if isinstance(declared.lookback, int) else 0
        safe, pending = _safe_number(stored, horizon, seen, back)
    return Window(
        table.declared,
        cursor,
        id_column,
        append,
        Bound(safe, cursor.raw_type) if safe is not None else None,
        since if table.has_xmin else None,
        pending,
    )


def _safe_time(
    source: Connection, table: Table, cursor: Column, horizon: Horizon, *, append: bool
) -> str | None:
    """Return the last time that no open transaction can precede with its stamp."""
    if horizon.oldest_open == "-infinity":
        return "-infinity"
    kind = _base(cursor)
    lookback = _declared(table.declared).lookback
    newest = None
    if isinstance(lookback, timedelta):
        # The stamps may be those of a pipeline that is hours behind the clock.
        newest = _newest(source, table, cursor)
    else:
        # An application's clock on a network with NTP is seconds off, its transactions last
        # minutes at most. An append-only table cannot take a row twice: nothing is looked at
        # again, and the rows would only come later.
        lookback = timedelta(0) if append else timedelta(minutes=5)
    digits = cursor.typmod if cursor.typmod >= 0 else 6
    values = {
        "open": horizon.oldest_open,
        "clock": horizon.clock,
        "back": lookback + _MARGIN + timedelta(seconds=10**-digits),  # now() may be rounded down
        "newest": newest,
    }
    if kind == "timestamp with time zone":
        statement = "least(%(open)s::timestamptz, %(newest)s::timestamptz) - %(back)s"
    elif kind == "date":
        # Of a day that is not over, rows may come with any id; somewhere it is still yesterday.
        statement = "(least(%(open)s::timestamptz, %(newest)s::timestamptz) - %(back)s)::date - 2"
    else:
        values["recent"] = _recent(source, table, cursor, horizon, 1 if append else _RECENT)
        statement = (
            "least(greatest(least(%(open)s::timestamptz::timestamp, %(recent)s::timestamp"
            " - (%(clock)s::timestamptz - %(open)s::timestamptz)),"
            " %(open)s::timestamptz::timestamp - interval '12 hours'), %(newest)s::timestamp)"
            " - %(back)s"
        )
    row = source.execute(f"select ({statement})::text", values).fetchone()
    return str(row[0]) if row and row[0] is not None else None


def _newest(source: Connection, table: Table, cursor: Column) -> str | None:
    """Return the newest stamp; None where there is no row."""
    name = sql.Identifier(cursor.name)
    row = source.execute(
        sql.SQL("select max({})::text from {} where isfinite({})").format(
            name, table.declared.name, name
        )
    ).fetchone()
    return row[0] if row else None


def _recent(source: Connection, table: Table, cursor: Column, horizon: Horizon, place: int) -> str:
    """Return a local time that is not later than the source's: the column may be of any zone.

    West of UTC its stamps run behind our clock. By how much, its newest rows tell; some of them
    may be dated ahead, so it is not the newest that is taken. Where there are few rows, or no
    index that gives the newest at once, it is twelve hours before, which covers every zone: so few
    rows, or a whole table that is read in any case, cost nothing to look at again.
    """
    clock = sql.SQL("{}::timestamptz::timestamp").format(sql.Literal(horizon.clock))
    before = sql.SQL("({} - interval '12 hours')").format(clock)
    if cursor.name in table.indexed or place == 1:
        row = source.execute(
            sql.SQL(
                # By the table's column: a bare name would be that of the text that is selected.
                "select {0}::text from {1} t where {0} <= {2} and {0} > {3}"
                " order by t.{0} desc offset {4} limit 1"
            ).format(sql.Identifier(cursor.name), table.declared.name, clock, before, place - 1)
        ).fetchone()
        if row:
            return str(row[0])
    row = source.execute(sql.SQL("select {}::text").format(before)).fetchone()
    assert row is not None
    return str(row[0])


def _safe_number(
    stored: State, horizon: Horizon, seen: Seen | None, lookback: int
) -> tuple[str | None, Seen | None]:
    """Return the safe value, and the observation to keep.

    A sequence hands out numbers in order, so whatever is below a number that was seen at a time
    belongs to a transaction that began before that time. It is final when those are all over.
    """
    pending = (
        Seen(stored.pending_value, stored.pending_at)
        if stored.pending_value and stored.pending_at
        else None
    )
    if seen and horizon.oldest_open > seen.at:
        return str(int(seen.value) - lookback - 1), None
    if pending and horizon.oldest_open > pending.at:
        return str(int(pending.value) - lookback - 1), seen
    previous = stored.watermark.value if stored.watermark else None
    return previous, pending or seen


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


def _literal(column: Column, value: str) -> sql.Composable:
    return sql.SQL("{}::{}").format(sql.Literal(value), sql.SQL(column.type))
