"""The rows of queries, landed batch by batch, each in one transaction with its position."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from psycopg import sql

from exporter.config.definition import Definition
from exporter.raw import landing
from exporter.raw.table import Raw
from exporter.source import window
from exporter.state import position as state
from exporter.state.position import State
from exporter.state.runs import Result, record
from exporter.terminal.console import Progress, Say
from exporter.wire.connection import Connection
from exporter.wire.copy import END_OF_BATCH, Block, Limit, ReadAhead, copy_out, field

STAGED = "text, through staging"  # the way that rows take which may be in raw already
BATCH_SIZE = 2 * 1024 * 1024  # bytes of a batch, whatever batch_rows says: one is read meanwhile

Passed = Callable[[Block], None]


class Transfer:
    """What one attempt reads of one snapshot, and where it lands."""

    def __init__(
        self,
        definition: Definition,
        source: Connection,
        destination: Connection,
        result: Result,
        view: window.Window,
        raw: Raw,
        stamp: str,
        say: Say,
        progress: Progress,
    ) -> None:
        self.definition = definition
        self.source = source
        self.destination = destination
        self.result = result
        self.view = view
        self.raw = raw
        self._stamp = stamp
        self._say = say
        self._progress = progress
        self.expected: float | None = None  # rows, estimated; not above 0 where it cannot be
        self.order = [column for column in (view.cursor, view.id) if column]

    def land(
        self, query: sql.Composable, progress: Callable[[bytes], State], *, onward: bool = False
    ) -> None:
        """Land a query's rows. ``progress`` gives the state to store after a batch's last row.

        ``onward``: the rows say which of them are beyond the stored position.
        """
        self.tell(query)
        limit = self._limit()
        totals = self.result.totals
        ahead = ReadAhead(lambda: copy_out(self.source, query, binary=False, limit=limit))
        staging = landing.Staging(self.destination, self.raw)
        try:
            stream = iter(ahead)
            while ahead.more():
                stamp = self.stamp_of(totals.batches)
                number = totals.batches + 1
                batch = next_batch(stream, self._passed())
                with self._transaction():
                    # On disk by the commit that ends the load: a server that crashes before loses
                    # the position together with the rows, and they are read again.
                    self.destination.execute("set local synchronous_commit = off")
                    rows, size, last = staging.fill(batch, number)
                    written = staging.apply(stamp, number, self.order, onward=onward)
                    totals.add(rows, written, size)
                    self.store(progress(last)._replace(exported_at=stamp), "running")
        finally:
            ahead.stop(self.source)

    def replace_all(self, where: sql.Composable, final: Callable[[], State]) -> None:
        """Make raw equal to these rows in one transaction: readers see before or after."""
        totals = self.result.totals
        with self._transaction():
            _, rows, size = self._stage(where)
            written, deleted = landing.replace_all(
                self.destination, self.raw, self.stamp_of(0), self.order
            )
            totals.rows_read, totals.rows_written = rows, written
            totals.rows_deleted = deleted if self.raw.key else 0
            totals.bytes, totals.batches = size, 1
            self.store(final(), "ok")

    def land_at_once(self, where: sql.Composable, stamp: str) -> int:
        """Land these rows in the running transaction; return how many were written."""
        totals = self.result.totals
        staging, rows, size = self._stage(where)
        written = staging.apply(stamp, totals.batches + 1, self.order, onward=False)
        totals.add(rows, written, size)
        return written

    def _stage(self, where: sql.Composable) -> tuple[landing.Staging, int, int]:
        query = select(self.raw, where)
        self.tell(query)
        staging = landing.Staging(self.destination, self.raw)
        ahead = ReadAhead(lambda: copy_out(self.source, query, binary=False))
        try:
            batch = next_batch(iter(ahead), self._passed())
            rows, size, _ = staging.fill(batch, self.result.totals.batches + 1)
        finally:
            ahead.stop(self.source)
        return staging, rows, size

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One batch. What is rolled back does not count."""
        result = self.result
        before = replace(result.totals), result.cursor
        try:
            with self.destination.transaction():
                yield
        except BaseException:
            result.totals, result.cursor = before
            raise

    def store(self, now: State, status: str) -> None:
        """Write the position and the run's row, in the caller's transaction."""
        state.write(self.destination, self.definition.key, now)
        self.result.cursor = now.cursor or self.result.cursor
        record(self.destination, self.result, status)

    def stamp_of(self, batch: int) -> str:
        """Return a batch's ``_exported_at``."""
        return state.later(self._stamp, batch)

    def _limit(self) -> Limit:
        rows = self.definition.batch_rows
        if self.view.id is not None:
            return Limit(rows, BATCH_SIZE)
        place = self.raw.place(self.view.cursor)
        # Without a tie-breaker a position inside a tie would lose the rest of it.
        return Limit(rows, BATCH_SIZE, lambda a, b: field(a, place) == field(b, place))

    def _passed(self) -> Passed:
        """Return what tells the progress of the batch that is about to begin."""
        rows, size = self.result.totals.rows_read, self.result.totals.bytes

        def passed(block: Block) -> None:
            nonlocal rows, size
            rows += block.rows
            size += len(block.data)
            self._progress(rows, size, self.expected)

        passed(END_OF_BATCH)
        return passed

    def tell(self, query: sql.Composable, count: int = 1) -> None:
        """Show what the source is asked for, ``count`` times with other blocks."""
        text = query.as_string(self.source)
        ranges = f" -- and so on, {count:,} ranges" if count != 1 else ""
        self._say(f"source: {text}{ranges}", "debug", "sql", sql=text)


def select(
    raw: Raw,
    where: sql.Composable,
    *,
    stamp: str | None = None,
    past: sql.Composable | None = None,
) -> sql.Composable:
    """Return the query for rows: with ``stamp``, raw's own columns; else the stream's.

    ``past`` tells which rows are beyond the stored position.
    """
    definition = raw.definition
    if stamp is not None:
        columns = [column.selected for column in raw.columns]
        columns.append(sql.SQL("{}::timestamptz").format(sql.Literal(stamp)))
    else:
        columns = [column.selected for column in raw.stream[:-1]]
        columns.append(past or sql.SQL("true"))
    if definition.source.cursor.nulls == "skip":
        where = sql.SQL("{} and {} is not null").format(
            where, sql.Identifier(definition.source.cursor.field)
        )
    return sql.SQL("select {} from {} where {}").format(
        sql.SQL(", ").join(columns), definition.source.name, where
    )


def next_batch(stream: Iterator[Block], passed: Passed) -> Iterator[Block]:
    """Yield the blocks up to the end of a batch, keeping none; tell ``passed`` of each."""
    while True:
        block = next(stream, END_OF_BATCH)
        if block is END_OF_BATCH:
            return
        passed(block)
        yield block
        del block
