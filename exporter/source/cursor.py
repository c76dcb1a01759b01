"""Reading by the cursor: what is new, what may have come late, a span again, or everything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator

from psycopg import sql

from exporter.config import Definition
from exporter.errors import SourceError
from exporter.source.blocks import Blocks, select, step_of
from exporter.source.catalog import Column, Table, find_table, refuse_hidden_rows, require
from exporter.source.reader import BEYOND, Batch, Lands, Plan, Rows, Target, Wanted
from exporter.source.snapshot import (
    TRUE,
    Horizon,
    changed_since,
    found,
    observe,
    reading,
    take_snapshot,
)
from exporter.source.window import Span, Window, cursor_columns, decide, newest_number
from exporter.state import Judgement, Position, Reading, Source, State, Worth
from exporter.wire import Block, Connection, Limit, ReadAhead, copy_out, field, one_batch

_SMALL = 1024  # blocks, 8 MB: not worth another way
BATCH_SIZE = 2 * 1024 * 1024  # bytes of a batch, whatever batch_rows says: one is read meanwhile


class CursorReader:
    """Reads a table by its cursor. A first load is read by ranges of blocks, where that can be."""

    horizon: Horizon
    found: Source

    def __init__(self, source: Connection, definition: Definition) -> None:
        self._source = source
        self._definition = definition
        self._declared = definition.source
        self._key = definition.key
        self._batch_rows = definition.batch_rows
        self._append = definition.destination.mode == "append"

    @contextlib.contextmanager
    def opened(self, stored: State, destination: Connection | None) -> Iterator[Table]:
        """See ``Reader``."""
        source, declared = self._source, self._declared
        self._seen = newest_number(source, declared)
        self.horizon = horizon = observe(source, stored)
        with reading(source, declared):
            self.table = find_table(source, declared, destination)
            self._snapshot = snapshot = take_snapshot(source, stored, horizon)
            self.found = found(horizon, snapshot, self.table)
            # What a position needs beside the cursor, to tell at the next load what came late.
            self._moment = State(
                snapshot_xmin=snapshot.xmin,
                source=horizon.server.identity,
                horizon=horizon.oldest_open,
            )
            refuse_hidden_rows(self.table)
            columns = cursor_columns(declared, self.table)
            if destination:
                self._refuse_nulls(columns)
            yield self.table

    def reading(self) -> Reading:
        """See ``Reader``."""
        cursor = self._declared.cursor
        landed = {column.name: column.expression or "" for column in self.table.landed}
        keys = self._definition.destination.conflict_columns
        return Reading("cursor", cursor.field, cursor.id_field, cursor.nulls, landed, keys)

    def doubt(self, stored: State) -> Judgement:
        """See ``Reader``."""
        if stored.cursor is None:
            return Judgement(Worth.ONWARD)
        window = self._window(stored)
        before = set(stored.binding.source.partitions if stored.binding else self.table.partitions)
        for oid in set(self.table.partitions) - before:
            if self._has_rows_behind(oid, window, stored.cursor):
                return Judgement(
                    Worth.REREAD,
                    f"{self._declared.schema}.{self._declared.table} has a new partition with rows"
                    " behind the position: everything is read once, and compared with raw",
                )
        return self._doubt_newest(window, stored.cursor)

    def plan(self, stored: State, target: Target, wanted: Wanted, *, empty: bool) -> Plan:
        """See ``Reader``."""
        columns = target.columns
        self._stored = self._current = stored
        self.window = self._window(stored)
        names = {column.name for column in columns}
        hidden = (one for one in (*self.window.columns, BEYOND) if one.name not in names)
        self._stream = (*columns, *hidden)
        self._reached: Callable[[bytes], State] = lambda _: self._current
        self._finish: Callable[[], State]
        plan = Plan(
            path="",
            stream=self._stream,
            order=self.window.columns,
            begin=stored,
            bound=self.window.bound,
            horizon=self.horizon,
            unseen=self._unseen(),
        )
        if wanted.span:
            return self._backfill(plan, wanted.span)
        if self._is_first(target, wanted, empty=empty):
            return self._first(plan, target, empty=empty)
        if wanted.full_refresh:
            return self._whole(plan._replace(max_deletes=wanted.max_deletes))
        return self._sweep(plan) if wanted.sweep else self._increment(plan)

    def batches(self, plan: Plan) -> Generator[Batch]:
        """See ``Reader``."""
        query = plan.query
        if query is None:
            return
        limit = None if plan.lands is Lands.WHOLE else self._limit()
        if limit:
            self._prefer_index()
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
                part = Rows(self._key, rows(stream))
                yield Batch((part,), lambda: self._reached(last))
                if limit is None:
                    return
        finally:
            ahead.stop(self._source)

    def finished(self) -> State:
        """See ``Reader``."""
        return self._finish()

    def in_flight(self, stored: State) -> sql.Composable:
        """See ``Reader``."""
        window = self._window(stored)._replace(append=False)  # what is held back will land, too
        return window.onward(stored.cursor, stored.watermark)

    def confirm(self, position: State) -> None:
        """Keep nothing at the source: there is nothing to forget."""

    # -- the ways

    def _is_first(self, target: Target, wanted: Wanted, *, empty: bool) -> bool:
        """Whether this read is a first one, by blocks, or goes on with one."""
        if not self.table.in_blocks or not target.keyed:
            return False
        if self._stored.next_block is not None:
            return not wanted.full_refresh  # what has landed may be gone at the source
        return self._stored.cursor is None and empty

    def _first(self, plan: Plan, target: Target, *, empty: bool) -> Plan:
        """Read all blocks; or the rest of them, then what has changed since the first ones."""
        table, stored, since = self.table, self._stored, self.window.since
        same = not empty and stored.file == table.file and since is not None
        direct = target.binary and (empty or same)
        blocks = Blocks(
            table,
            target.columns if direct else plan.stream[:-1],
            direct,
            begin=(stored.next_block or 0) if same else 0,
            end=table.blocks,
            step=step_of(table, self._batch_rows),
            # A row of these blocks that is as it was in the first snapshot is not in raw; an older
            # version of one that has changed since may be.
            since=since if same else None,
        )
        moment = self._moment
        self._current = moment._replace(
            snapshot_xmin=stored.snapshot_xmin if same else moment.snapshot_xmin,
            # Started over, a load that is killed again has rows of any block: it cannot go on.
            file=table.file if empty or same else None,
            next_block=blocks.begin,
            exported_at=stored.exported_at,
            binding=stored.binding,
        )
        begin = self._current
        self._current = begin._replace(next_block=blocks.last)
        self._finish = lambda: self._complete(
            begin._replace(file=None, next_block=None, cursor=self._top())
        )
        late = select(table, plan.stream[:-1], changed_since(since)) if same and since else None
        return plan._replace(
            path="first load", begin=begin, blocks=blocks, query=late, rows=table.rows
        )

    def _backfill(self, plan: Plan, span: Span) -> Plan:
        """Read a span again. The position stays as it is."""
        where = self.window.within(self._source, span)
        self._finish = lambda: self._stored
        query = self._select(where) + self.window.order
        return plan._replace(path="backfill", query=query)

    def _whole(self, plan: Plan) -> Plan:
        """Read everything as one batch."""
        self._finish = lambda: self._complete(State(cursor=self._top()))
        self._reached = lambda _: self._finish()
        query = self._select(self.window.held_back)
        rows = self.table.rows
        return plan._replace(path="full refresh", query=query, lands=Lands.WHOLE, rows=rows)

    def _sweep(self, plan: Plan) -> Plan:
        """Read every row that has changed since the snapshot before, whatever its cursor is.

        Where that snapshot tells nothing any more, everything. The position may go back: to the
        newest row that there is.
        """
        window, since = self.window, self.window.since
        where = changed_since(since) if since else TRUE
        query = self._select(where) + window.order
        self._finish = lambda: self._complete(self._stored._replace(cursor=self._top()))
        return plan._replace(path="sweep", query=query, rows=None if since else self.table.rows)

    def _increment(self, plan: Plan) -> Plan:
        """Read from the watermark on, and tell of each row whether it lies beyond the cursor."""
        stored, window = self._stored, self.window
        self._reached = self._advance
        self._finish = lambda: self._complete(self._current)
        beyond = window.after(stored.cursor) if stored.cursor else TRUE
        where = window.onward(stored.cursor, stored.watermark)
        if stored.cursor and window.since and not self._finds_by_cursor(window):
            where = sql.SQL("({} or {})").format(where, changed_since(window.since))
        query = self._select(where, beyond) + window.order
        return plan._replace(
            path="increment",
            query=query,
            lands=Lands.BEYOND if stored.cursor else Lands.ANY,
            rows=self.table.rows if stored.watermark is None else None,
        )

    # -- the pieces

    def _window(self, stored: State) -> Window:
        return decide(
            self._source,
            self.table,
            stored,
            self.horizon,
            append=self._append,
            seen=self._seen,
            since=self._snapshot.since,
        )

    def _finds_by_cursor(self, window: Window) -> bool:
        """Whether the cursor spares a read of the whole table; else xmin may as well decide."""
        table = self.table
        small = table.blocks <= _SMALL and table.kind != "p"
        return self._append or window.cursor.name in table.indexed or small or not window.since

    def _unseen(self) -> str:
        """Return which transactions' late rows the lookback alone covers; else nothing."""
        where = "a standby" if self.horizon.standby else self.table.elsewhere
        name = f"{self._declared.schema}.{self._declared.table}"
        if where:
            return (
                f"{name} is {'read from ' if self.horizon.standby else ''}{where}: the transactions"
                " that are open where it is written cannot be seen, only the lookback covers them"
            )
        if self.horizon.blind:
            return (
                "the transactions of other roles are hidden, only the lookback covers them;"
                " GRANT pg_read_all_stats TO the role of DATABASE_URL_CORE"
            )
        return ""

    def _has_rows_behind(self, partition: int, window: Window, cursor: Position) -> bool:
        """Whether a partition has a row that an increment would pass over."""
        name = self._source.execute("select %s::oid::regclass::text", (partition,)).fetchone()
        assert name is not None
        statement = sql.SQL("select exists (select from {} where ({}) is not true)").format(
            sql.SQL(name[0]), window.after(cursor)
        )
        row = self._source.execute(statement).fetchone()
        return bool(row and row[0])

    def _doubt_newest(self, window: Window, cursor: Position) -> Judgement:
        """Whether the newest row lies behind the position: rows are gone, or ids began anew."""
        if not self._finds_by_cursor(window):
            return Judgement(Worth.ONWARD)  # what changed is read by xmin in any case
        at_least = sql.SQL("{} >= {}").format(window.field, window.literal(cursor.value))
        statement = sql.SQL(
            "select exists (select from {0} where {1}), exists (select from {0})"
        ).format(self._declared.name, at_least)
        row = self._source.execute(statement).fetchone()
        if row is None or row[0] or not row[1]:
            return Judgement(Worth.ONWARD)
        if self._append and not self._has_changed(window.since):
            return Judgement(Worth.ONWARD)  # rows of the log were removed, none came
        return Judgement(
            Worth.SWEEP,
            f"the newest {window.cursor.name} at the source lies behind the position {cursor}:"
            " rows are gone, or numbers began anew; what changed since is read by xmin",
        )

    def _has_changed(self, since: str | None) -> bool:
        """Whether a row is of a transaction that the snapshot before may have missed."""
        if since is None:
            return False
        statement = sql.SQL("select exists (select from {} where {})").format(
            self._declared.name, changed_since(since)
        )
        row = self._source.execute(statement).fetchone()
        return bool(row and row[0])

    def _advance(self, last: bytes) -> State:
        """Return the position after a row of an increment."""
        value = field(last, self._place(self.window.cursor))
        if value is None:
            return self._current
        id_column = self.window.id
        end = Position(value, field(last, self._place(id_column)) if id_column else None)
        if field(last, -1) == "t":
            moment = self._moment
            self._current = self._current._replace(
                cursor=end,
                snapshot_xmin=moment.snapshot_xmin,
                source=moment.source,
                horizon=moment.horizon,
            )
        if self.window.bound:
            self._current = self._current._replace(watermark=end)
        return self._current

    def _complete(self, current: State) -> State:
        """Return the position when all that the snapshot shows has landed."""
        pending, moment = self.window.pending, self._moment
        return current._replace(
            snapshot_xmin=moment.snapshot_xmin,
            horizon=moment.horizon,
            source=moment.source,
            pending_value=pending.value if pending else None,
            pending_at=pending.at if pending else None,
            watermark=current.cursor if self.window.bound else current.watermark,
        )

    def _top(self) -> Position | None:
        """Return the furthest position that the snapshot shows."""
        window = self.window
        # By the table's columns: a bare name would be that of the text that is selected.
        newest = [sql.Identifier("t", c.name) + sql.SQL(" desc") for c in window.columns]
        top = self._source.execute(
            sql.SQL("select {}::text, {} from {} t where {} is not null and {}").format(
                window.field,
                sql.SQL("{}::text").format(sql.Identifier(window.id.name))
                if window.id
                else sql.NULL,
                self._declared.name,
                window.field,
                window.held_back,
            )
            + sql.SQL(" order by {} limit 1").format(sql.SQL(", ").join(newest))
        ).fetchone()
        return Position(*top) if top else None

    def _select(self, where: sql.Composable, beyond: sql.Composable = TRUE) -> sql.Composable:
        return select(self.table, self._stream[:-1], where, beyond)

    def _limit(self) -> Limit:
        order = {column.name for column in self.window.columns}
        if any(key <= order for key in self.table.unique_keys):
            return Limit(self._batch_rows, BATCH_SIZE)
        # A position inside a tie, of rows that share the id as well, would lose the rest of it.
        places = [self._place(column) for column in self.window.columns]
        tied = lambda a, b: all(field(a, one) == field(b, one) for one in places)  # noqa: E731
        return Limit(self._batch_rows, BATCH_SIZE, tied)

    def _place(self, column: Column) -> int:
        return [one.name for one in self._stream].index(column.name)

    def _prefer_index(self) -> None:
        """Have an index on (cursor, id) read, where there is one: the first row comes at once.

        Otherwise the planner sorts first, for fear of random reads on a disk that turns.
        """
        self._source.execute(
            "select set_config('random_page_cost',"
            " least(current_setting('random_page_cost')::float8, 1.1)::text, true)"
        )

    def _refuse_nulls(self, order: tuple[Column, Column | None]) -> None:
        nulls = self._declared.cursor.nulls
        columns = [column for column in order if column and not column.not_null]
        if nulls == "load":
            columns = [column for column in columns if column is not order[0]]
        if not columns or nulls == "skip":
            return
        tests = sql.SQL(" or ").join(
            sql.SQL("{} is null").format(sql.Identifier(column.name)) for column in columns
        )
        row = self._source.execute(
            sql.SQL("select count(*) from {} where {}").format(self._declared.name, tests)
        ).fetchone()
        if row and row[0]:
            names = " or ".join(column.name for column in columns)
            raise SourceError(
                f"{self._key}: {row[0]} rows have no {names}, and cannot be ordered",
                hint=f"{self._declared.where}: set exporter.source.cursor.nulls to skip or load",
            )


def describe(definition: Definition, table: Table) -> str:
    """Return by what the table is read, for people. Raises SourceError where it cannot be."""
    require(table, "conflict_columns", definition.destination.conflict_columns)
    return f"by {cursor_columns(definition.source, table)[0].name}"
