"""Rows into the raw table: by COPY, or through staging by upsert."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

import psycopg
from psycopg import sql

from exporter.catalog import Column
from exporter.connection import Connection
from exporter.copy import AHEAD, Block, CopyIn, field
from exporter.errors import RowError
from exporter.raw_table import STAMP, Raw

_STAGING = sql.Identifier("_exporter_staging")
_ORDINAL = sql.Identifier("_exporter_row")


def copy_direct(destination: Connection, raw: Raw, blocks: Iterable[Block]) -> tuple[int, int]:
    """Copy binary blocks that end in the stamp into the raw table; return rows and bytes."""
    names = [sql.Identifier(column.name) for column in raw.columns]
    statement = sql.SQL("copy {} ({}) from stdin (format binary)").format(
        raw.name, sql.SQL(", ").join([*names, sql.Identifier(STAMP)])
    )
    copy = CopyIn(destination, statement)
    size = 0
    try:
        for block in blocks:
            size += len(block.data)
            copy.write(block.data)
            del block  # before the next is asked for: a row may be large
    except BaseException:
        copy.abandon()
        raise
    return copy.finish(), size


class Staging:
    """A temporary table for the batches of one session. Its rows go with each transaction."""

    def __init__(self, destination: Connection, raw: Raw) -> None:
        self._destination = destination
        self._raw = raw
        self._made = False
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

    def apply(self, stamp: str, batch: int, order: Iterable[Column]) -> int:
        """Insert the staged rows, or replace what differs; return the rows written."""
        statement = _apply(self._raw, stamp, list(order))
        try:
            with self._destination.transaction():  # a savepoint: on an error staging stays
                self._destination.execute(
                    "set local enable_hashjoin = off; set local enable_mergejoin = off;"
                    " set local enable_seqscan = off"
                )  # the key's index has to be visited for every row in any case
                return int(self._destination.execute(statement).rowcount)
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            raise self._apply_error(error, batch) from None

    def _key_of(self, row: bytes) -> str:
        names = self._raw.definition.conflict_columns or [self._raw.stream[0].name]
        columns = [column for column in self._raw.stream if column.name in names]
        return ", ".join(f"{c.name}={field(row, self._raw.index(c))}" for c in columns)

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
        names = self._raw.definition.conflict_columns or (self._raw.stream[0].name,)
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


def replace_all(destination: Connection, raw: Raw, stamp: str, order: Iterable[Column]) -> int:
    """Make the raw table equal to what is staged; return the rows inserted and changed."""
    if not raw.key:
        destination.execute(sql.SQL("delete from {}").format(raw.name))
    else:
        destination.execute(sql.SQL("analyze {}").format(_STAGING))
        destination.execute(
            sql.SQL("delete from {} r where not exists (select from {} s where {})").format(
                raw.name, _STAGING, _same_key(raw, "s", "r")
            )
        )
    return int(destination.execute(_apply(raw, stamp, list(order))).rowcount)


def _same_key(raw: Raw, left: str, right: str) -> sql.Composable:
    return sql.SQL(" and ").join(
        sql.SQL("{}.{} = {}.{}").format(sql.SQL(left), key, sql.SQL(right), key) for key in raw.key
    )


def _apply(raw: Raw, stamp: str, order: list[Column]) -> sql.Composed:
    names = [sql.Identifier(column.name) for column in raw.columns]
    target = [*names, sql.Identifier(STAMP)] if raw.stamped else names
    new = sql.SQL(", ").join(sql.SQL("s.") + name for name in names)
    comma = sql.SQL(", ")
    insert = sql.SQL("insert into {} ({}) select {}{} from ").format(
        raw.name,
        comma.join(target),
        new,
        sql.SQL(", {}::timestamptz").format(sql.Literal(stamp)) if raw.stamped else sql.SQL(""),
    )
    if not raw.key:
        return insert + sql.SQL("{} s").format(_STAGING)
    staged: sql.Composable = _STAGING
    guard: sql.Composable = sql.SQL("")
    if not raw.unique_at_source and order:
        newest = comma.join(
            [*raw.key, *(sql.Identifier(c.name) + sql.SQL(" desc nulls last") for c in order)]
        )
        staged = sql.SQL("(select distinct on ({}) * from {} order by {})").format(
            comma.join(raw.key), _STAGING, newest
        )
        stored = {column.name for column in raw.columns}
        kept = [sql.Identifier(column.name) for column in order if column.name in stored]
        if kept:
            guard = sql.SQL(" and (d.{} is null or ({}) >= ({}))").format(
                kept[0],
                comma.join(sql.SQL("s.") + name for name in kept),
                comma.join(sql.SQL("d.") + name for name in kept),
            )
    # ON CONFLICT DO UPDATE … WHERE locks, and so writes, every row that it then leaves alone: the
    # join keeps unchanged rows away from it. *<> compares images, so it serves every type.
    return insert + sql.SQL(
        "{staged} s left join {raw} d on {same} where d.{first} is null"
        " or (row({new})::record *<> row({old})::record{guard})"
        " on conflict ({key}) do update set ({target}) = row({excluded})"
    ).format(
        staged=staged,
        raw=raw.name,
        same=_same_key(raw, "s", "d"),
        first=raw.key[0],
        new=new,
        old=comma.join(sql.SQL("d.") + name for name in names),
        guard=guard,
        key=comma.join(raw.key),
        target=comma.join(target),
        excluded=comma.join(sql.SQL("excluded.") + name for name in target),
    )
