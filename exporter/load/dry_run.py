"""What a load would read and write, the SQL included. Touches nothing: it only looks."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter.config.definition import Definition
from exporter.errors import DatabaseError
from exporter.load import first
from exporter.load.one import Load
from exporter.load.transfer import STAGED, select
from exporter.raw import landing
from exporter.raw import table as raw_table
from exporter.source import window
from exporter.source.catalog import planned_rows
from exporter.state import position as state
from exporter.state.position import State
from exporter.state.runs import Result
from exporter.terminal.console import Console
from exporter.wire.connection import connect
from exporter.wire.retry import first_line


class Rehearsal(NamedTuple):
    """What a load would do now. Statements are given as they would run."""

    definition: Definition
    path: str
    how: str
    stored: State
    safe: str | None
    horizon: str
    rows: int | None  # to be read, as the planner sees it
    rows_of_table: int | None
    changes: list[str]  # statements for raw, before a row lands
    source: list[str]
    ranges: int  # times that the first query of ``source`` would run, with other blocks
    raw: list[str]  # statements that land a batch
    holder: str | None  # who holds the lock now

    def as_dict(self) -> dict[str, object]:
        """Return what ``--json`` prints."""
        definition, stored = self.definition, self.stored
        return {
            "key": definition.key,
            "where": definition.where,
            "mode": definition.destination.mode,
            "batch_rows": definition.batch_rows,
            "path": self.path,
            "how": self.how,
            "cursor": state.as_dict(stored.cursor),
            "watermark": state.as_dict(stored.watermark),
            "horizon": self.horizon,
            "safe": self.safe,
            "rows_expected": self.rows,
            "rows_of_table": self.rows_of_table,
            "locked_by": self.holder,
            "changes": self.changes,
            "source": self.source,
            "ranges": self.ranges,
            "raw": self.raw,
        }

    def lines(self) -> list[str]:
        """Return the same for people; statements come whole, to be pasted."""
        definition, stored = self.definition, self.stored
        told = [
            f"{definition.key}: {self.path}, {self.how}",
            f"  definition  {definition.where}, {definition.destination.mode}, batches of"
            f" {definition.batch_rows:,} rows",
            f"  reads from  {stored.watermark or 'the start'}",
            f"  has landed  {stored.cursor or 'nothing yet'}",
            f"  open since  {self.horizon}: the oldest transaction at the source",
            f"  then from   {self.safe or 'the start'}: what the next load reads from",
            f"  rows        {_rows(self.rows)} of {_rows(self.rows_of_table)}, as the planner sees"
            " them",
        ]
        if self.holder:
            told.append(f"  locked by   {self.holder}")
        again = f" ({self.ranges:,} times, with other blocks)" if self.ranges != 1 else ""
        for title, statements in (
            ("raw before", self.changes),
            (f"source{again}", self.source),
            ("raw", self.raw),
        ):
            if statements:
                told += [f"  {title}:", *(textwrap.indent(f"{one};", "    ") for one in statements)]
        return told


def _rows(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def rehearse(
    definition: Definition, console: Console, *, full_refresh: bool, span: window.Span | None
) -> Rehearsal:
    """Return what ``load`` would do. Raises ExporterError."""
    try:
        return _rehearsed(definition, console, full_refresh, span)
    except psycopg.Error as error:
        raise DatabaseError(f"{definition.key}: {first_line(error)}") from None


def _rehearsed(
    definition: Definition, console: Console, full_refresh: bool, span: window.Span | None
) -> Rehearsal:

    def say(text: str, level: str = "warning", event: str = "notice", **values: object) -> None:
        console.say(text, level, key=definition.key, event=event, **values)

    with connect("DATABASE_URL_ANALYTICS") as destination, connect("DATABASE_URL_CORE") as source:
        destination.execute("set default_transaction_read_only = on")
        load = Load(definition, source, destination, Result(definition.key), say, _ignore, None)
        known = state.tables_exist(destination)
        load.stored = state.read(destination, definition.key) if known else State()
        with load.looking():
            before = state.remembered_columns(destination, definition.key) if known else None
            planned = raw_table.plan(destination, definition, load.table, load.hidden, before)
            for text in (*(change.said for change in planned.changes), *planned.told):
                say(text)
            load.set_out(planned.raw)
            return _seen(load, planned, _way(load, full_refresh, span))


def _ignore(rows: int, size: int, total: float | None) -> None:
    """No row is read, so there is no progress."""


class _Way(NamedTuple):
    path: str
    how: str
    source: list[sql.Composable]
    raw: list[sql.Composed]
    ranges: int = 1
    rows: int | None = None


def _seen(load: Load, planned: raw_table.Plan, way: _Way) -> Rehearsal:
    destination, source = load.destination, load.source
    key = raw_table.key_statement(destination, planned.raw)
    changes = [planned.creation, *(change.statement for change in planned.changes), key]
    return Rehearsal(
        definition=load.definition,
        path=way.path,
        how=way.how,
        stored=load.stored,
        safe=load.view.safe,
        horizon=load.horizon.oldest_open,
        rows=planned_rows(source, way.source[0]) if way.rows is None else way.rows,
        rows_of_table=_known(load),
        changes=[one.as_string(destination) for one in changes if one],
        source=[one.as_string(source) for one in way.source],
        ranges=way.ranges,
        raw=[one.as_string(destination) for one in way.raw],
        holder=state.holder(destination, load.definition),
    )


def _way(load: Load, full_refresh: bool, span: window.Span | None) -> _Way:
    transfer = load.transfer
    raw, stamp, order = transfer.raw, transfer.stamp_of(0), transfer.order
    staged = landing.statements(raw, stamp, order, onward=False)
    if span:
        return _Way("backfill", STAGED, [load.span_query(span)], staged)
    if load.is_first(full_refresh):
        empty, same = first.begun(load)
        plan = first.plan_first(load, empty=empty, same=same)
        since = load.view.xmin_since if same else None
        late = [select(raw, window.changed_since(since))] if since else []
        landed = [landing.copy_statement(raw)] if plan.direct else staged
        queries = [plan.first_query, *late]
        return _Way("first load", plan.way, queries, landed, plan.total, _known(load))
    if full_refresh:
        query = select(raw, window.held_back(load.view))
        landed = landing.replacements(raw, stamp, order)
        return _Way("full refresh", f"{STAGED}, in one transaction", [query], landed)
    landed = landing.statements(raw, stamp, order, onward=load.stored.cursor is not None)
    return _Way("increment", STAGED, [load.increment_query()], landed)


def _known(load: Load) -> int | None:
    return round(load.table.rows) if load.table.rows >= 0 else None
