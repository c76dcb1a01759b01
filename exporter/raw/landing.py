"""Rows into the raw table: by COPY, or through staging by upsert."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence

import psycopg
from psycopg import sql

from exporter.errors import RowError
from exporter.raw.statements import STAGING, copy_statement, landing
from exporter.raw.table import RawTable
from exporter.source import Column, Lands
from exporter.wire import AHEAD, Block, Connection, CopyIn, field, find_operators, pour

_ORDINAL = sql.Identifier("_exporter_row")
_SAVEPOINT = "savepoint staged"  # on an error staging stays
# The key's index has to be visited for every row in any case.
_BY_INDEX = (
    "set local enable_hashjoin = off; set local enable_mergejoin = off;"
    " set local enable_seqscan = off"
)


def copy_direct(destination: Connection, raw: RawTable, blocks: Iterable[Block]) -> tuple[int, int]:
    """Copy binary blocks that end in the stamp into the raw table; return rows and bytes."""
    return pour(destination, copy_statement(raw), blocks)


class Staging:
    """A temporary table for the batches of one session. Its rows go with each transaction."""

    def __init__(self, destination: Connection, raw: RawTable, stream: Sequence[Column]) -> None:
        self._destination = destination
        self._raw = raw
        self._stream = stream
        self._made = False
        self._late = True  # some row of the batch may not be beyond the stored position
        self._sent: deque[tuple[int, bytes | str]] = deque()  # rows before it; a block or a key

    def _make(self) -> None:
        if self._made:
            return
        raw = self._raw
        keys = raw.target.conflict_columns
        find_operators(self._destination, [c.raw_type for c in raw.columns if c.name in keys])
        hidden = [
            sql.SQL("null::{} as {}").format(sql.SQL(column.raw_type), sql.Identifier(column.name))
            for column in self._stream[len(raw.columns) :]
        ]
        names = [sql.Identifier(column.name) for column in raw.columns]
        self._destination.execute("drop table if exists pg_temp._exporter_staging")
        self._destination.execute(
            sql.SQL(
                "create temp table {} on commit delete rows as select {} from {} with no data"
            ).format(STAGING, sql.SQL(", ").join([*names, *hidden]), raw.name)
        )
        self._made = True

    def fill(self, blocks: Iterable[Block], batch: int) -> tuple[int, int]:
        """Copy a batch of text blocks; return rows and bytes. Raises RowError."""
        self._make()
        self._sent.clear()
        kept = 0
        names = [sql.Identifier(column.name) for column in self._stream]
        copy = CopyIn(
            self._destination,
            sql.SQL("copy {} ({}) from stdin").format(STAGING, sql.SQL(", ").join(names)),
        )
        rows = size = 0
        try:
            try:
                for block in blocks:
                    if not rows:  # those beyond the position come after those that are not
                        self._late = field(_first_row(block), -1) != "t"
                    rows += block.rows
                    size += len(block.data)
                    sent = block.data if isinstance(block.data, bytes) else self._key_of(block.last)
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
        return rows, size

    def apply(
        self, lands: Lands, stamp: str, batch: int, order: Sequence[Column]
    ) -> tuple[int, int]:
        """Land the staged rows; return the rows written and those gone. Raises RowError."""
        destination, raw = self._destination, self._raw
        whole = lands is Lands.WHOLE
        if whole and raw.key:
            destination.execute(sql.SQL("analyze {}").format(STAGING))
        destination.execute(_SAVEPOINT if whole or raw.in_shards else f"{_SAVEPOINT}; {_BY_INDEX}")
        try:
            counts = [
                destination.execute(statement).rowcount
                for statement in landing(raw, lands, stamp, order, late=self._late)
            ]
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            destination.execute("rollback to staged")
            raise self._apply_error(error, batch) from None
        gone = counts.pop(0) if whole else 0
        return sum(counts), gone

    def _place(self, column: Column) -> int:
        return [one.name for one in self._stream].index(column.name)

    def _key_of(self, row: bytes) -> str:
        names = self._raw.target.conflict_columns or [self._stream[0].name]
        columns = [column for column in self._stream if column.name in names]
        return ", ".join(f"{c.name}={field(row, self._place(c))}" for c in columns)

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
        names = self._raw.target.conflict_columns or (self._stream[0].name,)
        with destination.transaction(force_rollback=True):
            destination.execute(
                sql.SQL(
                    "create temp table _exporter_suspects as select *, row_number() over () as {}"
                    " from {}"
                ).format(_ORDINAL, STAGING)
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
        names = sql.SQL(", ").join(sql.Identifier(column.name) for column in self._stream)
        try:
            with destination.transaction(force_rollback=True):
                destination.execute(sql.SQL("delete from {}").format(STAGING))
                destination.execute(
                    sql.SQL(
                        "insert into {} select {} from _exporter_suspects"
                        " where {} between %s and %s"
                    ).format(STAGING, names, _ORDINAL),
                    (low, high),
                )
                destination.execute(landing(self._raw, Lands.ANY, "2000-01-01", [])[0])
        except psycopg.Error:
            return True
        return False


def row_error(
    raw: RawTable, error: psycopg.Error, batch: int, key: str, column: str | None
) -> RowError:
    """Return the error for a refused row. PostgreSQL's message loses the value that it quotes."""
    message = re.sub(r':? "[^"]*"$', "", error.diag.message_primary or "refused")
    column = error.diag.column_name or column
    what = f", column {column}" if column else ""
    return RowError(
        f"{raw.target.key}: batch {batch}, row {key}{what}: {message}",
        hint="correct the row at the source or the table at the destination, then run "
        f"exporter load {raw.target.key} again: it resumes before this batch",
    )


def _first_row(block: Block) -> bytes:
    if isinstance(block.data, memoryview):
        return block.last
    return block.data[: block.data.index(b"\n") + 1]
