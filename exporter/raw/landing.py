"""Rows into the raw table: by COPY, or through staging by upsert."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import psycopg
from psycopg import sql

from exporter.errors import RowError
from exporter.raw.history import refuse_disorder
from exporter.raw.keys import keep_newest, prove
from exporter.raw.narrow import refuse_rounded
from exporter.raw.refused import copied_to, find_refused, key_text, told
from exporter.raw.statements import PLACE, STAGING, landing
from exporter.raw.table import RawTable
from exporter.source import Column, Lands
from exporter.wire import AHEAD, Block, Connection, field, find_operators, pour

_SAVEPOINT = "savepoint staged"  # on an error staging stays
# The key's index has to be visited for every row in any case.
BY_INDEX = (
    "set local enable_hashjoin = off; set local enable_mergejoin = off;"
    " set local enable_seqscan = off"
)


class Staging:
    """A temporary table for the batches of one session. Its rows go with each transaction.

    With ``versions``, several rows of a batch may have one key: the newest counts.
    """

    def __init__(
        self,
        destination: Connection,
        raw: RawTable,
        stream: Sequence[Column],
        *,
        versions: bool = False,
    ) -> None:
        self._destination = destination
        self._raw = raw
        self._stream = stream
        names = raw.target.conflict_columns or (stream[0].name,)
        self._key = {one.name: place for place, one in enumerate(stream) if one.name in names}
        self._versions = versions
        self._made = False
        self._late = True  # some row of the batch may not be beyond the stored position
        self._sent: deque[tuple[int, bytes | str]] = deque()  # rows before it; a block or a key

    def _make(self) -> None:
        raw = self._raw
        keys = raw.target.conflict_columns
        find_operators(self._destination, [c.raw_type for c in raw.columns if c.name in keys])
        in_raw = [
            _typed(column) if column.name in raw.narrow else sql.Identifier(column.name)
            for column in raw.columns
        ]
        names = {column.name for column in raw.columns}
        not_in_raw = [_typed(column) for column in self._stream if column.name not in names]
        self._destination.execute("drop table if exists pg_temp._exporter_staging")
        self._destination.execute(
            sql.SQL(
                "create temp table {} on commit delete rows as select {} from {} with no data"
            ).format(STAGING, sql.SQL(", ").join([*in_raw, *not_in_raw]), raw.name)
        )
        if self._versions:  # where rows lie does not tell in what order they came
            self._destination.execute(
                sql.SQL("alter table {} add {} bigint generated always as identity").format(
                    STAGING, PLACE
                )
            )
        self._made = True

    def fill(self, blocks: Iterable[Block], batch: int) -> tuple[int, int]:
        """Copy a batch of text blocks; return rows and bytes. Raises RowError."""
        if not self._made:
            self._make()
        names = [sql.Identifier(column.name) for column in self._stream]
        statement = sql.SQL("copy {} ({}) from stdin").format(STAGING, sql.SQL(", ").join(names))
        try:
            return pour(self._destination, statement, self._noted(blocks))
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            raise self._copy_error(error, batch) from None

    def _noted(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Pass blocks on, and keep what it takes to name a row that the server refuses."""
        self._sent.clear()
        rows = kept = 0
        for block in blocks:
            if not rows:  # those beyond the position come after those that are not
                self._late = field(_first_row(block), -1) != "t"
            sent = block.data if isinstance(block.data, bytes) else self._key_of(block.last)
            self._sent.append((rows, sent))
            rows += block.rows
            kept += len(sent)
            while kept > AHEAD:  # the server is not that far behind with its complaint
                kept -= len(self._sent.popleft()[1])
            yield block
            del block

    def apply(
        self,
        lands: Lands,
        stamp: str,
        batch: int,
        order: Sequence[Column],
        *,
        since: str | None = None,
    ) -> tuple[int, int]:
        """Land the staged rows; return the rows written and those gone.

        ``since`` is the first stamp of this load. Raises RowError, and SourceError where rows share
        a key.
        """
        destination, raw = self._destination, self._raw
        if self._versions:
            keep_newest(destination, raw, order)
        prove(destination, raw, order, since)
        whole = lands is Lands.WHOLE
        if whole and raw.target.is_history:
            refuse_disorder(destination, raw)
        if whole and raw.key:
            destination.execute(sql.SQL("analyze {}").format(STAGING))
        destination.execute(_SAVEPOINT if whole or raw.on_citus else f"{_SAVEPOINT}; {BY_INDEX}")
        try:
            refuse_rounded(destination, raw, batch)
            counts = [
                destination.execute(statement).rowcount
                # Without an order, any of them may be beyond the position or not.
                for statement in landing(raw, lands, stamp, order, late=self._late or not order)
            ]
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            destination.execute("rollback to staged")
            raise self._apply_error(error, batch) from None
        gone = counts.pop(0) if whole else 0
        return sum(counts), gone

    def _key_of(self, row: bytes) -> str:
        return ", ".join(f"{name}={field(row, place)}" for name, place in self._key.items())

    def _copy_error(self, error: psycopg.Error, batch: int) -> RowError:
        line, column = copied_to(error)
        earlier = (one for one in reversed(self._sent) if one[0] < line)
        before, block = next(earlier, (0, "?"))
        if isinstance(block, bytes):
            block = self._key_of(block.split(b"\n")[line - before - 1])
        return row_error(self._raw, error, batch, block, column)

    def _apply_error(self, error: psycopg.Error, batch: int) -> RowError:
        statement = landing(self._raw, Lands.ANY, "2000-01-01", [])[0]
        row = find_refused(
            self._destination,
            STAGING,
            key_text({name: sql.Identifier(name) for name in self._key}),
            lambda: self._destination.execute(statement),
        )
        return row_error(self._raw, error, batch, row, None)


def row_error(
    raw: RawTable, error: psycopg.Error, batch: int, key: str, column: str | None
) -> RowError:
    """Return the error for a refused row."""
    column = error.diag.column_name or column
    what = f", column {column}" if column else ""
    return RowError(
        f"{raw.target.key}: batch {batch}, row {key}{what}: {told(error)}",
        hint="correct the row at the source or the table at the destination, then run "
        f"exporter load {raw.target.key} again: it resumes before this batch",
    )


def _typed(column: Column) -> sql.Composed:
    """Return a column for the staging table that has the source's type."""
    return sql.SQL("null::{} as {}").format(sql.SQL(column.raw_type), sql.Identifier(column.name))


def _first_row(block: Block) -> bytes:
    if isinstance(block.data, memoryview):
        return block.last
    return block.data[: block.data.index(b"\n") + 1]
