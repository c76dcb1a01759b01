"""Reading by the cursor: what is new, what may have come late, a span again, or everything.

A table that is small, or has no index on the cursor, is also scanned for the rows of new
transactions; a larger one is swept for them.
"""

from __future__ import annotations

from collections.abc import Generator

from psycopg import sql

from exporter.config import Cursor, Definition
from exporter.errors import SourceError, UsageError
from exporter.source import sweep
from exporter.source.blocks import select
from exporter.source.reader import Batch, Lands, Plan, Target, Wanted
from exporter.source.relation import BATCH_SIZE, RelationReader
from exporter.source.snapshot import TRUE, changed_since
from exporter.source.table import Column
from exporter.source.window import (
    Span,
    Window,
    advice,
    cursor_columns,
    decide,
    is_scanned,
    newest_number,
)
from exporter.state import Judgement, Position, Reading, Round, State, Worth
from exporter.wire import Connection, Limit, field


class CursorReader(RelationReader):
    """Reads a table by its cursor."""

    way = "cursor"

    def __init__(self, source: Connection, definition: Definition, cursor: Cursor) -> None:
        super().__init__(source, definition)
        self._cursor = cursor
        self._round: tuple[Round, int] | None = None  # what the sweep looks at in this load
        self._scans = False  # all of the table

    def _look_before(self) -> None:
        self._seen = newest_number(self._source, self._declared)

    def _refuse(self, *, rows: bool) -> None:
        columns = cursor_columns(self._declared, self.table)
        if rows:
            self._refuse_nulls(columns)

    def reading(self) -> Reading:
        """See ``Reader``."""
        cursor = self._cursor
        plain = super().reading()
        return plain._replace(cursor=cursor.field, id_field=cursor.id_field, nulls=cursor.nulls)

    def doubt(self, stored: State) -> Judgement:
        """See ``Reader``."""
        if stored.cursor is None:
            return Judgement(Worth.ONWARD)
        window = self._window(stored)
        behind = sql.SQL("({}) is not true").format(window.after(stored.cursor))
        if self._brings(stored, behind):
            return Judgement(
                Worth.REREAD,
                f"{self._declared.schema}.{self._declared.table} has a new partition with rows"
                " behind the position: everything is read once, and compared with raw",
            )
        return self._doubt_newest(window, stored.cursor)

    def plan(
        self, stored: State, target: Target, wanted: Wanted, *, empty: bool, shared: bool = False
    ) -> Plan:
        """See ``Reader``."""
        del shared  # an increment is read in the cursor's order
        self._stored = self._current = stored
        self._fills = empty and stored.cursor is None
        self.window = window = self._window(stored)
        self._advances = False
        plan = Plan(
            path="",
            stream=self._stream(target, window.columns),
            order=window.columns,
            begin=stored,
            bound=window.bound,
            horizon=self.horizon,
            unseen=self._unseen(),
        )
        self._columns = plan.stream
        if wanted.span:
            return self._backfill(plan, wanted.span)
        if wanted.sweep and self._append:
            raise UsageError(
                f"{self._definition.where}: {self._key} is append-only: swept, its rows could be"
                " there twice",
                hint=f"exporter load {self._key} without --sweep",
            )
        if self._is_first(stored, target, wanted, empty=empty):
            return self._first(plan, target, empty=empty)
        if wanted.full_refresh:
            return self._whole(plan._replace(max_deletes=wanted.max_deletes))
        return self._increment(plan, wanted)

    def batches(self, plan: Plan) -> Generator[Batch]:
        """See ``Reader``."""
        if plan.query is not None and plan.lands is not Lands.WHOLE:
            self._prefer_index()
        yield from super().batches(plan)
        self._advances = False
        if self._round:
            columns, limit = plan.stream[:-1], Limit(self._batch_rows, BATCH_SIZE)
            for part in sweep.parts(*self._round, self.table, self._snapshot):
                self._refuse_shared(part)
                query = part(columns)
                yield from self._batches_of(query, limit, swept=True)

    def in_flight(self, stored: State) -> sql.Composable:
        """See ``Reader``."""
        window = self._window(stored)._replace(append=False)  # what is held back will land, too
        onward = window.onward(stored.cursor, stored.watermark)
        if self._is_scanned and window.since:
            return sql.SQL("({} or {})").format(onward, self._changed(window.since))
        return onward

    def adopted(self, stored: State) -> State:
        """See ``Reader``."""
        return stored._replace(snapshot_xmin=None, source=None, sweep=sweep.everything())

    # -- the ways

    def _backfill(self, plan: Plan, span: Span) -> Plan:
        """Read a span again. The position stays as it is."""
        self._where = where = self.window.within(self._source, span)
        self._finish = lambda: self._stored
        query = self._select(where) + self.window.order
        return plan._replace(path="backfill", query=query)

    def _whole(self, plan: Plan) -> Plan:
        """Read everything as one batch."""
        self._finish = lambda: self._complete(State(cursor=self._top()))
        query = self._select(self.window.held_back)
        rows = self.table.rows
        return plan._replace(path="full refresh", query=query, lands=Lands.WHOLE, rows=rows)

    def _increment(self, plan: Plan, wanted: Wanted) -> Plan:
        """Read from the watermark on, and tell of each row whether it lies beyond the cursor.

        What the cursor has passed over is found by a scan, or by the sweep's share of this load.
        After a whole sweep the position is that of the newest row, which may lie behind it.
        """
        stored, window, table = self._stored, self.window, self.table
        self._advances = True
        self._finish = lambda: self._complete(
            self._current._replace(cursor=self._top()) if wanted.sweep else self._current
        )
        beyond = window.after(stored.cursor) if stored.cursor else TRUE
        where = window.onward(stored.cursor, stored.watermark)
        self._scans = bool(stored.cursor and self._is_scanned and window.since)
        if self._scans and window.since:
            where = sql.SQL("({} or {})").format(where, self._changed(window.since))
        elif stored.cursor and not self._append:
            if wanted.sweep and not table.has_xmin:
                where = TRUE
            elif table.has_xmin:
                self._round = self._due(wanted)
        self._where = where
        query = self._select(where, beyond) + window.order
        return plan._replace(
            path="increment",
            query=query,
            lands=Lands.BEYOND if stored.cursor else Lands.ANY,
            rows=self.table.rows if stored.watermark is None else None,
            size=table.size if self._scans else None,
            swept=self._round[1] - self._round[0].place if self._round else 0,
            passed_over=advice(self._declared, window.cursor),
            reconciles=self._scans and self._definition.destination.deletes != "ignore",
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

    @property
    def _is_scanned(self) -> bool:
        """Whether a read of the whole table is small, or spared by nothing."""
        return is_scanned(self._declared, self.table) and not self._append

    def _changed(self, since: str) -> sql.Composable:
        """Return the condition for rows of new transactions, whatever their cursor is."""
        changed = changed_since(since)
        if self._cursor.nulls == "load":
            return changed
        return sql.SQL("({} and {} is not null)").format(
            changed, sql.Identifier(self._cursor.field)
        )

    def _due(self, wanted: Wanted) -> tuple[Round, int] | None:
        """Return what the sweep looks at in this load."""
        within = None if wanted.sweep else self._declared.sweep
        if within is None and not wanted.sweep:
            return None
        last = self._stored.sweep or self._over()
        return sweep.due(last, self.table, self._snapshot, self.horizon, within)

    def _over(self) -> Round:
        """Return the sweep's state when all that is older than the stored snapshot has landed."""
        since = self._stored.snapshot_xmin if self.window.since else None
        return sweep.over(self._snapshot, self.horizon, since)

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
                " GRANT pg_read_all_stats TO the role of"
                f" {self._declared.variable}"
            )
        return ""

    def _doubt_newest(self, window: Window, cursor: Position) -> Judgement:
        """Whether the newest row lies behind the position: rows are gone, or ids began anew."""
        if self._is_scanned and window.since:
            return Judgement(Worth.ONWARD)  # what changed is read by xmin in any case
        at_least = sql.SQL("{} >= {}").format(window.field, window.literal(cursor.value))
        name = self._declared.name
        if self._any(name, at_least) or not self._any(name):
            return Judgement(Worth.ONWARD)
        if self._append and not (window.since and self._any(name, changed_since(window.since))):
            return Judgement(Worth.ONWARD)  # rows of the log were removed, none came
        return Judgement(
            Worth.SWEEP,
            f"the newest {window.cursor.name} at the source lies behind the position {cursor}:"
            " rows are gone, or numbers began anew; what changed since is read by xmin",
        )

    def _reached(self, last: bytes) -> State:
        """Return the position after a row: that of an increment advances it."""
        if not self._advances:
            return self._current
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
        swept = current.sweep
        if self._round:
            swept = sweep.ended(*self._round, self.table)
        elif self._scans:
            swept = sweep.over(self._snapshot, self.horizon)
        return current._replace(
            sweep=swept or self._over(),
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
        return select(self.table, self._columns[:-1], where, beyond)

    def _limit(self) -> Limit:
        order = {column.name for column in self.window.columns}
        if any(key <= order for key in self.table.unique_keys):
            return Limit(self._batch_rows, BATCH_SIZE)
        # A position inside a tie, of rows that share the id as well, would lose the rest of it.
        places = [self._place(column) for column in self.window.columns]
        tied = lambda a, b: all(field(a, one) == field(b, one) for one in places)  # noqa: E731
        return Limit(self._batch_rows, BATCH_SIZE, tied)

    def _place(self, column: Column) -> int:
        return [one.name for one in self._columns].index(column.name)

    def _prefer_index(self) -> None:
        """Have an index on (cursor, id) read, where there is one: the first row comes at once.

        Otherwise the planner sorts first, for fear of random reads on a disk that turns.
        """
        self._source.execute(
            "select set_config('random_page_cost',"
            " least(current_setting('random_page_cost')::float8, 1.1)::text, true)"
        )

    def _refuse_nulls(self, order: tuple[Column, Column | None]) -> None:
        nulls = self._cursor.nulls
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
