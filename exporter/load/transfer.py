"""Batches into raw, each in one transaction with the position that it reaches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import NamedTuple

from psycopg import sql

from exporter import state
from exporter.config import Definition
from exporter.errors import DriftError
from exporter.raw import RawTable
from exporter.raw.landing import Staging
from exporter.raw.table import prepare
from exporter.source import Batch, Lands, Plan, Table, select
from exporter.state import Result, State, record
from exporter.terminal import Progress, Say
from exporter.wire import Block, Connection, ReadAhead, copy_out, one_batch

# What is done when the rows have landed, under the same lock and in the same snapshot.
After = Callable[["Transfer", Table], None]
_LOCK = sql.SQL("lock table {} in row exclusive mode")


class Attempt(NamedTuple):
    """One attempt at a load: its sessions, and where it counts and tells.

    ``session`` is the one on the source's database, which not every way of reading has.
    """

    definition: Definition
    session: Connection | None
    destination: Connection
    result: Result
    say: Say
    progress: Progress

    @property
    def source(self) -> Connection:
        """The session on the source's database, for what only a way of reading with one asks."""
        assert self.session is not None
        return self.session

    def tell_query(self, query: sql.Composable, count: int = 1) -> None:
        """Show what the source is asked for, ``count`` times with other blocks."""
        text = query.as_string(self.source)
        ranges = f" -- and so on, {count:,} ranges" if count != 1 else ""
        self.say(f"source: {text}{ranges}", "debug", "sql", sql=text)


class Transfer:
    """Lands what one attempt reads by a plan in a raw table."""

    def __init__(self, attempt: Attempt, plan: Plan, raw: RawTable) -> None:
        self.attempt = attempt
        self.plan = plan
        self.raw = raw
        self._destination = attempt.destination
        self._stamp = state.stamp(attempt.destination, plan.begin)
        self._expected = plan.rows

    def land(self, batches: Generator[Batch]) -> None:
        """Land batches, each in a transaction of its own with its position. Raises RowError."""
        plan, destination, totals = self.plan, self._destination, self.attempt.result.totals
        if plan.query is not None:
            self.attempt.tell_query(plan.query)
        staging = Staging(destination, self.raw, plan.stream, versions=plan.versions)
        before = self._rows_of_raw() if plan.lands is Lands.WHOLE else 0
        again = f"exporter load {self.raw.target.key} --full-refresh"
        with contextlib.closing(batches):
            for batch in batches:
                if batch.table:  # it has columns that those before it did not have
                    target = self.raw.target
                    self.raw = prepare(destination, target, batch.table, self.attempt.say)
                    staging = Staging(destination, self.raw, batch.stream, versions=plan.versions)
                stamp, number = self.stamp_of(totals.batches), totals.batches + 1
                with self._transaction():
                    # On disk by the commit that ends the load: a server that crashes before loses
                    # the position together with the rows, and they are read again.
                    destination.execute("set local synchronous_commit = off")
                    if plan.lands is Lands.WHOLE:  # to wait later would lose all that was read
                        destination.execute(_LOCK.format(self.raw.name))
                    for part in batch.parts:
                        # No reader gives them yet: passed over, they would be lost in silence.
                        if part.key != self.raw.target.key or part.gone:
                            raise NotImplementedError(
                                "rows of another table, or keys that are gone"
                            )
                        rows, size = staging.fill(self._counted(part.present), number)
                        # What the sweep reads, this load may have landed: it shares no key with it.
                        since = None if part.swept else self._stamp
                        written, gone = staging.apply(
                            plan.lands, stamp, number, plan.order, since=since
                        )
                        totals.add(rows, written, size)
                        totals.rows_swept += written if part.swept else 0
                        if plan.lands is Lands.WHOLE:
                            lost = gone if self.raw.key else before - written
                            refuse_more(self.raw.target.key, lost, before, plan.max_deletes, again)
                        totals.rows_deleted += gone if self.raw.key else 0
                    self.store(batch.reaches()._replace(exported_at=stamp), "running")

    def _rows_of_raw(self) -> int:
        count = sql.SQL("select count(*) from {}").format(self.raw.name)
        row = self._destination.execute(count).fetchone()
        return int(row[0]) if row else 0

    def land_at_once(self, table: Table, where: sql.Composable, stamp: str) -> int:
        """Land these rows in the running transaction; return how many were written."""
        attempt, totals = self.attempt, self.attempt.result.totals
        query = select(table, self.plan.stream[:-1], where)
        attempt.tell_query(query)
        number = totals.batches + 1
        staging = Staging(self._destination, self.raw, self.plan.stream)
        ahead = ReadAhead(lambda: copy_out(attempt.source, query, binary=False))
        try:
            rows, size = staging.fill(self._counted(one_batch(iter(ahead))), number)
        finally:
            ahead.stop(attempt.source)
        written, _ = staging.apply(Lands.ANY, stamp, number, self.plan.order)
        totals.add(rows, written, size)
        return written

    def store(self, now: State, status: str) -> None:
        """Write the position and the run's row, in the caller's transaction."""
        result = self.attempt.result
        state.write(self._destination, self.raw.target, now, self.plan.bound)
        result.cursor = now.cursor or result.cursor
        record(self._destination, result, status)

    def stamp_of(self, batch: int) -> str:
        """Return a batch's ``_exported_at``."""
        return state.later(self._stamp, batch)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One batch. What is rolled back does not count."""
        result = self.attempt.result
        before, cursor = replace(result.totals), result.cursor
        try:
            with self._destination.transaction():
                yield
        except BaseException:
            result.totals, result.cursor = before, cursor
            raise

    def _counted(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Pass the blocks of a batch on, and tell the progress at each."""
        totals, progress = self.attempt.result.totals, self.attempt.progress
        rows, size = totals.rows_read, totals.bytes
        progress(rows, size, self._expected)
        for block in blocks:
            rows += block.rows
            size += len(block.data)
            progress(rows, size, self._expected)
            yield block
            del block


def refuse_more(key: str, extra: int, rows: int, most: float, command: str) -> None:
    """Raise DriftError where more than ``most`` percent of raw's rows would go.

    A source that is empty by accident, or hides its rows from this role, must not empty raw.
    """
    share = 100 * extra / max(rows, 1)
    if share > most:
        raise DriftError(
            f"{key}: {extra:,} of the {rows:,} rows of raw ({share:.0f} %) are gone at the source,"
            f" more than --max-deletes {most:g} allows: none was deleted",
            hint=f"if they have to go: {command} --max-deletes {math.ceil(share)}",
        )
