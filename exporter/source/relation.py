"""What all ways of reading a relation share: the snapshot, the first load by ranges, batches."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator

from psycopg import sql

from exporter.config import Definition
from exporter.source.blocks import Blocks, select, step_of
from exporter.source.catalog import find_table, keyed, refuse_hidden
from exporter.source.reader import BEYOND, Batch, Lands, Plan, Rows, Target, Wanted
from exporter.source.shared import is_proved, refuse_shared
from exporter.source.snapshot import (
    TRUE,
    Horizon,
    changed_since,
    found,
    observe,
    reading,
    take_snapshot,
)
from exporter.source.table import Column, Heap, Table
from exporter.state import Position, Reading, Source, State
from exporter.wire import Block, Connection, Limit, ReadAhead, copy_out, one_batch

BATCH_SIZE = 2 * 1024 * 1024  # bytes of a batch, whatever batch_rows says: one is read meanwhile


class RelationReader(ABC):
    """Reads a table or view. A first load is read by ranges of blocks, where that can be."""

    way: str
    horizon: Horizon
    found: Source

    def __init__(self, source: Connection, definition: Definition) -> None:
        self._source = source
        self._definition = definition
        self._declared = definition.source
        self._key = definition.key
        self._batch_rows = definition.batch_rows
        self._append = definition.destination.mode == "append"
        self._finish: Callable[[], State]
        self._where: sql.Composable = TRUE  # the condition for the rows of the plan
        self._fills = False  # raw has no row yet

    @contextlib.contextmanager
    def opened(self, stored: State, destination: Connection | None) -> Iterator[Table]:
        """See ``Reader``."""
        source, declared = self._source, self._declared
        self._look_before()
        self.horizon = horizon = observe(source, stored)
        with reading(source, declared):
            self._look_within()
            self.table = find_table(source, declared, destination)
            self._definition = keyed(self._definition, self.table)
            self._snapshot = snapshot = take_snapshot(source, stored, horizon)
            self.found = found(horizon, snapshot, self.table)
            # What a position needs beside the cursor, to tell at the next load what came late.
            self._moment = State(
                snapshot_xmin=snapshot.xmin,
                source=horizon.server.identity,
                horizon=horizon.oldest_open,
            )
            refuse_hidden(self.table)
            self._refuse(rows=destination is not None)
            yield self.table

    def reading(self) -> Reading:
        """See ``Reader``."""
        landed = {column.name: column.expression or "" for column in self.table.landed}
        keys = self._definition.destination.conflict_columns
        return Reading(self.way, None, None, "", landed, keys)

    def batches(self, plan: Plan) -> Generator[Batch]:
        """See ``Reader``."""
        if plan.query is not None:
            if plan.lands is not Lands.WHOLE:
                self._refuse_shared(lambda columns: select(self.table, columns, self._where))
            limit = None if plan.lands is Lands.WHOLE else self._limit()
            yield from self._batches_of(plan.query, limit)

    def begun(self, stored: State, wanted: Wanted) -> Table:
        """See ``Reader``. Nothing is read before what is read is planned."""
        del stored, wanted
        return self.table

    def finished(self) -> State:
        """See ``Reader``."""
        return self._finish()

    def confirm(self, position: State) -> None:  # noqa: B027
        """Keep nothing at the source: there is nothing to forget."""

    # -- what the ways differ in

    def _look_before(self) -> None:  # noqa: B027  most have nothing to look at
        """Look at what has to be known before the open transactions are."""

    def _look_within(self) -> None:  # noqa: B027  likewise
        """Look at the snapshot, which is taken here."""

    @abstractmethod
    def _refuse(self, *, rows: bool) -> None:
        """Raise SourceError for a table that cannot be read so; with ``rows``, for its rows."""

    @abstractmethod
    def _top(self) -> Position | None:
        """Return the furthest position that the snapshot shows; None where there is no row."""

    @abstractmethod
    def _complete(self, current: State) -> State:
        """Return the position when all that the snapshot shows has landed."""

    @abstractmethod
    def _reached(self, last: bytes) -> State:
        """Return the position after the last row of a batch."""

    @abstractmethod
    def _limit(self) -> Limit:
        """Return where a batch ends."""

    # -- the pieces

    def _stream(self, target: Target, hidden: tuple[Column, ...] = ()) -> tuple[Column, ...]:
        """Return the columns of what is read: raw's, and behind them what else it takes."""
        names = {column.name for column in target.columns}
        return (*target.columns, *(c for c in (*hidden, BEYOND) if c.name not in names))

    def _any(self, relation: sql.Composable, where: sql.Composable = TRUE) -> bool:
        """Whether a relation has a row that meets a condition."""
        row = self._source.execute(
            sql.SQL("select exists (select from {} where {})").format(relation, where)
        ).fetchone()
        return bool(row and row[0])

    def _any_in(self, heap: Heap, where: sql.Composable = TRUE) -> bool:
        """Whether a heap has such a row, as far as this role may see; else it may have one."""
        name = sql.SQL("only {}").format(heap.identifier)
        return not heap.readable or self._any(name, where)

    def _brings(self, stored: State, where: sql.Composable) -> bool:
        """Whether a partition that was not there at the last load has a row of a condition."""
        bound = stored.binding.source if stored.binding else self.found
        known = {*bound.partitions, bound.oid}
        return any(self._any_in(heap, where) for heap in self.table.heaps if heap.oid not in known)

    def _is_first(self, stored: State, target: Target, wanted: Wanted, *, empty: bool) -> bool:
        """Whether this read is a first one, by blocks, or goes on with one."""
        if not self.table.in_blocks or not (target.keyed or self._lands_once):
            return False
        if stored.is_first and not empty:
            # A log's rows of another file would be there twice; what has landed of a mirror may be
            # gone at the source.
            goes_on = self._left_at(stored) is not None
            return not wanted.full_refresh and (goes_on or not self._lands_once)
        return stored.cursor is None and empty

    def _left_at(self, stored: State) -> int | None:
        """Return the block from which an unfinished first load goes on; None where it cannot."""
        if stored.file is None or self._snapshot.since is None:
            return None
        return self.table.moved(stored.file, stored.next_block or 0)

    @property
    def _lands_once(self) -> bool:
        """Whether each row of a log is known by its transaction to have landed, or not."""
        return False

    @property
    def _ended(self) -> sql.Composable:
        """The condition for rows that land in this load, by their transactions."""
        return TRUE

    def _first(self, plan: Plan, target: Target, *, empty: bool) -> Plan:
        """Read all blocks; or the rest of them, then what has changed since the first ones."""
        table, stored = self.table, plan.begin
        block = None if empty else self._left_at(stored)
        same = block is not None
        direct = target.binary and (empty or same)
        begin = self._moment._replace(
            snapshot_xmin=stored.snapshot_xmin if same else self._snapshot.xmin,
            # Started over, a load that is killed again has rows of any block: it cannot go on.
            file=table.file if empty or same else None,
            next_block=block or 0,
            exported_at=stored.exported_at,
            binding=stored.binding,
        )
        late = self._snapshot.since if same else None
        if self._lands_once:  # what is newer comes behind them, or is for the next load
            late = begin.snapshot_xmin
        blocks = Blocks(
            table,
            target.columns if direct else plan.stream[:-1],
            direct,
            begin=begin.next_block or 0,
            step=step_of(table, self._batch_rows),
            # A row of these blocks that is as it was in the first snapshot is not in raw; an older
            # version of one that has changed since may be.
            where=sql.SQL("not {}").format(changed_since(late)) if late else TRUE,
        )
        self._current = begin._replace(next_block=blocks.end)
        self._finish = lambda: self._complete(
            begin._replace(file=None, next_block=None, cursor=self._top())
        )
        query = None
        if late and same:
            newer = sql.SQL("{} and {}").format(changed_since(late), self._ended)
            query = select(table, plan.stream[:-1], newer)
        return plan._replace(
            path="first load", begin=begin, blocks=blocks, query=query, rows=table.rows
        )

    def _refuse_shared(self, read: Callable[[tuple[Column, ...]], sql.Composable]) -> None:
        """Raise SourceError where a row that is to be read shares its key with one in raw.

        A constraint of the source says that none does, or it is asked. Into an empty raw all rows
        are landed by this load, which sees it itself.
        """
        keys = self._definition.destination.conflict_columns
        if keys and not self._fills and not is_proved(self.table, keys):
            refuse_shared(self._source, self.table, keys, read)

    def _batches_of(
        self, query: sql.Composable, limit: Limit | None, *, swept: bool = False
    ) -> Generator[Batch]:
        ahead = ReadAhead(lambda: copy_out(self._source, query, binary=False, limit=limit))
        last = b""

        def rows(stream: Iterator[Block]) -> Iterator[Block]:
            nonlocal last
            for block in one_batch(stream):
                last = block.last
                yield block
                del block

        try:
            stream = iter(ahead)
            while limit is None or ahead.more():
                part = Rows(self._key, rows(stream), swept=swept)
                yield Batch((part,), lambda: self._reached(last))
                if limit is None:
                    return
        finally:
            ahead.stop(self._source)
