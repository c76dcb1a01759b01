"""Rows into the raw table: by COPY, or through staging by upsert."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

import psycopg
from psycopg import sql

from exporter.errors import RowError
from exporter.raw.table import DELETED, PAST, STAMP, Raw
from exporter.source.catalog import Column
from exporter.wire.connection import Connection
from exporter.wire.copy import AHEAD, Block, CopyIn, field, pour

_STAGING = sql.Identifier("_exporter_staging")
_ORDINAL = sql.Identifier("_exporter_row")
_PAST = sql.Identifier(PAST.name)
_COMMA = sql.SQL(", ")
_SAVEPOINT = "savepoint staged"  # on an error staging stays
# The key's index has to be visited for every row in any case.
_BY_INDEX = (
    "set local enable_hashjoin = off; set local enable_mergejoin = off;"
    " set local enable_seqscan = off"
)


def copy_direct(destination: Connection, raw: Raw, blocks: Iterable[Block]) -> tuple[int, int]:
    """Copy binary blocks that end in the stamp into the raw table; return rows and bytes."""
    return pour(destination, copy_statement(raw), blocks)


def copy_statement(raw: Raw) -> sql.Composed:
    """Return the statement for rows that come in binary, with their stamp, into raw itself."""
    names = [sql.Identifier(column.name) for column in raw.columns]
    return sql.SQL("copy {} ({}) from stdin (format binary)").format(
        raw.name, _COMMA.join([*names, sql.Identifier(STAMP)])
    )


def statements(
    raw: Raw, stamp: str, order: Iterable[Column], *, onward: bool, late: bool = True
) -> list[sql.Composed]:
    """Return the statements for staged rows.

    ``onward``: rows beyond the stored position have not been landed as they are now. ``late``: of
    these rows, some may not be beyond it.
    """
    if onward and raw.key and raw.unique_at_source and not raw.in_shards:
        return [_replace(raw, stamp, order), *([_apply(raw, stamp, [], late=True)] if late else [])]
    return [_apply(raw, stamp, list(order))]


class Staging:
    """A temporary table for the batches of one session. Its rows go with each transaction."""

    def __init__(self, destination: Connection, raw: Raw) -> None:
        self._destination = destination
        self._raw = raw
        self._made = False
        self._late = True  # some row of the batch may not be beyond the stored position
        self._sent: deque[tuple[int, bytes | str]] = deque()  # rows before it; a block or a key

    def _make(self) -> None:
        if self._made:
            return
        raw = self._raw
        hidden = [
            sql.SQL("null::{} as {}").format(sql.SQL(column.raw_type), sql.Identifier(column.name))
            for column in raw.stream[len(raw.columns) :]
        ]
        names = [sql.Identifier(column.name) for column in raw.columns]
        self._destination.execute("drop table if exists pg_temp._exporter_staging")
        self._destination.execute(
            sql.SQL(
                "create temp table {} on commit delete rows as select {} from {} with no data"
            ).format(_STAGING, sql.SQL(", ").join([*names, *hidden]), raw.name)
        )
        self._made = True

    def fill(self, blocks: Iterable[Block], batch: int) -> tuple[int, int, bytes]:
        """Copy a batch of text blocks; return rows, bytes and the last row. Raises RowError."""
        self._make()
        self._sent.clear()
        kept = 0
        names = [sql.Identifier(column.name) for column in self._raw.stream]
        copy = CopyIn(
            self._destination,
            sql.SQL("copy {} ({}) from stdin").format(_STAGING, sql.SQL(", ").join(names)),
        )
        rows = size = 0
        last = b""
        try:
            try:
                for block in blocks:
                    if not rows:  # those beyond the position come after those that are not
                        self._late = field(_first_row(block), -1) != "t"
                    rows += block.rows
                    size += len(block.data)
                    last = block.last
                    sent = block.data if isinstance(block.data, bytes) else self._key_of(last)
                    self._sent.append((rows - block.rows, sent))
                    kept += len(self._sent[-1][1])
                    while kept > AHEAD:  # the server is not that far behind with its complaint
                        kept -= len(self._sent.popleft()[1])
                    copy.write(block.data)
                    del block
            except BaseException:
                copy.abandon()
                raise
            copy.finish()
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            raise self._copy_error(error, batch) from None
        return rows, size, last

    def apply(self, stamp: str, batch: int, order: Iterable[Column], *, onward: bool) -> int:
        """Insert the staged rows, or replace what differs; return the rows written."""
        destination = self._destination
        destination.execute(_SAVEPOINT if self._raw.in_shards else f"{_SAVEPOINT}; {_BY_INDEX}")
        try:
            return sum(
                destination.execute(one).rowcount
                for one in statements(self._raw, stamp, order, onward=onward, late=self._late)
            )
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            destination.execute("rollback to staged")
            raise self._apply_error(error, batch) from None

    def _key_of(self, row: bytes) -> str:
        names = self._raw.definition.destination.conflict_columns or [self._raw.stream[0].name]
        columns = [column for column in self._raw.stream if column.name in names]
        return ", ".join(f"{c.name}={field(row, self._raw.place(c))}" for c in columns)

    def _copy_error(self, error: psycopg.Error, batch: int) -> RowError:
        found = re.search(r"line (\d+)(?:, column ([^:\n]+))?", error.diag.context or "")
        line = int(found[1]) if found else 0
        before, block = max(
            ((before, block) for before, block in self._sent if before < line),
            default=(0, "?"),
            key=lambda one: one[0],
        )
        if isinstance(block, bytes):
            block = self._key_of(block.split(b"\n")[line - before - 1])
        return row_error(self._raw, error, batch, block, found[2] if found else None)

    def _apply_error(self, error: psycopg.Error, batch: int) -> RowError:
        """Find the row by halving what is staged: the message does not name it by its key."""
        destination = self._destination
        names = self._raw.definition.destination.conflict_columns or (self._raw.stream[0].name,)
        with destination.transaction(force_rollback=True):
            destination.execute(
                sql.SQL(
                    "create temp table _exporter_suspects as select *, row_number() over () as {}"
                    " from {}"
                ).format(_ORDINAL, _STAGING)
            )
            count = destination.execute("select count(*) from _exporter_suspects").fetchone()
            low, high = 1, int(count[0]) if count else 1
            while low < high:
                middle = (low + high) // 2
                if self._fails(low, middle):
                    high = middle
                else:
                    low = middle + 1
            row = destination.execute(
                sql.SQL("select concat_ws(', ', {}) from _exporter_suspects where {} = %s").format(
                    sql.SQL(", ").join(
                        sql.SQL("{} || '=' || {}::text").format(sql.Literal(n), sql.Identifier(n))
                        for n in names
                    ),
                    _ORDINAL,
                ),
                (low,),
            ).fetchone()
        return row_error(self._raw, error, batch, str(row[0]) if row else "?", None)

    def _fails(self, low: int, high: int) -> bool:
        destination = self._destination
        names = sql.SQL(", ").join(sql.Identifier(column.name) for column in self._raw.stream)
        try:
            with destination.transaction(force_rollback=True):
                destination.execute(sql.SQL("delete from {}").format(_STAGING))
                destination.execute(
                    sql.SQL(
                        "insert into {} select {} from _exporter_suspects"
                        " where {} between %s and %s"
                    ).format(_STAGING, names, _ORDINAL),
                    (low, high),
                )
                destination.execute(_apply(self._raw, "2000-01-01", []))
        except psycopg.Error:
            return True
        return False


def row_error(raw: Raw, error: psycopg.Error, batch: int, key: str, column: str | None) -> RowError:
    """Return the error for a refused row. PostgreSQL's message loses the value that it quotes."""
    message = re.sub(r':? "[^"]*"$', "", error.diag.message_primary or "refused")
    column = error.diag.column_name or column
    what = f", column {column}" if column else ""
    return RowError(
        f"{raw.definition.key}: batch {batch}, row {key}{what}: {message}",
        hint="correct the row at the source or the table at the destination, then run "
        f"exporter load {raw.definition.key} again: it resumes before this batch",
    )


def _first_row(block: Block) -> bytes:
    if isinstance(block.data, memoryview):
        return block.last
    return block.data[: block.data.index(b"\n") + 1]


def replace_all(
    destination: Connection, raw: Raw, stamp: str, order: Iterable[Column]
) -> tuple[int, int]:
    """Make the raw table equal to what is staged; return the rows written and those gone."""
    if raw.key:
        destination.execute(sql.SQL("analyze {}").format(_STAGING))
    away, new = replacements(raw, stamp, order)
    deleted = destination.execute(away).rowcount
    return destination.execute(new).rowcount, deleted


def replacements(raw: Raw, stamp: str, order: Iterable[Column]) -> list[sql.Composed]:
    """Return the statements that make raw equal to what is staged: what is gone, what is new."""
    if not raw.key:
        away = sql.SQL("delete from {}").format(raw.name)
    else:
        there = (
            sql.SQL("({}) not in (select {} from {})").format(*[_COMMA.join(raw.key)] * 2, _STAGING)
            if raw.in_shards
            else sql.SQL("not exists (select from {} s where {})").format(
                _STAGING, _same_key(raw, "s", "r")
            )
        )
        away = gone(raw, stamp) + sql.SQL(" where {}").format(there) + living(raw)
    return [away, _apply(raw, stamp, list(order))]


def gone(raw: Raw, stamp: str) -> sql.Composed:
    """Return the statement for rows ``r`` that are gone at the source, without its condition.

    They are marked, so that models see it, or removed.
    """
    if raw.definition.destination.deletes != "mark":
        return sql.SQL("delete from {} r").format(raw.name)
    names = [DELETED, STAMP] if raw.stamped else [DELETED]
    return sql.SQL("update {} r set {}").format(
        raw.name,
        _COMMA.join(
            sql.SQL("{} = {}::timestamptz").format(sql.Identifier(name), sql.Literal(stamp))
            for name in names
        ),
    )


def living(raw: Raw) -> sql.Composable:
    """Return the condition that leaves out rows ``r`` that are marked already."""
    if raw.definition.destination.deletes != "mark":
        return sql.SQL("")
    return sql.SQL(" and r.{} is null").format(sql.Identifier(DELETED))


def _same_key(raw: Raw, left: str, right: str) -> sql.Composable:
    return sql.SQL(" and ").join(
        sql.SQL("{}.{} = {}.{}").format(sql.SQL(left), key, sql.SQL(right), key) for key in raw.key
    )


def _insert(raw: Raw, stamp: str) -> sql.Composed:
    names = [sql.Identifier(column.name) for column in raw.columns]
    return sql.SQL("insert into {} as d ({}) select {}{} from ").format(
        raw.name,
        _COMMA.join(_target(raw)),
        _COMMA.join(sql.SQL("s.") + name for name in names),
        sql.SQL(", {}::timestamptz").format(sql.Literal(stamp)) if raw.stamped else sql.SQL(""),
    )


def _update(raw: Raw) -> sql.Composed:
    # What is staged is there at the source: its mark, which no staged row has, goes.
    target = [*_target(raw), sql.Identifier(DELETED)] if raw.marked else _target(raw)
    return sql.SQL(" on conflict ({}) do update set ({}) = row({})").format(
        _COMMA.join(raw.key),
        _COMMA.join(target),
        _COMMA.join(sql.SQL("excluded.") + name for name in target),
    )


def _target(raw: Raw) -> list[sql.Identifier]:
    names = [sql.Identifier(column.name) for column in raw.columns]
    return [*names, sql.Identifier(STAMP)] if raw.stamped else names


def _differs(raw: Raw, new: str, old: str) -> sql.Composed:
    """Return the condition for two rows that differ. ``*<>`` compares images: any type has them."""
    rows = [
        sql.SQL("row({})::record").format(
            _COMMA.join(sql.SQL(f"{side}.") + sql.Identifier(c.name) for c in raw.columns)
        )
        for side in (new, old)
    ]
    # Citus takes a comparison of rows apart; two rows that differ are not spelled alike, either.
    form = "({0})::text is distinct from ({1})::text" if raw.in_shards else "{0} *<> {1}"
    differs = sql.SQL(form).format(*rows)
    if not raw.marked:
        return differs
    return sql.SQL("({} or {}.{} is not null)").format(
        differs, sql.SQL(old), sql.Identifier(DELETED)
    )


def _replace(raw: Raw, stamp: str, order: Iterable[Column]) -> sql.Composed:
    """Return the statement for staged rows that raw does not have as they are: one look-up each."""
    return (
        _insert(raw, stamp)
        + sql.SQL("{} s where s.{}").format(_STAGING, _PAST)
        + _update(raw)
        + sql.SQL(" where {}{}").format(_moved(raw, order), _differs(raw, "excluded", "d"))
    )


def _moved(raw: Raw, order: Iterable[Column]) -> sql.Composable:
    """Return what tells of most rows by the cursor alone, at less cost, that they differ."""
    cursor = next(iter(order))
    if not raw.exact or cursor not in raw.columns:
        return sql.SQL("")
    name = sql.Identifier(cursor.name)
    return sql.SQL("excluded.{} is distinct from d.{} or ").format(name, name)


def _apply(raw: Raw, stamp: str, order: list[Column], *, late: bool = False) -> sql.Composed:
    """Return the statement for staged rows of which most may be in raw already.

    ``late``: only those that are not beyond the stored position.
    """
    insert = _insert(raw, stamp)
    if not raw.key:
        return insert + sql.SQL("{} s").format(_STAGING)
    staged: sql.Composable = _STAGING
    guard: sql.Composable = sql.SQL("")
    if not raw.unique_at_source and order:
        newest = _COMMA.join(
            [*raw.key, *(sql.Identifier(c.name) + sql.SQL(" desc nulls last") for c in order)]
        )
        staged = sql.SQL("(select distinct on ({}) * from {} order by {})").format(
            _COMMA.join(raw.key), _STAGING, newest
        )
        stored = {column.name for column in raw.columns}
        kept = [sql.Identifier(column.name) for column in order if column.name in stored]
        if kept:
            guard = sql.SQL(" and (o.{} is null or ({}) >= ({}))").format(
                kept[0],
                _COMMA.join(sql.SQL("s.") + name for name in kept),
                _COMMA.join(sql.SQL("o.") + name for name in kept),
            )
    stored_rows: sql.Composable = raw.name
    if raw.in_shards:  # only the rows that are asked for come to the node that has the staged ones
        key = _COMMA.join(raw.key)
        stored_rows = sql.SQL("(select * from {} where ({}) in (select {} from {}))").format(
            raw.name, key, key, _STAGING
        )
    # ON CONFLICT DO UPDATE … WHERE locks, and so writes, every row that it then leaves alone: the
    # join keeps unchanged rows away from it.
    return (
        insert
        + sql.SQL(
            "{staged} s left join {raw} o on {same} where {late}(o.{first} is null"
            " or ({differs}{guard}))"
        ).format(
            staged=staged,
            raw=stored_rows,
            same=_same_key(raw, "s", "o"),
            late=sql.SQL("s.{} is not true and ").format(_PAST) if late else sql.SQL(""),
            first=raw.key[0],
            differs=_differs(raw, "s", "o"),
            guard=guard,
        )
        + _update(raw)
    )
