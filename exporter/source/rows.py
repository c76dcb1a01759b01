"""Reading the rows that a Python function yields.

What a load lands together is read before any of it lands: all that the function yields, or where
it does so in the cursor's order, as much as a batch holds. So the columns of a batch, and their
types, are known before it, and no transaction is open while the function waits for somebody.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import zlib
from collections.abc import Generator, Iterator
from datetime import datetime, timezone
from typing import Any, NoReturn

from psycopg import sql

from exporter import state
from exporter.config import OWN, Definition
from exporter.errors import SourceError, UsageError
from exporter.source import window
from exporter.source.catalog import typed_columns
from exporter.source.function import Call, described
from exporter.source.lookup import relation_columns
from exporter.source.reader import Batch, Lands, Plan, Rows, Target, Wanted
from exporter.source.scale import Scale
from exporter.source.spool import Spool
from exporter.source.table import Column, Table
from exporter.state import Judgement, Position, Reading, Source, State, Worth
from exporter.values import columns as values
from exporter.values.columns import Known, ResultError
from exporter.wire import AHEAD, Connection

_MOST = 1000  # rows that are taken at once
_SIZE = 1024 * 1024  # bytes that they should have


class RowsReader:
    """Reads what a function yields.

    It is called with the greatest cursor value that has landed, less the lookback. Rows of one key
    may come several times, the newest counts; a key that a row lacks is NULL.
    """

    horizon = None

    def __init__(self, definition: Definition) -> None:
        assert definition.source.rows is not None
        self._definition = definition
        self._declared = declared = definition.source
        self._function = definition.source.rows
        self._keys = definition.destination.conflict_columns
        self._field = declared.cursor.field if declared.cursor else None
        self._batch_rows = definition.batch_rows
        self._call = Call(declared, definition.key)
        self._step = 10  # rows that are taken next: what they are like is not known yet
        self._seen: list[values.Column] = []
        self._scale: Scale | None = None
        self._last: Any = None  # cursor value of the last row
        self._greatest: Any = None
        self._complete: Any = None  # the greatest value of which no more rows can come in order
        self.found = Source(
            cluster=None,
            database="",
            timeline=None,
            lsn=None,
            next_xid=None,
            standby=False,
            clock="",
            table=str(self._function),
            oid=zlib.crc32(str(self._function).encode()),
            partitions=(),
        )

    @contextlib.contextmanager
    def opened(self, stored: State, destination: Connection | None) -> Iterator[Table]:
        """See ``Reader``. Nothing is called or imported yet; the table may have no columns yet."""
        assert destination is not None
        self._destination = destination
        row = destination.execute("select extract(epoch from clock_timestamp())::float8").fetchone()
        assert row is not None
        self._clock = datetime.fromtimestamp(row[0], timezone.utc)
        target = self._definition.destination
        existing = relation_columns(destination, target.schema, target.table) or {}
        before = None
        if state.tables_exist(destination):
            before = state.remembered_columns(destination, target)
        declared = typed_columns(destination, self._declared.where, self._function.types)
        types = {one.name: one.raw_type for one in declared}
        self._known = Known(types, {n: kind for n, kind in existing.items() if n not in OWN})
        self._expected = dict.fromkeys([*(n for n in before or {} if n in existing), *types])
        self.table = self._described()
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._spool = Spool()
            stack.callback(self._forget)
            yield self.table

    def reading(self) -> Reading:
        """See ``Reader``."""
        cursor = self._declared.cursor
        landed = dict.fromkeys((one.name for one in self.table.columns), "")
        nulls = cursor.nulls if cursor else ""
        return Reading("rows", self._field, None, nulls, landed, self._keys)

    def doubt(self, stored: State) -> Judgement:
        """See ``Reader``. What a function would yield, nobody knows."""
        del stored
        return Judgement(Worth.ONWARD)

    def begun(self, stored: State, wanted: Wanted) -> Table:
        """See ``Reader``. Calls the function, and takes what lands first."""
        self._start(stored, wanted)
        self._stack.enter_context(self._call.importing())
        self._call.begin(*self._arguments(wanted))
        self._whole = wanted.full_refresh or wanted.span is not None or not self._function.in_order
        self._more = self._fill()
        self.table = self._described()
        if not self.table.columns:
            raise SourceError(
                f"{self._definition.key}: {self._function} ({self._declared.where}) yielded no row,"
                " and nothing tells the columns of the raw table",
                hint=f"give {', '.join(self._keys)} a data_type below columns:, and the table is"
                " made without a row",
            )
        return self.table

    def plan(
        self, stored: State, target: Target, wanted: Wanted, *, empty: bool, shared: bool = False
    ) -> Plan:
        """See ``Reader``."""
        del target, empty, shared
        self._start(stored, wanted)
        path = "increment" if stored.cursor else "first load"
        path = "full refresh" if wanted.full_refresh else "backfill" if wanted.span else path
        since, *rest = self._arguments(wanted)
        until = f", until={rest[0]!r}" if rest[0] is not None else ""
        return Plan(
            path=path,
            stream=self._stream(),
            order=tuple(one for one in self.table.columns if one.name == self._field),
            begin=stored,
            lands=Lands.WHOLE if wanted.full_refresh else Lands.ANY,
            rows=self._call.taken or None,
            max_deletes=wanted.max_deletes,
            versions=True,
            call=f"{self._function}({since!r}{until})",
        )

    def batches(self, plan: Plan) -> Generator[Batch]:
        """See ``Reader``."""
        shape = self._shape()
        grown: dict[str, Any] = {}
        while self._spool.rows or plan.lands is Lands.WHOLE:
            if self._shape() != shape:
                shape, self.table = self._shape(), self._described()
                grown = {"table": self.table, "stream": self._stream()}
            reached = self.finished() if not self._more else self._reached(self._complete)
            blocks = self._spool.blocks(len(self._seen))
            part = Rows(self._definition.key, blocks)
            yield Batch((part,), functools.partial(_same, reached), **grown)
            grown = {}
            self._forget()
            self._spool = Spool()
            if not self._more:
                return
            self._more = self._fill()

    def finished(self) -> State:
        """See ``Reader``."""
        return self._reached(self._greatest)

    def in_flight(self, stored: State) -> sql.Composable:
        """See ``Reader``. There is no table to be compared with."""
        raise NotImplementedError

    def adopted(self, stored: State) -> State:
        """See ``Reader``. There is no source that moves."""
        raise NotImplementedError

    def confirm(self, position: State) -> None:
        """See ``Reader``. The function is asked from a position on, and need not remember."""

    # -- from where, and how far

    def _start(self, stored: State, wanted: Wanted) -> None:
        """Take note of the position that is read from. Raises what is wrong with the cursor."""
        self._base = State(binding=stored.binding) if wanted.full_refresh else stored
        self._stays = wanted.span is not None
        if self._field and self._field in (one.name for one in self.table.columns):
            self._scale = self._scale_of(self.table)
        if wanted.span and self._scale is None:
            raise UsageError(
                f"{self._declared.where}: --since and --until are values of a cursor, and"
                f" {self._definition.key} has none, or nothing tells its type yet",
                hint="exporter.source.cursor.field, and its data_type below columns:",
            )

    def _arguments(self, wanted: Wanted) -> tuple[Any, Any]:
        """Return what the function is called with: ``since``, and ``until`` where that is asked."""
        scale, cursor = self._scale, self._declared.cursor
        if wanted.span:
            span = wanted.span
            return self._typed("--since", span.since), self._typed("--until", span.until)
        if scale is None or cursor is None or self._base.watermark is None:
            return None, None
        return scale.back(scale.one(self._base.watermark.value), cursor.lookback), None

    def _typed(self, option: str, text: str | None) -> Any:
        if text is None or self._scale is None:
            return None
        try:
            return self._scale.one(text)
        except ValueError as error:
            raise UsageError(f"{option} {text!r} is {error}, which {self._field} is") from None

    def _reached(self, complete: Any) -> State:
        """Return the position at which rows up to the greatest value have landed.

        The next read starts at ``complete``, of which more rows may come no more.
        """
        base, scale = self._base, self._scale
        if self._stays:
            return base
        if self._field is None:
            return base._replace(cursor=Position(Scale("timestamptz").text(self._clock)))
        if scale is None or self._greatest is None:
            return base

        def later(value: Any, stored: Position | None) -> Position | None:
            values = [] if stored is None else [scale.one(stored.value)]
            values += [] if value is None else [value]
            return Position(scale.text(max(values))) if values else None

        bound = None if complete is None else scale.bounded(complete, self._clock)
        return base._replace(
            cursor=later(self._greatest, base.cursor), watermark=later(bound, base.watermark)
        )

    # -- the rows

    def _forget(self) -> None:
        self._spool.close()

    def _fill(self) -> bool:
        """Take what lands together; return whether there may be more of it."""
        while True:
            most = _MOST if self._whole else self._batch_rows - self._spool.rows
            wanted = min(self._step, most)
            before = self._call.taken
            rows = values.Rows(self._call.take(wanted), before, self._keys)
            if rows.rows:
                self._add(rows)
            if len(rows.rows) < wanted:
                return False
            full = self._spool.rows >= self._batch_rows or self._spool.size >= AHEAD
            if full and not self._whole:
                return True

    def _add(self, rows: values.Rows) -> None:
        """Encode rows, and take note of how far they are. Raises SourceError."""
        count = len(rows.rows)
        try:
            found = values.take(rows, self._seen, self._known, grows=True)
            data = values.encoded(self._seen, found, rows) + b"\n"
        except ResultError as error:
            self._fail(str(error))
        except Exception as error:  # noqa: BLE001  a value of the function's may raise anything
            where = f"{rows.name(0)} or one of the {count - 1:,} after it"
            self._fail(f"{where}: {described(error, self._function.folder)}")
        self._refuse_own_names()
        of = {one.name: present for one, present in zip(self._seen, found, strict=True)}
        nothing = (None,) * count
        for name in self._keys:
            if None in (present := of.get(name, nothing)):
                place = rows.name(present.index(None))
                self._fail(f"column {name!r} is NULL, and part of the key: {place}")
        if self._field is not None:
            stamps = of.get(self._field, nothing)
            self._follow(stamps, rows)
            if None in stamps and self._declared.skipped:
                lines = data.split(b"\n")  # no value has an end of line of its own
                kept = [line for line, one in zip(lines, stamps, strict=False) if one is not None]
                data, count = b"".join(line + b"\n" for line in kept), len(kept)
        self._spool.add(data, count, len(self._seen))
        self._step = max(1, min(_MOST, len(rows.rows) * _SIZE // len(data or b"\n")))

    def _follow(self, stamps: tuple[Any, ...], rows: values.Rows) -> None:
        """Take note of the cursor's values, and refuse rows that are not in their order."""
        assert self._declared.cursor is not None
        if None in stamps and self._declared.cursor.nulls == "error":
            self._fail(
                f"{rows.name(stamps.index(None))} has no {self._field}: set"
                " exporter.source.cursor.nulls to skip or load"
            )
        present = [value for value in stamps if value is not None]
        if not present:
            return
        scale = self._scale = self._scale or self._inferred()
        try:
            found = scale.of(present)
        except ValueError:
            for place, value in enumerate(stamps):
                try:
                    scale.of([] if value is None else [value])
                except ValueError as error:
                    self._fail(f"column {self._field!r} is {error}: {rows.name(place)}")
            raise
        if self._function.in_order:
            self._in_order(found, stamps, rows)
        greatest = max(found)
        if self._greatest is None or greatest > self._greatest:
            lower = [value for value in found if value < greatest]
            lower += [] if self._greatest is None else [self._greatest]
            self._complete = max(lower) if lower else self._complete
            self._greatest = greatest

    def _in_order(self, found: list[Any], stamps: tuple[Any, ...], rows: values.Rows) -> None:
        """Raise SourceError for a row that is older than the one before it."""
        before = [found[0] if self._last is None else self._last, *found[:-1]]
        self._last = found[-1]
        if all(map(operator.le, before, found)):
            return
        place = next(n for n, (a, b) in enumerate(zip(before, found, strict=True)) if b < a)
        places = [n for n, value in enumerate(stamps) if value is not None]
        self._fail(
            f"{rows.name(places[place])} is older than the row before it by {self._field}, and"
            " exporter.source.in_order is true"
        )

    def _inferred(self) -> Scale:
        """Return the scale of a cursor whose type only its values tell. Raises SourceError."""
        kinds = {one.name: one.kind for one in self._seen if one.name == self._field and one.kind}
        return self._scale_of(self._table(self._typed_columns(kinds)))

    def _scale_of(self, table: Table) -> Scale:
        try:
            cursor, _ = window.cursor_columns(self._declared, table)
        except SourceError as error:
            hint = f"{error.hint}; of texts in ISO 8601, its data_type is timestamptz (columns:)"
            raise SourceError(error.message, hint=hint) from None
        return Scale(cursor.base)

    def _fail(self, problem: str) -> NoReturn:
        raise SourceError(
            f"{self._definition.key}: {self._function} ({self._declared.where}): {problem}",
            hint=f"what had landed before is kept; exporter load {self._definition.key} goes on"
            " from there",
        )

    # -- the columns

    def _shape(self) -> list[tuple[str, str | None]]:
        return [(one.name, one.kind) for one in self._seen]

    def _refuse_own_names(self) -> None:
        for one in self._seen:
            if not one.name or len(one.name.encode()) > 63 or "\0" in one.name:
                self._fail(f"{one.name!r} is no name of a column: PostgreSQL has 1 to 63 bytes")

    def _described(self) -> Table:
        """Return the table as far as it is known; without columns where its key is not."""
        kinds = {name: self._known.declared.get(name) for name in self._expected}
        kinds |= {one.name: one.kind for one in self._seen if one.kind or one.name not in kinds}
        types = {name: kind or self._known.origin.get(name) for name, kind in kinds.items()}
        found = {name: kind for name, kind in types.items() if kind}
        known = {*self._keys} <= {*found}
        return self._table(self._typed_columns(found) if known else ())

    def _typed_columns(self, types: dict[str, str]) -> tuple[Column, ...]:
        found = typed_columns(self._destination, self._declared.where, types)
        return tuple(one._replace(not_null=one.name in self._keys) for one in found)

    def _table(self, columns: tuple[Column, ...]) -> Table:
        return Table(
            declared=self._declared,
            oid=self.found.oid,
            kind="",
            columns=columns,
            computed=(),
            rows=-1,
            has_xmin=False,
            buffers=0,
            in_blocks=False,
            unique_keys=(frozenset(self._keys),),  # of several rows that share it, one is kept
        )

    def _stream(self) -> tuple[Column, ...]:
        """Return the columns of the rows; one that is NULL in each of them has no type yet."""
        of = {one.name: one for one in self.table.columns}
        nothing = Column("", "text", "text", "text", False, False)
        return tuple(of.get(one.name, nothing._replace(name=one.name)) for one in self._seen)


def _same(state: State) -> State:
    return state
