"""Reading by scan: the rows of new transactions, whatever is in them.

PostgreSQL keeps with each row version the transaction that wrote it, ``xmin``. What was written
before the oldest transaction that was open at the last snapshot had landed by then; the rest is
looked at again. No column has to grow, and no clock is asked.
"""

from __future__ import annotations

import sys

from psycopg import sql

from exporter.config import Definition
from exporter.errors import SourceError, UsageError
from exporter.source.blocks import Blocks, select
from exporter.source.catalog import require
from exporter.source.reader import Lands, Plan, Target, Wanted
from exporter.source.relation import BATCH_SIZE, RelationReader
from exporter.source.snapshot import TRUE, changed_since
from exporter.state import Judgement, Position, State, Worth
from exporter.wire import Connection, Limit

_SHARED = 8192  # blocks, 64 MB: worth to be read by several sessions
_STEP = 4096  # blocks of a range: few of their rows travel
_EPOCH = 2**32  # transactions, after which a row that was never changed can look new


class ScanReader(RelationReader):
    """Reads a table by the transactions of its rows.

    A mirror gets what was written since the last snapshot began. A log that has no key gets, once,
    what was written by transactions that had ended when this snapshot began: those are all that
    are older than the oldest one that is open.
    """

    way = "scan"

    def __init__(self, source: Connection, definition: Definition) -> None:
        super().__init__(source, definition)
        self._empty = False

    def doubt(self, stored: State) -> Judgement:
        """See ``Reader``."""
        if stored.cursor is None:
            return Judgement(Worth.ONWARD)
        name = f"{self._declared.schema}.{self._declared.table}"
        if self._snapshot.since is None:
            return Judgement(
                Worth.REREAD,
                f"the position tells nothing of the transactions of {name}: everything is read"
                " once, and compared with raw",
            )
        if self._brings(stored, self._old):
            return Judgement(
                Worth.REREAD,
                f"{name} has a new partition with rows older than the position: everything is"
                " read once, and compared with raw",
            )
        if self._append and self._is_written_anew(stored):
            return Judgement(
                Worth.REREAD,
                f"{name} was written anew, as ALTER TABLE and TRUNCATE do: which of its rows had"
                " landed cannot be told",
            )
        return Judgement(Worth.ONWARD)

    def plan(
        self, stored: State, target: Target, wanted: Wanted, *, empty: bool, shared: bool = False
    ) -> Plan:
        """See ``Reader``."""
        if wanted.span:
            raise UsageError(
                f"{self._definition.where}: {self._key} is scanned, and has no cursor for --since"
                " and --until",
                hint=f"exporter load {self._key} reads what has changed;"
                f" exporter verify {self._key} --repair mends what differs",
            )
        self._empty = empty
        self._fills = empty and stored.cursor is None
        self._current = stored
        plan = Plan(
            path="",
            stream=self._stream(target),
            order=(),
            begin=stored,
            horizon=self.horizon,
        )
        deletes = self._definition.destination.deletes != "ignore"
        if self._is_first(stored, target, wanted, empty=empty):
            # Into an empty raw, nothing lands that is gone.
            first = self._first(plan, target, empty=empty)
            return first._replace(reconciles=deletes and not empty)
        self._finish = lambda: self._complete(State(cursor=self._top()))
        if wanted.full_refresh or (self._append and stored.is_first):
            plan = plan._replace(max_deletes=wanted.max_deletes if wanted.full_refresh else 100)
            query = select(self.table, plan.stream[:-1], self._ended)
            rows = self.table.rows
            return plan._replace(path="full refresh", query=query, lands=Lands.WHOLE, rows=rows)
        since = self._snapshot.since if stored.cursor else None
        return self._scan(plan._replace(reconciles=deletes), since, shared and target.keyed)

    def in_flight(self, stored: State) -> sql.Composable:
        """See ``Reader``."""
        since = self._snapshot.since
        return changed_since(since) if since and stored.cursor else TRUE

    def adopted(self, stored: State) -> State:
        """See ``Reader``."""
        if self._append:  # its rows are told by their transactions alone: all of them have landed
            return stored._replace(
                cursor=self._top(),
                snapshot_xmin=self._snapshot.xmin,
                source=self._moment.source,
                file=self.table.file,
            )
        return stored._replace(snapshot_xmin=None, source=None)

    def _scan(self, plan: Plan, since: str | None, shared: bool) -> Plan:
        """Read what was written since the last snapshot began; everything where that is unknown."""
        changed = changed_since(since) if since else TRUE
        self._where = where = sql.SQL("{} and {}").format(changed, self._ended)
        rows = None if since else self.table.rows
        plan = plan._replace(path="scan", rows=rows)
        if shared and self.table.in_blocks and self.table.blocks > _SHARED and not self._append:
            blocks = Blocks(self.table, plan.stream[:-1], False, 0, _STEP, where)
            return plan._replace(begin=plan.begin._replace(next_block=0), blocks=blocks)
        before = plan.begin.binding.source.next_xid if plan.begin.binding else None
        # What began after the last snapshot cannot be in raw: it is not joined with it first.
        new = changed_since(str(before)) if since and before else sql.SQL("false")
        query = select(self.table, plan.stream[:-1], where, new)
        return plan._replace(query=query, lands=Lands.BEYOND if since else Lands.ANY)

    @property
    def _ended(self) -> sql.Composable:
        """The condition for rows whose transactions had ended: of a log, the others come later."""
        if not self._append:
            return TRUE
        return sql.SQL("not {}").format(changed_since(self._snapshot.xmin))

    @property
    def _lands_once(self) -> bool:
        return self._append

    def _refuse(self, *, rows: bool) -> None:
        declared = self._declared
        name = f"{declared.schema}.{declared.table}"
        if "xmin" in self.table.unreadable:
            raise SourceError(
                f"{declared.where}: {declared.variable}'s role may not read xmin of {name}, by"
                " which it is scanned",
                hint=f"grant select (xmin) on {declared.name.as_string(None)} to it",
            )
        if not self.table.has_xmin:
            kind = {"v": "a view", "f": "a foreign table"}.get(self.table.kind)
            raise SourceError(
                f"{declared.where}: {name} is {kind or 'made of foreign tables'}, whose rows do not"
                " tell their transactions: it cannot be scanned",
                hint="exporter.source.cursor: a column that grows with every change",
            )
        if self._append and int(self._snapshot.xmax) >= _EPOCH:
            raise SourceError(
                f"{declared.where}: {name} has no cursor, and its server has had more than 2^32"
                " transactions: old rows of the log could be taken for new ones",
                hint="exporter.source.cursor: a column that grows, or exporter.conflict_columns",
            )
        require(self.table, "conflict_columns", self._definition.destination.conflict_columns)

    def _top(self) -> Position | None:
        if self._empty and not self._any(self._declared.name):
            return None
        return Position(self._snapshot.xmin)

    def _complete(self, current: State) -> State:
        return self._moment._replace(
            cursor=Position(self._snapshot.xmin) if current.cursor else None,
            snapshot_xmin=self._snapshot.xmin,
            file=self.table.file if self._append else None,
        )

    def _reached(self, last: bytes) -> State:
        return self._finish() if self._append else self._current

    def _limit(self) -> Limit:
        # A log's rows land in one transaction: of half of them nobody could tell which half.
        most = sys.maxsize
        return Limit(most, most) if self._append else Limit(self._batch_rows, BATCH_SIZE)

    def _is_written_anew(self, stored: State) -> bool:
        """Whether old rows of a log may have got a new transaction."""
        if stored.file is None or stored.file == self.table.file:
            return False
        before = {one.partition("@")[0] for one in stored.file.split(", ")}
        return any(
            not heap.readable or (self._any_in(heap) and not self._any_in(heap, self._old))
            for heap in self.table.heaps
            if heap.file not in before
        )

    @property
    def _old(self) -> sql.Composable:
        """The condition for rows that had landed before, by their transactions."""
        return sql.SQL("not {}").format(changed_since(self._snapshot.since or "0"))
