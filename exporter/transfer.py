"""The rows of queries, landed batch by batch, each in one transaction with its position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta

from psycopg import sql

from exporter import landing, state, window
from exporter.connection import Connection
from exporter.console import Progress, Say
from exporter.copy import END_OF_BATCH, Block, Limit, ReadAhead, copy_out, field
from exporter.definition import Definition
from exporter.raw_table import Raw
from exporter.report import Result, record
from exporter.state import State

BATCH_SIZE = 8 * 1024 * 1024  # bytes of a batch, whatever batch_rows says


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

    def select(
        self,
        where: sql.Composable,
        *,
        stamp: str | None = None,
        past: sql.Composable | None = None,
    ) -> sql.Composable:
        """Return the query for rows: with ``stamp``, raw's own columns; else the stream's.

        ``past`` tells which rows are beyond the stored position.
        """
        raw = self.raw
        if stamp is not None:
            columns = [column.selected for column in raw.columns]
            columns.append(sql.SQL("{}::timestamptz").format(sql.Literal(stamp)))
        else:
            columns = [column.selected for column in raw.stream[:-1]]
            columns.append(past or sql.SQL("true"))
        if self.definition.nulls == "skip":
            where = sql.SQL("{} and {} is not null").format(
                where, sql.Identifier(self.view.cursor.name)
            )
        return sql.SQL("select {} from {} where {}").format(
            sql.SQL(", ").join(columns), self.definition.source, where
        )

    def land(
        self,
        queries: list[sql.Composable],
        progress: Callable[[bytes], State],
        *,
        direct: bool = False,
        onward: bool = False,
    ) -> None:
        """Land the queries' rows. ``progress`` gives the state to store after a batch's last row.

        One query is cut into batches; of several, each is a batch. ``direct`` copies into the raw
        table itself, for rows that are new and selected with their stamp. ``onward``: the rows say
        which of them are beyond the stored position.
        """
        self._tell(queries)
        limit = None if direct or len(queries) > 1 else self._limit()

        def produce() -> Iterator[Block]:
            for query in queries:
                ended = False
                for block in copy_out(self.source, query, binary=direct, limit=limit):
                    ended = block is END_OF_BATCH
                    yield block
                    del block
                if not ended and len(queries) > 1:
                    yield END_OF_BATCH  # an empty range is progress, too

        totals = self.result.totals
        ahead = ReadAhead(produce)
        staging = landing.Staging(self.destination, self.raw)
        try:
            stream = iter(ahead)
            while ahead.more():
                stamp = self.stamp_of(totals.batches)
                number = totals.batches + 1
                batch = self._batch(stream)
                with self.destination.transaction():
                    if direct:
                        rows, size = landing.copy_direct(self.destination, self.raw, batch)
                        written, last = rows, b""
                    else:
                        rows, size, last = staging.fill(batch, number)
                        written = staging.apply(stamp, number, self.order, onward=onward)
                    totals.rows_read += rows
                    totals.rows_written += written
                    totals.bytes += size
                    totals.batches += 1
                    self.store(replace(progress(last), exported_at=stamp), "running")
        finally:
            ahead.stop(self.source)

    def replace_all(self, where: sql.Composable, final: Callable[[], State]) -> None:
        """Make raw equal to these rows in one transaction: readers see before or after."""
        query = self.select(where)
        self._tell([query])
        totals = self.result.totals
        ahead = ReadAhead(lambda: copy_out(self.source, query, binary=False))
        try:
            stream = iter(ahead)
            with self.destination.transaction():
                batch = self._batch(stream)
                rows, size, _ = landing.Staging(self.destination, self.raw).fill(batch, 1)
                written, deleted = landing.replace_all(
                    self.destination, self.raw, self.stamp_of(0), self.order
                )
                totals.rows_read, totals.rows_written = rows, written
                totals.rows_deleted = deleted if self.raw.key else 0
                totals.bytes, totals.batches = size, 1
                self.store(final(), "ok")
        finally:
            ahead.stop(self.source)

    def store(self, now: State, status: str) -> None:
        """Write the position and the run's row, in the caller's transaction if there is one."""
        with self.destination.transaction():
            state.write(self.destination, self.definition.key, now)
            self.result.cursor = now.cursor or self.result.cursor
            record(self.destination, self.result, status)

    def stamp_of(self, batch: int) -> str:
        """Return a batch's ``_exported_at``: a microsecond after the batch before it."""
        seconds, _, fraction = self._stamp.partition("+")[0].partition(".")
        micros = int((fraction or "0").ljust(6, "0")) + batch
        moment = datetime.fromisoformat(seconds) + timedelta(microseconds=micros)
        return f"{moment.isoformat(' ', 'microseconds')}+00"

    def _limit(self) -> Limit:
        rows = self.definition.batch_rows
        if self.view.id is not None:
            return Limit(rows, BATCH_SIZE)
        place = self.raw.index(self.view.cursor)
        # Without a tie-breaker a position inside a tie would lose the rest of it.
        return Limit(rows, BATCH_SIZE, lambda a, b: field(a, place) == field(b, place))

    def _batch(self, stream: Iterator[Block]) -> Iterator[Block]:
        """Yield the blocks up to the end of a batch, keeping none."""
        rows, size = self.result.totals.rows_read, self.result.totals.bytes
        while True:
            self._progress(rows, size, self.expected)
            block = next(stream, END_OF_BATCH)
            if block is END_OF_BATCH:
                return
            rows += block.rows
            size += len(block.data)
            yield block
            del block

    def _tell(self, queries: list[sql.Composable]) -> None:
        if not queries:
            return
        more = f" -- and {len(queries) - 1:,} more such ranges" if len(queries) > 1 else ""
        text = queries[0].as_string(self.source)
        self._say(f"source: {text}{more}", "debug", "sql", sql=text)
