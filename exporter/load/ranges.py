"""The first load of a table by ranges of its blocks, one after the other or side by side."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import psycopg
from psycopg import sql

from exporter import state
from exporter.errors import DatabaseError
from exporter.raw import RawTable, landing
from exporter.source import Blocks, Column, Lands, Range, look_further
from exporter.state import Result, fence
from exporter.terminal import Progress
from exporter.wire import END_OF_BATCH, Block, Connection, ReadAhead, copy_out, one_batch

Passed = Callable[[Block], None]


class Landed(NamedTuple):
    """What a range came to; nothing where an earlier attempt had landed it already."""

    part: Range
    rows: int = 0
    written: int = 0
    size: int = 0


class FirstLoad(NamedTuple):
    """All that who lands its ranges has to know, here or on another machine. Holds no secret."""

    blocks: Blocks
    raw: RawTable
    stream: tuple[Column, ...]
    stamp: str  # of the first range
    run: str
    run_id: int
    snapshot: str | None  # exported by the session that holds it open

    @property
    def key(self) -> str:
        """The definition's key."""
        return self.raw.target.key

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
    passed: Passed,
    wait: Callable[[], None],
) -> Iterator[Landed]:
    """Land ranges, each in a transaction with its record. Raises psycopg.Error, ExporterError.

    The source's transaction must show the first load's snapshot. ``passed`` is told of each block,
    ``wait`` called again and again while it is another range's turn; it may raise to give up.
    """
    taken: deque[Range] = deque()

    def produce() -> Iterator[Block]:
        for part in parts:
            taken.append(part)
            ended = False
            for block in copy_out(source, first.query(part), binary=first.blocks.direct):
                ended = block is END_OF_BATCH
                yield block
                del block
            if not ended:
                yield END_OF_BATCH  # an empty range is progress, too

    staging = landing.Staging(destination, first.raw, first.stream)
    ahead = ReadAhead(produce)
    try:
        stream = iter(ahead)
        while ahead.more():
            blocks = _passing(one_batch(stream), passed)
            yield _land(first, taken.popleft(), destination, staging, blocks, wait)
    finally:
        ahead.stop(source)


def _passing(blocks: Iterator[Block], passed: Passed) -> Iterator[Block]:
    for block in blocks:
        passed(block)
        yield block
        del block


def _land(
    first: FirstLoad,
    part: Range,
    destination: Connection,
    staging: landing.Staging,
    blocks: Iterator[Block],
    wait: Callable[[], None],
) -> Landed:
    stamp = first.stamp_of(part)
    with destination.transaction():
        if not fence.hold(destination, first.raw.target, first.run, part.number, part.end):
            for _ in blocks:  # what has been read of it is in the way of the next one
                pass
            raise psycopg.Rollback
        if first.blocks.direct:
            rows, size = landing.copy_direct(destination, first.raw, blocks)
            written = rows
        else:
            rows, size = staging.fill(blocks, part.number + 1)
            written, _ = staging.apply(Lands.ANY, stamp, part.number + 1, [])
        if not fence.advance(
            destination,
            first.raw.target,
            first.run,
            (part.first, part.end),
            stamp,
            (first.run_id, rows, written, size),
            wait,
        ):
            raise psycopg.Rollback
        return Landed(part, rows, written, size)
    return Landed(part)


class NotByRanges(Exception):  # noqa: N818  no error: somebody else is to load it
    """Nothing was read: this load is none by ranges, and its crew does nothing else."""


class Crew(Protocol):
    """Who lands the ranges of a first load."""

    shares: bool  # sessions other than the load's own read, too
    ranges_only: bool  # other loads are refused by NotByRanges

    def watching(self, *sessions: Connection) -> contextlib.AbstractContextManager[None]:
        """Let a load that uses these sessions be stopped. Raises KeyboardInterrupt."""

    def land(
        self, first: FirstLoad, source: Connection, destination: Connection, tally: Tally
    ) -> None:
        """Land them all. Raises psycopg.Error, ExporterError."""


class Alone:
    """The load itself, on its own sessions."""

    shares = False
    ranges_only = False

    def watching(self, *_: Connection) -> contextlib.AbstractContextManager[None]:
        """Ctrl-C reaches the load by itself."""
        return contextlib.nullcontext()

    def land(
        self, first: FirstLoad, source: Connection, destination: Connection, tally: Tally
    ) -> None:
        """Land one range after the other."""
        for one in land(
            first,
            source,
            destination,
            first.blocks.ranges(),
            tally.passed,
            lambda: time.sleep(0.01),
        ):
            tally.landed(one)


def _pause() -> None:
    time.sleep(0.01)


ALONE = Alone()


class Tally:
    """Counts what all who land ranges of a first load have done. Safe to call from threads."""

    def __init__(self, blocks: Blocks, result: Result, progress: Progress) -> None:
        rows = blocks.table.rows
        self._blocks = blocks
        self._result = result
        self._progress = progress
        self._known = rows > 0 and blocks.begin == 0
        self._expected: float | None = rows if self._known else None
        self._rows, self._size = result.totals.rows_read, result.totals.bytes
        self._before = self._rows
        self._lock = threading.Lock()
        progress(self._rows, self._size, self._expected)

    def passed(self, block: Block) -> None:
        """Count a block that is on its way."""
        self._count(block.rows, len(block.data))

    def _count(self, rows: int, size: int) -> None:
        with self._lock:
            self._rows += rows
            self._size += size
            self._progress(self._rows, self._size, self._expected)

    def landed(self, one: Landed, *, elsewhere: bool = False) -> None:
        """Count a range that is committed; of one from ``elsewhere``, no block has passed here."""
        if elsewhere:
            self._count(one.rows, one.size)
        blocks, totals = self._blocks, self._result.totals
        with self._lock:
            totals.add(one.rows, one.written, one.size)
            if not self._known and blocks.begin == 0:
                # Never analyzed: the rest is taken to be like what has been read.
                read = totals.rows_read - self._before
                done = (one.part.end - blocks.begin) / (blocks.end - blocks.begin)
                self._expected = read / done


@contextlib.contextmanager
def shared_snapshot(source: Connection, first: FirstLoad) -> Iterator[None]:
    """See in a second session what the session sees that exported the snapshot.

    Raises DatabaseError where that one is over, or on another server.
    """
    source.execute("begin isolation level repeatable read read only")
    try:
        source.execute(sql.SQL("set transaction snapshot {}").format(sql.Literal(first.snapshot)))
    except (psycopg.errors.InvalidParameterValue, psycopg.errors.UndefinedObject):
        raise DatabaseError(
            f"{first.key}: the snapshot of this first load is gone",
            hint="DATABASE_URL_CORE must name the same server for all who share a load",
        ) from None
    look_further(source, first.blocks.table)
    yield
    source.execute("commit")
