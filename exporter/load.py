"""One load: definition → window → copy → land → record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta

import psycopg
from psycopg import sql

from exporter import landing, state, window
from exporter.catalog import Column, Table, find_table, landed_columns
from exporter.connection import Connection, connect
from exporter.copy import END_OF_BATCH, Block, Limit, ReadAhead, copy_out
from exporter.copy import field as row_field
from exporter.definition import Definition
from exporter.errors import DatabaseError, ExporterError, LockedError, SourceError
from exporter.state import Position, State, Totals

BATCH_SIZE = 8 * 1024 * 1024  # bytes of a batch, whatever batch_rows says
BLOCKS = 2048  # a first load's batch: 16 MB of the source's pages
RETRIES = 6  # the waits between them add up to 16 s
_TRANSIENT = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
)
_LASTING = (
    psycopg.errors.DiskFull,
    psycopg.errors.QueryCanceled,
    psycopg.errors.ProgramLimitExceeded,
)


@dataclass
class Result:
    """How a load ended."""

    key: str
    command: str = "load"
    totals: Totals = field(default_factory=Totals)
    cursor: Position | None = None
    seconds: float = 0.0
    error: ExporterError | None = None

    @property
    def status(self) -> str:
        """``ok``, ``failed``, or ``locked`` by another run."""
        if self.error is None:
            return "ok"
        return "locked" if isinstance(self.error, LockedError) else "failed"


def load(
    definition: Definition, say: Callable[[str], None], *, full_refresh: bool = False
) -> Result:
    """Land what is new of one definition. Never raises ExporterError: the result carries it.

    A full refresh reads everything, and removes from raw what is gone at the source.
    """
    result = Result(definition.key, "load --full-refresh" if full_refresh else "load")
    begin = time.monotonic()
    try:
        _with_retries(definition, result, say)
    except ExporterError as error:
        result.error = error
        with contextlib.suppress(psycopg.Error, ExporterError):
            _record_failure(definition, result)
    result.seconds = time.monotonic() - begin
    return result


def _with_retries(definition: Definition, result: Result, say: Callable[[str], None]) -> None:
    reached = False

    def attempt() -> None:
        nonlocal reached
        with contextlib.ExitStack() as stack:
            destination = stack.enter_context(connect("DATABASE_URL_ANALYTICS"))
            source = stack.enter_context(connect("DATABASE_URL_CORE"))
            reached = True
            _Load(definition, source, destination, result, say).run()

    try:
        try:
            attempt()
            return
        except (psycopg.Error, DatabaseError) as error:
            if not (reached and _is_transient(error)):
                raise  # a server that was never there is told of at once
            reason = first_line(error) if isinstance(error, psycopg.Error) else error.message
            say(f"{definition.key}: {reason}; connecting again")
        from tenacity import (  # noqa: PLC0415  only where something failed
            Retrying,
            retry_if_exception,
            stop_after_attempt,
            wait_exponential,
        )

        again = Retrying(
            # The server may not have noticed yet that our last session, and its lock, is gone.
            retry=retry_if_exception(lambda e: isinstance(e, LockedError) or _is_transient(e)),
            stop=stop_after_attempt(RETRIES),
            wait=wait_exponential(multiplier=0.25, max=10),
            reraise=True,
        )
        again(attempt)
    except psycopg.Error as error:
        raise _database_error(definition, error) from None


def _is_transient(error: BaseException) -> bool:
    """Tell whether the same load may well succeed on new connections."""
    return isinstance(error, (*_TRANSIENT, DatabaseError)) and not isinstance(error, _LASTING)


class _Load:
    """The two sessions of an attempt, and what they work on."""

    def __init__(
        self,
        definition: Definition,
        source: Connection,
        destination: Connection,
        result: Result,
        say: Callable[[str], None],
    ) -> None:
        self.definition = definition
        self.source = source
        self.destination = destination
        self.result = result
        self.totals = result.totals
        self.say = say

    def run(self) -> None:
        """Read onward from the stored position."""
        definition, destination = self.definition, self.destination
        state.create_tables(destination)
        state.lock(destination, definition)
        stored = state.read(destination, definition.key)
        self.result.cursor = stored.cursor if stored else None
        horizon = window.observe(self.source, definition, stored)
        if horizon.blind:
            self.say(
                f"{definition.key}: the transactions of other roles are hidden, only the lookback"
                " covers them; GRANT pg_read_all_stats TO the role of DATABASE_URL_CORE"
            )
        with self._snapshot():
            table = find_table(self.source, definition, destination)
            snapshot = window.take_snapshot(self.source, stored, horizon)
            view = window.decide(self.source, definition, table, stored, horizon, snapshot)
            self._refuse_nulls(view)
            raw = self._raw(table, view)
            self.stamp = state.stamp(destination, stored)
            base = replace(stored or State(), horizon=horizon.oldest_open, source=horizon.identity)
            if self._is_first(table, raw, stored):
                current = self._first(table, raw, view, snapshot, stored, horizon)
            elif self.result.command != "load":
                landing.ensure_key(destination, raw)
                self._replace(raw, view, snapshot, base)
                return
            else:
                landing.ensure_key(destination, raw)
                current = self._increment(raw, view, snapshot, stored, horizon)
            self._finish(view, snapshot, base, current)

    # -- the pieces, in the order of the sequence above

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        definition = self.definition
        table = sql.Identifier(definition.source_schema, definition.source_table)
        self.source.execute("begin isolation level repeatable read read only")
        try:
            # Locked before the snapshot is taken: a table that is rewritten between the two looks
            # empty to the snapshot, and the watermark would pass its rows.
            with (
                contextlib.suppress(psycopg.errors.WrongObjectType),
                self.source.transaction(),
            ):
                self.source.execute(sql.SQL("lock table {} in access share mode").format(table))
        except psycopg.errors.UndefinedTable:
            self.source.execute("rollback")
            self.source.execute("begin isolation level repeatable read read only")
        except psycopg.errors.InsufficientPrivilege as error:
            raise SourceError(
                f"{definition.where}: {first_line(error)}",
                hint=f"grant select on {table.as_string(self.source)} to DATABASE_URL_CORE's role",
            ) from None
        yield
        self.source.execute("commit")

    def _refuse_nulls(self, view: window.Window) -> None:
        definition = self.definition
        columns = [c for c in (view.cursor, view.id) if c and not c.not_null]
        if definition.nulls == "load":
            columns = [c for c in columns if c is not view.cursor]
        if not columns or definition.nulls == "skip":
            return
        tests = sql.SQL(" or ").join(
            sql.SQL("{} is null").format(sql.Identifier(column.name)) for column in columns
        )
        row = self.source.execute(
            sql.SQL("select count(*) from {} where {}").format(self._from, tests)
        ).fetchone()
        if row and row[0]:
            names = " or ".join(column.name for column in columns)
            raise SourceError(
                f"{definition.key}: {row[0]} rows have no {names}, and cannot be ordered",
                hint=f"{definition.where}: set exporter.source.cursor.nulls to skip or load",
            )

    @property
    def _from(self) -> sql.Identifier:
        return sql.Identifier(self.definition.source_schema, self.definition.source_table)

    def _raw(self, table: Table, view: window.Window) -> landing.Raw:
        definition = self.definition
        past = Column("_exporter_past", "boolean", "boolean", True, True)
        hidden = [column for column in (view.cursor, view.id) if column]
        conflict = frozenset(definition.conflict_columns)
        return landing.prepare(
            self.destination,
            definition,
            landed_columns(definition, table),
            [*hidden, past],
            any(key <= conflict for key in table.unique_keys),
        )

    def _is_first(self, table: Table, raw: landing.Raw, stored: State | None) -> bool:
        if not table.in_blocks or not raw.unique_at_source or not raw.key:
            return False
        if stored and stored.next_block is not None:
            return True
        return (stored is None or stored.cursor is None) and landing.is_empty(self.destination, raw)

    def _first(
        self,
        table: Table,
        raw: landing.Raw,
        view: window.Window,
        snapshot: window.Snapshot,
        stored: State | None,
        horizon: window.Horizon,
    ) -> State:
        """Copy ranges of blocks. A resumed one stages them, and looks at the earlier ones again."""
        resumed = stored is not None and bool(stored.next_block)
        same = resumed and stored is not None and stored.file == table.file and snapshot.xid_usable
        start = (stored.next_block or 0) if same and stored else 0
        xmin = stored.snapshot_xmin if same and stored else snapshot.xmin
        direct = not resumed and raw.exact and all(column.builtin for column in raw.columns)
        if resumed:
            landing.ensure_key(self.destination, raw)
        step = BLOCKS
        if table.rows > 0 and table.blocks:
            per_block = table.rows / table.blocks
            step = max(1, min(BLOCKS, int(self._batch_rows / per_block)))
        ranges = [
            sql.SQL("ctid >= '({},0)'::tid and ctid < '({},0)'::tid").format(
                sql.Literal(first), sql.Literal(first + step)
            )
            for first in range(start, table.blocks, step)
        ]
        queries = [
            self._select(raw, view, part, self._stamp_of(number) if direct else None)
            for number, part in enumerate(ranges)
        ]
        current = replace(
            State(),
            snapshot_xmin=xmin,
            source=horizon.identity,
            horizon=horizon.oldest_open,
            file=table.file,
            next_block=start,
        )

        def progress(_: bytes) -> State:
            nonlocal current
            current = replace(current, next_block=(current.next_block or 0) + step)
            return current

        self._land(raw, queries, progress, view, direct=direct)
        landing.ensure_key(self.destination, raw)
        if same and view.xmin_since:
            changed = self._select(raw, view, window.changed_since(view.xmin_since))
            self._land(raw, [changed], lambda _: current, view)
        return replace(current, file=None, next_block=None, cursor=self._top(view))

    def _top(self, view: window.Window) -> Position | None:
        """Return the furthest position that the snapshot shows."""
        field, kept = sql.Identifier(view.cursor.name), window.held_back(view)
        newest = [sql.Identifier(c.name) + sql.SQL(" desc") for c in (view.cursor, view.id) if c]
        top = self.source.execute(
            sql.SQL("select {}::text, {} from {} where {} is not null and {}").format(
                field,
                sql.SQL("{}::text").format(sql.Identifier(view.id.name)) if view.id else sql.NULL,
                self._from,
                field,
                kept,
            )
            + sql.SQL(" order by {} limit 1").format(sql.SQL(", ").join(newest))
        ).fetchone()
        return Position(*top) if top else None

    def _replace(
        self, raw: landing.Raw, view: window.Window, snapshot: window.Snapshot, base: State
    ) -> None:
        """Make raw equal to the snapshot, in one transaction: readers see before or after."""
        query = self._select(raw, view, window.held_back(view))
        ahead = ReadAhead(lambda: copy_out(self.source, query, binary=False))
        try:
            stream = iter(ahead)
            with self.destination.transaction():
                rows, size, _ = landing.Staging(self.destination, raw).fill(
                    _batch(next(stream, END_OF_BATCH), stream), 1
                )
                order = [column for column in (view.cursor, view.id) if column]
                written = landing.replace_all(self.destination, raw, self._stamp_of(0), order)
                self.totals.rows_read, self.totals.rows_written = rows, written
                self.totals.bytes, self.totals.batches = size, 1
                self._finish(view, snapshot, base, State(cursor=self._top(view)))
        finally:
            ahead.stop(self.source)

    def _increment(
        self,
        raw: landing.Raw,
        view: window.Window,
        snapshot: window.Snapshot,
        stored: State | None,
        horizon: window.Horizon,
    ) -> State:
        current = stored or State()
        nulls = self.definition.nulls
        where = window.condition(view, current.cursor, current.watermark, nulls)
        past = window.after(view, current.cursor) if current.cursor else sql.SQL("true")
        query = self._select(raw, view, where, past=past) + sql.SQL(" order by {}").format(
            window.order(view, nulls)
        )

        def progress(last: bytes) -> State:
            nonlocal current
            value = row_field(last, raw.index(view.cursor))
            if value is None:
                return current
            end = Position(value, row_field(last, raw.index(view.id)) if view.id else None)
            if row_field(last, -1) == "t":
                current = replace(
                    current,
                    cursor=end,
                    snapshot_xmin=snapshot.xmin,
                    source=horizon.identity,
                    horizon=horizon.oldest_open,
                )
            current = state.advanced(
                self.destination, current, end, view.safe, view.cursor.raw_type
            )
            return current

        self._land(raw, [query], progress, view)
        return current

    def _finish(
        self, view: window.Window, snapshot: window.Snapshot, base: State, current: State
    ) -> None:
        """Everything that the snapshot shows has landed: store how far it reached."""
        final = replace(
            current,
            snapshot_xmin=snapshot.xmin,
            horizon=base.horizon,
            source=base.source,
            pending_value=view.pending[0] if view.pending else None,
            pending_at=view.pending[1] if view.pending else None,
            exported_at=self._stamp_of(self.totals.batches)
            if self.totals.batches
            else base.exported_at,
        )
        if final.cursor:
            final = state.advanced(
                self.destination, final, final.cursor, view.safe, view.cursor.raw_type
            )
        with self.destination.transaction():
            state.write(self.destination, self.definition.key, final)
            self._record(final, "ok")
        self.result.cursor = final.cursor

    def _select(
        self,
        raw: landing.Raw,
        view: window.Window,
        where: sql.Composable,
        stamp: str | None = None,
        past: sql.Composable | None = None,
    ) -> sql.Composable:
        if stamp is not None:
            columns = [column.selected for column in raw.columns]
            columns.append(sql.SQL("{}::timestamptz").format(sql.Literal(stamp)))
        else:
            columns = [column.selected for column in raw.stream[:-1]]
            columns.append(past or sql.SQL("true"))
        if self.definition.nulls == "skip":
            where = sql.SQL("{} and {} is not null").format(where, sql.Identifier(view.cursor.name))
        return sql.SQL("select {} from {} where {}").format(
            sql.SQL(", ").join(columns), self._from, where
        )

    def _land(
        self,
        raw: landing.Raw,
        queries: list[sql.Composable],
        progress: Callable[[bytes], State],
        view: window.Window,
        *,
        direct: bool = False,
    ) -> None:
        """Land the queries' rows, batch by batch, each in one transaction with its position."""
        limit = None if direct or len(queries) > 1 else self._limit(raw, view)

        def produce() -> Iterator[Block]:
            for query in queries:
                ended = False
                for block in copy_out(self.source, query, binary=direct, limit=limit):
                    ended = block is END_OF_BATCH
                    yield block
                    del block
                if not ended and len(queries) > 1:
                    yield END_OF_BATCH  # an empty range is progress, too

        order = [column for column in (view.cursor, view.id) if column]
        ahead = ReadAhead(produce)
        staging = landing.Staging(self.destination, raw)
        try:
            stream = iter(ahead)
            for first in stream:
                number = self.totals.batches
                batch = _batch(first, stream)
                with self.destination.transaction():
                    if direct:
                        rows, size = landing.copy_direct(self.destination, raw, batch)
                        written, last = rows, b""
                    else:
                        rows, size, last = staging.fill(batch, number + 1)
                        written = staging.apply(self._stamp_of(number), number + 1, order)
                    self.totals.rows_read += rows
                    self.totals.rows_written += written
                    self.totals.bytes += size
                    self.totals.batches += 1
                    now = replace(progress(last), exported_at=self._stamp_of(number))
                    state.write(self.destination, self.definition.key, now)
                    self._record(now, "running")
                self.result.cursor = now.cursor or self.result.cursor
        finally:
            ahead.stop(self.source)

    def _limit(self, raw: landing.Raw, view: window.Window) -> Limit:
        if view.id is not None:
            return Limit(self._batch_rows, BATCH_SIZE)
        place = raw.index(view.cursor)
        # Without a tie-breaker a position inside a tie would lose the rest of it.
        return Limit(
            self._batch_rows, BATCH_SIZE, lambda a, b: row_field(a, place) == row_field(b, place)
        )

    @property
    def _batch_rows(self) -> int:
        return self.definition.batch_rows

    def _stamp_of(self, batch: int) -> str:
        """Return a batch's ``_exported_at``: a microsecond after the batch before it."""
        seconds, _, fraction = self.stamp.partition("+")[0].partition(".")
        micros = int((fraction or "0").ljust(6, "0")) + batch
        from datetime import datetime  # noqa: PLC0415

        moment = datetime.fromisoformat(seconds) + timedelta(microseconds=micros)
        return f"{moment.isoformat(' ', 'microseconds')}+00"

    def _record(self, now: State, status: str) -> None:
        state.record(
            self.destination,
            self.definition.key,
            self.result.command,
            self.totals,
            status=status,
            value=now.cursor.value if now.cursor else None,
            id=now.cursor.id if now.cursor else None,
        )


def _batch(first: Block, stream: Iterator[Block]) -> Iterator[Block]:
    """Yield the blocks up to the end of the batch that ``first`` begins."""
    block = first
    while block is not END_OF_BATCH:
        yield block
        del block
        following = next(stream, END_OF_BATCH)
        block = following
        del following


def _record_failure(definition: Definition, result: Result) -> None:
    with connect("DATABASE_URL_ANALYTICS") as destination:
        state.record(
            destination,
            definition.key,
            result.command,
            result.totals,
            status=result.status,
            value=result.cursor.value if result.cursor else None,
            id=result.cursor.id if result.cursor else None,
            error=result.error.message if result.error else None,
        )


def _database_error(definition: Definition, error: psycopg.Error) -> DatabaseError:
    return DatabaseError(
        f"{definition.key}: {first_line(error)}",
        hint=f"what has landed is kept; exporter load {definition.key} goes on from there",
    )


def first_line(error: psycopg.Error) -> str:
    """Return the message of a server, without the details that quote a row."""
    return (error.diag.message_primary or str(error) or type(error).__name__).splitlines()[0]
