"""One load: definition → window → copy → land → record."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from exporter.config.definition import Definition
from exporter.errors import DatabaseError, ExporterError, SourceError
from exporter.load.transfer import STAGED, Transfer, select
from exporter.raw import table as raw_table
from exporter.source import window
from exporter.source.catalog import Column, Table, find_table
from exporter.state import position as state
from exporter.state.position import Position, State
from exporter.state.runs import Result, Totals, record_failure, take_counts
from exporter.terminal import signals
from exporter.terminal.console import Console, Progress, Say
from exporter.wire.connection import Connection, Sessions, connect, stopped_in_order
from exporter.wire.copy import field
from exporter.wire.retry import first_line, with_retries

if TYPE_CHECKING:
    from exporter.load.ranges import Crew


def load(
    definition: Definition,
    console: Console,
    sessions: Sessions,
    *,
    full_refresh: bool = False,
    span: window.Span | None = None,
    after: Callable[[Load], None] | None = None,
    command: str = "load",
    crew: Crew | None = None,
) -> Result:
    """Land what is new of one definition, on sessions that the next load may use again.

    Never raises ExporterError: the result carries it.

    A KeyboardInterrupt ends it in order, and is carried as ``StoppedError``.

    A full refresh reads everything, and removes from raw what is gone at the source. A span is
    read again whatever the stored position is, and leaves it alone. ``after`` is called when the
    rows have landed, under the same lock and in the same snapshot; ``command`` is what the record
    of runs calls it all. Raises NotByRanges where the crew does nothing else.
    """
    result = Result(definition.key, _command(command, full_refresh, span))

    def say(text: str, level: str = "warning", event: str = "notice", **values: object) -> None:
        if level == "warning":
            result.notices.append(text)
        console.say(text, level, key=definition.key, event=event, **values)

    def attempt() -> None:
        with contextlib.ExitStack() as stack:
            destination, source = stack.enter_context(sessions.pair())
            if crew:
                stack.enter_context(crew.watching(destination, source))
            progress = functools.partial(console.progress, definition.key)
            one = Load(definition, source, destination, result, say, progress, crew)
            with stopped_in_order(source, destination):
                one.run(full_refresh, span, after)

    try:
        with_retries(attempt, lambda why: say(f"{why}; connecting again", event="retry"))
    except psycopg.Error as error:
        result.error = DatabaseError(
            f"{definition.key}: {first_line(error)}",
            hint=f"what has landed is kept; exporter load {definition.key} goes on from there",
        )
    except ExporterError as error:
        result.error = error
    except KeyboardInterrupt as stop:
        result.error = signals.reason(stop, f"{definition.key}: interrupted")
    if result.error:
        with (
            contextlib.suppress(psycopg.Error, ExporterError),
            connect("DATABASE_URL_ANALYTICS") as destination,
        ):
            record_failure(destination, result)
    result.seconds = time.monotonic() - result.began
    return result


def _command(command: str, full_refresh: bool, span: window.Span | None) -> str:
    words = [command]
    if full_refresh:
        words.append("--full-refresh")
    if span:
        words += ["--since", span.since] if span.since else []
        words += ["--until", span.until] if span.until else []
    return " ".join(words)


@contextlib.contextmanager
def reading(source: Connection, definition: Definition) -> Iterator[None]:
    """Open the transaction that reads: one snapshot, of a table that nobody rewrites meanwhile.

    Raises SourceError.
    """
    table = definition.source.name
    begin = sql.SQL("begin isolation level repeatable read read only")
    try:
        # Locked before the snapshot is taken: a table that is rewritten between the two looks
        # empty to the snapshot, and the watermark would pass its rows.
        source.execute(begin + sql.SQL("; lock table {} in access share mode").format(table))
    except (psycopg.errors.UndefinedTable, psycopg.errors.WrongObjectType):
        source.execute(sql.SQL("rollback; ") + begin)
    except psycopg.errors.InsufficientPrivilege as error:
        raise SourceError(
            f"{definition.where}: {first_line(error)}",
            hint=f"grant select on {table.as_string(source)} to DATABASE_URL_CORE's role",
        ) from None
    yield
    source.execute("commit")


class Load:
    """The two sessions of an attempt, and what they work on."""

    def __init__(
        self,
        definition: Definition,
        source: Connection,
        destination: Connection,
        result: Result,
        say: Say,
        progress: Progress,
        crew: Crew | None,
    ) -> None:
        self.definition = definition
        self.source = source
        self.destination = destination
        self.result = result
        self.say = say
        self.progress = progress
        self.crew = crew

    def run(
        self,
        full_refresh: bool,
        span: window.Span | None,
        after: Callable[[Load], None] | None,
    ) -> None:
        """Read onward from the stored position; or everything; or a span."""
        definition, destination = self.definition, self.destination
        state.create_tables(destination)
        state.lock(destination, definition)
        self.stored = state.read(destination, definition.key)
        if self.stored.run is not None:  # a first load that did not end
            from exporter.state import fence  # noqa: PLC0415  what most loads do not need

            fence.close(destination, definition)
            self.stored = state.read(destination, definition.key)
        if self.result.run_id is not None and not take_counts(destination, self.result):
            self.result.totals = Totals()  # connected again, to a server that lost all of it
        self.result.cursor = self.stored.cursor
        with self.looking():
            table = self.table
            raw = raw_table.prepare(destination, definition, table, self.hidden, self.say)
            self.set_out(raw)
            first = not span and self.is_first(full_refresh)
            if not first and self.crew and self.crew.ranges_only:
                from exporter.load.ranges import NotByRanges  # noqa: PLC0415  a cluster has it already

                raise NotByRanges
            if not first:
                raw_table.ensure_key(destination, raw)
            if span:
                self._backfill(span)
            elif full_refresh and not first:
                self._replace(table)
            else:
                current = self._first() if first else self._increment(table)
                final = self._finished(current)
                with self.destination.transaction():
                    self.transfer.store(final, "ok")
            if after:
                after(self)

    # -- the pieces, in the order of the sequence above

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """See what there is to read, and may be read. Reads alone."""
        definition, source = self.definition, self.source
        self.horizon = window.observe(source, definition, self.stored)
        if self.horizon.blind:
            self.say(
                "the transactions of other roles are hidden, only the lookback covers them;"
                " GRANT pg_read_all_stats TO the role of DATABASE_URL_CORE"
            )
        with reading(source, definition):
            self.table = find_table(source, definition, self.destination)
            self.snapshot = window.take_snapshot(source, self.stored, self.horizon)
            self.view = window.decide(
                source, definition, self.table, self.stored, self.horizon, self.snapshot
            )
            self._tell_window()
            self._refuse_nulls(self.view)
            yield

    @property
    def hidden(self) -> list[Column]:
        """What is read beside raw's columns: the place in the order, and whether it is new."""
        return [one for one in (self.view.cursor, self.view.id, raw_table.PAST) if one]

    def set_out(self, raw: raw_table.Raw) -> None:
        """Make ready to land rows in the raw table, whatever the way."""
        self.transfer = Transfer(
            self.definition,
            self.source,
            self.destination,
            self.result,
            self.view,
            raw,
            state.stamp(self.destination, self.stored),
            self.say,
            self.progress,
        )

    def _tell_window(self) -> None:
        stored, horizon, view = self.stored, self.horizon, self.view
        self.say(
            f"reads from {stored.watermark or 'the start'}, has landed up to"
            f" {stored.cursor or 'nothing yet'}; transactions are open since {horizon.oldest_open},"
            f" the next load reads from {view.safe or 'the start'} on",
            "debug",
            "window",
            cursor=stored.cursor,
            watermark=stored.watermark,
            horizon=horizon.oldest_open,
            clock=horizon.clock,
            safe=view.safe,
            standby=horizon.standby,
        )

    def tell_path(self, path: str, how: str) -> None:
        """Tell, where it is asked for, which way the rows take."""
        self.say(f"{path}: {how}", "debug", "path", path=path, how=how)

    def _refuse_nulls(self, view: window.Window) -> None:
        definition = self.definition
        columns = [c for c in (view.cursor, view.id) if c and not c.not_null]
        if definition.source.cursor.nulls == "load":
            columns = [c for c in columns if c is not view.cursor]
        if not columns or definition.source.cursor.nulls == "skip":
            return
        tests = sql.SQL(" or ").join(
            sql.SQL("{} is null").format(sql.Identifier(column.name)) for column in columns
        )
        row = self.source.execute(
            sql.SQL("select count(*) from {} where {}").format(definition.source.name, tests)
        ).fetchone()
        if row and row[0]:
            names = " or ".join(column.name for column in columns)
            raise SourceError(
                f"{definition.key}: {row[0]} rows have no {names}, and cannot be ordered",
                hint=f"{definition.where}: set exporter.source.cursor.nulls to skip or load",
            )

    def is_first(self, full_refresh: bool) -> bool:
        """Whether this load is a first one that is read by blocks, or goes on with one."""
        raw, stored = self.transfer.raw, self.stored
        if not self.table.in_blocks or not raw.unique_at_source or not raw.key:
            return False
        if stored.next_block is not None:
            return not full_refresh  # what has landed may be gone at the source
        return stored.cursor is None and raw_table.is_empty(self.destination, raw)

    def _first(self) -> State:
        from exporter.load.first import land_first  # noqa: PLC0415  what most loads do not need

        return land_first(self)

    def _backfill(self, span: window.Span) -> None:
        """Land a span again. Only the last stamp is remembered: it may never go backwards."""
        current = self.stored
        self.tell_path("backfill", STAGED)
        self._prefer_index()
        self.transfer.land(self.span_query(span), lambda _: current)
        stamp = self.transfer.stamp_of(self.result.totals.batches)
        with self.destination.transaction():
            self.transfer.store(current._replace(exported_at=stamp), "ok")

    def span_query(self, span: window.Span) -> sql.Composable:
        """Return the query for the rows of a backfill. Raises UsageError."""
        where = window.within(self.source, self.view, span)
        return select(self.transfer.raw, where) + self._in_order()

    def _prefer_index(self) -> None:
        """Have an index on (cursor, id) read, where there is one: the first row comes at once.

        Otherwise the planner sorts first, for fear of random reads on a disk that turns.
        """
        self.source.execute(
            "select set_config('random_page_cost',"
            " least(current_setting('random_page_cost')::float8, 1.1)::text, true)"
        )

    def _in_order(self) -> sql.Composable:
        return sql.SQL(" order by {}").format(
            window.order(self.view, self.definition.source.cursor.nulls)
        )

    def top(self) -> Position | None:
        """Return the furthest position that the snapshot shows."""
        view = self.view
        name = sql.Identifier(view.cursor.name)
        # By the table's columns: a bare name would be that of the text that is selected.
        newest = [sql.Identifier("t", c.name) + sql.SQL(" desc") for c in self.transfer.order]
        top = self.source.execute(
            sql.SQL("select {}::text, {} from {} t where {} is not null and {}").format(
                name,
                sql.SQL("{}::text").format(sql.Identifier(view.id.name)) if view.id else sql.NULL,
                self.definition.source.name,
                name,
                window.held_back(view),
            )
            + sql.SQL(" order by {} limit 1").format(sql.SQL(", ").join(newest))
        ).fetchone()
        return Position(*top) if top else None

    def _replace(self, table: Table) -> None:
        self.tell_path("full refresh", f"{STAGED}, in one transaction")
        self.transfer.expected = table.rows
        self.transfer.replace_all(
            window.held_back(self.view), lambda: self._finished(State(cursor=self.top()))
        )

    def _increment(self, table: Table) -> State:
        self.tell_path("increment", STAGED)
        self._prefer_index()
        if self.stored.watermark is None:
            self.transfer.expected = table.rows
        view, raw, current = self.view, self.transfer.raw, self.stored

        def progress(last: bytes) -> State:
            nonlocal current
            value = field(last, raw.place(view.cursor))
            if value is None:
                return current
            end = Position(value, field(last, raw.place(view.id)) if view.id else None)
            if field(last, -1) == "t":
                current = current._replace(
                    cursor=end,
                    snapshot_xmin=self.snapshot.xmin,
                    source=self.horizon.identity,
                    horizon=self.horizon.oldest_open,
                )
            current = state.advanced(
                self.destination, current, end, view.safe, view.cursor.raw_type
            )
            return current

        self.transfer.land(self.increment_query(), progress, onward=self.stored.cursor is not None)
        return current

    def increment_query(self) -> sql.Composable:
        """Return the query for the rows from the watermark on, and those that came late."""
        view, stored = self.view, self.stored
        where = window.condition(
            view, stored.cursor, stored.watermark, self.definition.source.cursor.nulls
        )
        past = window.after(view, stored.cursor) if stored.cursor else sql.SQL("true")
        return select(self.transfer.raw, where, past=past) + self._in_order()

    def _finished(self, current: State) -> State:
        """Everything that the snapshot shows has landed: return how far it reached."""
        view, batches = self.view, self.result.totals.batches
        final = current._replace(
            snapshot_xmin=self.snapshot.xmin,
            horizon=self.horizon.oldest_open,
            source=self.horizon.identity,
            pending_value=view.pending[0] if view.pending else None,
            pending_at=view.pending[1] if view.pending else None,
            exported_at=self.transfer.stamp_of(batches) if batches else self.stored.exported_at,
        )
        if final.cursor:
            final = state.advanced(
                self.destination, final, final.cursor, view.safe, view.cursor.raw_type
            )
        return final
