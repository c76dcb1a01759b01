"""The first load of a table by ranges of its blocks, one after the other or side by side."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter import state
from exporter.errors import DatabaseError
from exporter.raw import RawTable
from exporter.raw.landing import Staging, row_error
from exporter.raw.refused import copied_to
from exporter.raw.statements import copy_statement
from exporter.source import Blocks, Column, Lands, Range, join_snapshot, look_further
from exporter.state import Totals, fence
from exporter.terminal import Progress
from exporter.wire import END_OF_BATCH, Block, Connection, ReadAhead, copy_out, one_batch, pour

POLL = 0.02  # seconds between looks at whether it is a range's turn


class Landed(NamedTuple):
    """What one range landed; nothing where an earlier attempt had landed it already."""

    part: Range
    rows: int = 0
    written: int = 0
    size: int = 0


class FirstLoad(NamedTuple):
    """What it takes to land its ranges, here or on another machine. Holds no secret."""

    blocks: Blocks
    raw: RawTable
    stream: tuple[Column, ...]
    stamp: str  # of the first range
    run: str
    run_id: int
    snapshot: str | None  # exported by the session that holds it open

    def stamp_of(self, part: Range) -> str:
        """Return the ``_exported_at`` of a range's rows: later than that of the range before it."""
        return state.later(self.stamp, part.number)

    def query(self, part: Range) -> sql.Composable:
        """Return the query for a range's rows."""
        return self.blocks.query(part, self.stamp_of(part))


def land(
    first: FirstLoad,
    source: Connection,
    destination: Connection,
    parts: Iterator[Range],
    count: Callable[[int, int], None],
    wait: Callable[[], None],
) -> Iterator[Landed]:
    """Land ranges, each in a transaction with its record. Raises psycopg.Error, ExporterError.

    The source's transaction must show the first load's snapshot. ``count`` gets the rows and bytes
    of each block that is read, in another thread; ``wait`` is called again and again while it is
    another range's turn, and may raise to give up.
    """
    taken: deque[Range] = deque()

    def produce() -> Iterator[Block]:
        for part in parts:
            taken.append(part)
            ended = False
            for block in copy_out(source, first.query(part), binary=first.blocks.direct):
                ended = block is END_OF_BATCH
                count(block.rows, len(block.data))
                yield block
                del block
            if not ended:
                yield END_OF_BATCH  # an empty range is progress, too

    staging = Staging(destination, first.raw, first.stream)
    ahead = ReadAhead(produce)
    try:
        stream = iter(ahead)
        while ahead.more():
            yield _land(first, taken.popleft(), destination, staging, one_batch(stream), wait)
    finally:
        ahead.stop(source)


def _land(
    first: FirstLoad,
    part: Range,
    destination: Connection,
    staging: Staging,
    blocks: Iterator[Block],
    wait: Callable[[], None],
) -> Landed:
    target, stamp = first.raw.target, first.stamp_of(part)
    with destination.transaction():
        if not fence.hold(destination, target, first.run, part):
            for _ in blocks:  # what has been read of it is in the way of the next one
                pass
            raise psycopg.Rollback
        if first.blocks.direct:
            try:
                rows, size = pour(destination, copy_statement(first.raw), blocks)
            except (psycopg.DataError, psycopg.IntegrityError) as error:
                row = f"of blocks {part.first:,} to {part.end:,}"
                column = copied_to(error)[1]
                raise row_error(first.raw, error, part.number + 1, row, column) from None
            written = rows
        else:
            rows, size = staging.fill(blocks, part.number + 1)
            written, _ = staging.apply(Lands.ANY, stamp, part.number + 1, [])
        counts = (first.run_id, rows, written, size)
        if not fence.advance(destination, target, first.run, part, stamp, counts, wait):
            raise psycopg.Rollback
        return Landed(part, rows, written, size)
    return Landed(part)


class NotByRanges(Exception):  # noqa: N818  no error: somebody else is to load it
    """Nothing was read: this load is none by ranges, and its crew does nothing else."""


class Crew:
    """Who lands the ranges of a first load: here the load itself, on its own sessions."""

    shares = False  # sessions other than the load's own read, too
    ranges_only = False  # other loads are refused by NotByRanges

    def watching(self, *_: Connection) -> contextlib.AbstractContextManager[None]:
        """Let a load that uses these sessions be stopped. Raises KeyboardInterrupt.

        One that is alone is stopped by Ctrl-C itself.
        """
        return contextlib.nullcontext()

    def land(
        self, first: FirstLoad, source: Connection, destination: Connection, tally: Tally
    ) -> None:
        """Land all ranges. Raises psycopg.Error, ExporterError."""
        parts, wait = first.blocks.ranges(), functools.partial(time.sleep, POLL)
        for landed in land(first, source, destination, parts, tally.read, wait):
            tally.landed(landed)


class Tally:
    """Counts what all who land ranges of a first load have done. Safe to call from threads."""

    def __init__(self, blocks: Blocks, totals: Totals, progress: Progress) -> None:
        rows, whole = blocks.table.rows, blocks.begin == 0
        self._expected: float | None = rows if whole and rows > 0 else None
        self._estimates = whole and rows <= 0  # the table was never analyzed
        self._blocks = blocks
        self._totals = totals
        self._progress = progress
        self._rows, self._size = totals.rows_read, totals.bytes
        self._before = self._rows
        self._lock = threading.Lock()
        progress(self._rows, self._size, self._expected)

    def read(self, rows: int, size: int) -> None:
        """Count what is on its way."""
        with self._lock:
            self._rows += rows
            self._size += size
            self._progress(self._rows, self._size, self._expected)

    def landed(self, one: Landed) -> None:
        """Count a range that is committed."""
        with self._lock:
            self._totals.add(one.rows, one.written, one.size)
            if self._estimates:  # the rest is taken to be like what has been read
                read = self._totals.rows_read - self._before
                self._expected = read * self._blocks.end / one.part.end


@contextlib.contextmanager
def shared_snapshot(source: Connection, first: FirstLoad) -> Iterator[None]:
    """See in a second session what the session sees that exported the snapshot.

    Raises DatabaseError where that one is over, or on another server.
    """
    gone = DatabaseError(
        f"{first.raw.target.key}: the snapshot of this first load is gone",
        hint=f"{source.variable} must name the same server for all who share a load",
    )
    try:
        if not join_snapshot(source, first.blocks.table.declared, first.snapshot):
            raise gone
    except (
        psycopg.errors.InvalidParameterValue,
        psycopg.errors.UndefinedObject,
        psycopg.errors.ObjectNotInPrerequisiteState,  # its process has just ended
    ):
        raise gone from None
    look_further(source, first.blocks.table)
    yield
    source.execute("commit")
