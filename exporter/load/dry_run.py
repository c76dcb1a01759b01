"""What a load would read and write, the SQL included. Touches nothing: it only looks."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter import state
from exporter.config import Definition
from exporter.errors import DatabaseError
from exporter.load import worth
from exporter.load.one import tell_plan
from exporter.load.transfer import Attempt
from exporter.raw import statements
from exporter.raw import table as raw_table
from exporter.raw.table import Preparation
from exporter.source import Plan, Reader, Table, Wanted, keyed, reader_of
from exporter.source.lookup import planned_rows
from exporter.state import Binding, Position, Result, State
from exporter.terminal import Console
from exporter.wire import Sessions, first_line


class Outlook(NamedTuple):
    """What a load finds before its first row, and what it would do for that one to land."""

    definition: Definition
    table: Table
    planned: Preparation
    key: sql.Composed | None  # gives raw its primary key
    plan: Plan
    stored: State


class Rehearsal(NamedTuple):
    """What a load would do now, as ``--json`` has it. Statements are given as they would run."""

    key: str
    where: str
    mode: str
    batch_rows: int
    path: str
    how: str
    by_transaction: bool  # of the rows, and not by a cursor
    cursor: Position | None
    watermark: Position | None
    horizon: str
    safe: str | None
    rows_expected: int | None  # to be read, as the planner sees it
    rows_of_table: int | None
    locked_by: str | None
    changes: list[str]  # statements for raw, before a row lands
    source: list[str]
    ranges: int  # times that the first query of ``source`` would run, with other blocks
    raw: list[str]  # statements that land a batch
    slot: dict[str, object] | None = None  # of changes: what would be done with it
    why_copied: str | None = None  # of changes: why the table is read whole; None: it is not

    def as_dict(self) -> dict[str, object]:
        """Return what ``--json`` prints."""
        cursor, watermark = state.as_dict(self.cursor), state.as_dict(self.watermark)
        return self._asdict() | {"cursor": cursor, "watermark": watermark}

    @property
    def _position(self) -> list[str]:
        if self.slot and self.why_copied is None:
            return [f"  reads from  {self.cursor or 'the start'} of the WAL"]
        if self.slot:
            return [f"  copied      {self.why_copied}"]
        if self.by_transaction:
            return [f"  reads from  {f'transaction {self.cursor}' if self.cursor else 'the start'}"]
        found = [
            f"  reads from  {self.watermark or 'the start'}",
            f"  has landed  {self.cursor or 'nothing yet'}",
        ]
        if self.horizon:
            found += [
                f"  open since  {self.horizon}: the oldest transaction at the source",
                f"  then from   {self.safe or 'the start'}: what the next load reads from",
            ]
        return found

    def lines(self) -> list[str]:
        """Return the same for people; statements come whole, to be pasted."""
        found = [
            f"{self.key}: {self.path}, {self.how}",
            f"  definition  {self.where}, {self.mode}, batches of {self.batch_rows:,} rows",
            *self._position,
        ]
        if self.source:
            expected, of_table = _rows(self.rows_expected), _rows(self.rows_of_table)
            found.append(f"  rows        {expected} of {of_table}, as the planner sees them")
        if self.locked_by:
            found.append(f"  locked by   {self.locked_by}")
        again = f" ({self.ranges:,} times, with other blocks)" if self.ranges != 1 else ""
        for title, group in (
            ("raw before", self.changes),
            (f"source{again}", self.source),
            ("raw", self.raw),
        ):
            if group:
                texts = [textwrap.indent(f"{one};", "    ") for one in group]
                found += [f"  {title}:", *texts]
        return found


def _rows(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def rehearse(definition: Definition, console: Console, wanted: Wanted) -> Rehearsal:
    """Return what ``load`` would do. Raises ExporterError."""

    def say(text: str, level: str = "warning", event: str = "notice", **values: object) -> None:
        console.say(text, level, key=definition.key, event=event, **values)

    try:
        with (
            Sessions() as sessions,
            sessions.opened(definition.source.variable) as (destination, core),
        ):
            destination.execute("set default_transaction_read_only = on")
            result = Result(definition.key)
            attempt = Attempt(definition, core, destination, result, say, lambda *_: None)
            with foreseen(attempt, wanted) as outlook:
                tell_plan(attempt, outlook.plan, outlook.stored)
                return described(attempt, outlook)
    except psycopg.Error as error:
        raise DatabaseError(f"{definition.key}: {first_line(error)}") from None


@contextlib.contextmanager
def foreseen(
    attempt: Attempt, wanted: Wanted, reader: Reader | None = None, stored: State | None = None
) -> Iterator[Outlook]:
    """Take the steps of a load up to its first row, without changing anything.

    ``reader`` and ``stored`` stand in for what the load would find. What a person should know is
    told. Raises what the load would raise: ExporterError, psycopg.Error.
    """
    destination = attempt.destination
    target = attempt.definition.destination
    known = state.tables_exist(destination)
    if stored is None:
        stored = state.read(destination, target) if known else State()
    before = state.remembered_columns(destination, target) if known else None
    old_key = stored.binding.reading.keys if stored.binding else ()
    reader = reader or reader_of(attempt.definition, attempt.session)
    with reader.opened(stored, destination) as table:
        attempt = attempt._replace(definition=keyed(attempt.definition, table))
        target = attempt.definition.destination
        if not wanted.full_refresh:
            worth.refuse_elsewhere(attempt, stored, reader)
        planned = raw_table.plan(destination, target, table, before)
        for text in (*(change.said for change in planned.changes), *planned.notices):
            attempt.say(text)
        oid, empty = raw_table.oid_and_emptiness(destination, target)
        binding = Binding(reader.found, oid, reader.reading())
        stored, wanted, _ = worth.weigh(attempt, stored, reader, binding, wanted, empty=empty)
        plan = reader.plan(stored, planned.raw, wanted, empty=empty)
        key = raw_table.key_statement(destination, planned.raw, old_key)
        yield Outlook(attempt.definition, table, planned, key, plan, stored)


def described(attempt: Attempt, outlook: Outlook) -> Rehearsal:
    """Return what a load would do, from what it finds."""
    definition, table, planned, key, plan, stored = outlook
    destination = attempt.destination
    blocks, stamp = plan.blocks, state.stamp(destination, stored)
    changes = [planned.creation, *(change.statement for change in planned.changes), key]
    queries: list[sql.Composable] = [plan.query] if plan.query is not None else []
    landed: Sequence[sql.Composable] = ()
    if planned.raw.columns:
        landed = statements.landing(planned.raw, plan.lands, stamp, plan.order)
    rows_of_table = round(table.rows) if table.rows >= 0 else None
    if blocks:
        queries.insert(0, blocks.query(blocks.first, stamp))
        landed = [statements.copy_statement(planned.raw)] if blocks.direct else landed
    expected = planned_rows(attempt.source, queries[0]) if queries else None
    return Rehearsal(
        key=definition.key,
        where=definition.where,
        mode=definition.destination.mode,
        batch_rows=definition.batch_rows,
        path=plan.path,
        how=plan.how(),
        by_transaction=plan.horizon is not None and not plan.order,
        cursor=stored.cursor,
        watermark=stored.watermark,
        horizon=plan.horizon.oldest_open if plan.horizon else "",
        safe=plan.bound.value if plan.bound else None,
        rows_expected=rows_of_table if blocks else expected,
        rows_of_table=rows_of_table,
        locked_by=state.holder(destination, definition.destination),
        changes=[one.as_string(destination) for one in changes if one],
        source=[one.as_string(attempt.session) for one in queries]
        or list(filter(None, [plan.call])),
        ranges=blocks.total if blocks else 1,
        raw=[one.as_string(destination) for one in landed],
    )
