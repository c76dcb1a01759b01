"""The state of each definition: its last runs, and how far raw is behind the source.

No table of the source is read whole: rows are counted along an index up to a limit, and beyond it
the planner estimates them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from exporter import state
from exporter.config import Definition, source_variables
from exporter.errors import ExporterError
from exporter.monitoring import slots
from exporter.monitoring.slots import Slot
from exporter.source import Table, find_table, window
from exporter.source.lookup import indexes, planned_rows
from exporter.source.snapshot import changed_since
from exporter.state import State
from exporter.wire import Connection, connect, first_line

COUNTED = 10_000  # rows; beyond them the planner's estimate is shown
RUNS = 10
_SMALL = 128  # blocks, 1 MB: read whole where no index serves
_PATIENCE = 2000  # milliseconds that the source may spend on one question

_RUN = (
    "select *, extract(epoch from finished_at - started_at)::float8 as seconds,"
    " extract(epoch from clock_timestamp() - coalesce(finished_at, started_at))::float8 as ago"
    " from {} where key = %s"
)
_LAST = sql.SQL(f"{_RUN} and status <> 'locked' order by id desc limit 1")
_RECENT = sql.SQL(f"{_RUN} order by id desc limit %s")
# The stamp of a run's rows is taken when it starts: this is max(_exported_at), without a scan.
_LANDED = sql.SQL(
    "select started_at, clock_timestamp() - started_at from {}"
    " where key = %s and rows_written > 0 order by id desc limit 1"
)
# By name: the table of an earlier version lacks the column.
_SWEPT = sql.SQL(
    "select coalesce(sum((to_jsonb(r)->>'rows_swept')::bigint), 0)::bigint from {} r"
    " where key = %s and started_at > clock_timestamp() - interval '7 days'"
)
# What --json gives of a run, beside how it ended.
_FACTS = (
    *("command", "started_at", "finished_at", "seconds"),
    *("rows_read", "rows_written", "rows_unchanged", "rows_deleted", "rows_swept"),
    *("batches", "bytes", "error"),
)


class Behind(NamedTuple):
    """Rows of the source that have not landed. ``seconds`` is None where no index gives it.

    Where changes are read, ``bytes`` of WAL have not; all that was committed ``seconds`` ago has.
    """

    rows: int | None
    estimated: bool
    seconds: float | None
    bytes: int | None = None


class Status(NamedTuple):
    """The state of a definition.

    ``ended`` is how its last run did: never, running, ok, failed, interrupted or died.
    ``landed_at`` is the start of the last run that wrote rows, ``age`` the time since.
    """

    definition: Definition
    ended: str
    run: dict[str, Any] | None
    stored: State
    holder: str | None
    landed_at: datetime | None
    age: timedelta | None
    behind: Behind | None
    swept: int  # rows of seven days that the cursor had passed over

    @property
    def rows_per_second(self) -> float | None:
        """The rows that the last run read in a second; None of one that has not ended."""
        return _rate(self.run or {})

    @property
    def freshness(self) -> str | None:
        """``pass``, ``warn`` or ``error``; None where the YAML asks for nothing."""
        if self.definition.freshness is None:
            return None
        age = timedelta.max if self.age is None else self.age  # as dbt does
        return self.definition.freshness.status(age)

    def as_dict(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        cursor, behind = self.stored.cursor, self.behind
        return {
            "key": self.definition.key,
            "table": f"{self.definition.destination.schema}.{self.definition.destination.table}",
            **_facts(self.run or {}, self.ended),
            "cursor": state.as_dict(cursor),
            "behind": behind._asdict() if behind else None,
            "freshness": self.freshness,
            "landed_at": self.landed_at,
            "holder": self.holder,
            "rows_swept_in_7_days": self.swept,
        }


def current(
    definitions: list[Definition], captured: Mapping[str, bool], say: Callable[[str], None]
) -> Iterator[Status]:
    """Yield the status of each definition.

    ``captured`` are the sources of the project, see ``slots.sources_of``. ``say`` gets the reason
    where the source does not tell how far raw is behind, and what is amiss with a slot. Raises
    DatabaseError where the destination cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        destination = stack.enter_context(connect("DATABASE_URL_ANALYTICS"))
        sources: dict[str, Connection] = {}
        for variable in source_variables(definitions):
            try:
                sources[variable] = stack.enter_context(connect(variable))
            except ExporterError as error:
                say(f"how far behind the source is not known: {error}")
        known = state.tables_exist(destination)
        found = slots.overview(captured, sources, destination)
        of_source = {one.variable: one for one in found.slots if one.known and one.needed}
        for definition in definitions:
            variable = definition.source.variable
            slot = of_source.get(variable)
            yield _status(sources.get(variable), slot, destination, definition, known, say)
        for concern in found.concerns():
            say("\n  → ".join((concern.message, *concern.fix)))


def recent_runs(definition: Definition) -> list[dict[str, Any]]:
    """Return the last runs of a definition, the newest first, as the objects of ``--json``."""
    with connect("DATABASE_URL_ANALYTICS") as destination:
        if not state.tables_exist(destination):
            return []
        alive = state.holder(destination, definition.destination) is not None
        rows = destination.cursor(row_factory=dict_row).execute(
            _RECENT.format(state.RUNS), (definition.key, RUNS)
        )
        found = []
        for run in rows:
            facts = _facts(run, _ended(run, alive))
            found.append({"id": run["id"], "key": definition.key, **facts})
            alive = alive and run["status"] == "locked"  # the runs before it are over
        return found


def _rate(run: dict[str, Any]) -> float | None:
    return run["rows_read"] / run["seconds"] if run.get("seconds") else None


def _facts(run: dict[str, Any], ended: str) -> dict[str, Any]:
    facts = {name: run.get(name) for name in _FACTS}
    return {"status": ended, **facts, "rows_per_second": _rate(run)}


def _status(
    source: Connection | None,
    slot: Slot | None,
    destination: Connection,
    definition: Definition,
    known: bool,
    say: Callable[[str], None],
) -> Status:
    run, stored, landed, holder, swept = None, State(), None, None, None
    if known:
        holder = state.holder(destination, definition.destination)
        stored = state.read(destination, definition.destination)
        cursor = destination.cursor(row_factory=dict_row)
        run = cursor.execute(_LAST.format(state.RUNS), (definition.key,)).fetchone()
        landed = destination.execute(_LANDED.format(state.RUNS), (definition.key,)).fetchone()
        swept = destination.execute(_SWEPT.format(state.RUNS), (definition.key,)).fetchone()
    behind = None
    if source is not None:
        try:
            behind = _behind(source, definition, stored, slot)
        except ExporterError as error:
            say(str(error))
        except psycopg.Error as error:
            say(f"{definition.key}: how far behind the source is not known: {first_line(error)}")
    return Status(
        definition=definition,
        ended="running" if holder else _ended(run, False) if run else "never",
        run=run,
        stored=stored,
        holder=holder,
        landed_at=landed[0] if landed else None,
        age=landed[1] if landed else None,
        behind=behind,
        swept=swept[0] if swept else 0,
    )


def _ended(run: dict[str, Any], alive: bool) -> str:
    """Return how a run ended: one that is recorded as running, and is not alive, was killed."""
    status = str(run["status"])
    return "died" if status == "running" and not alive else status


# -- the source


def _behind(
    source: Connection, definition: Definition, stored: State, slot: Slot | None
) -> Behind | None:
    follows = stored.slot is not None and stored.slot.until is not None
    if follows and slot and slot.known and not slot.found.lost:
        return Behind(None, False, 0.0 if slot.behind == 0 else slot.known.seconds, slot.behind)
    with source.transaction():
        source.execute(f"set transaction read only; set local statement_timeout = {_PATIENCE}")
        table = find_table(source, definition.source)
        if stored.is_first:  # a first load that is under way
            left = max(0.0, 1 - (stored.next_block or 0) / max(1, table.blocks))
            return Behind(round(max(table.rows, 0) * left), True, None)
        if definition.source.cursor is None or definition.source.read == "scan":
            return _behind_scan(source, definition, table, stored)
        cursor, id_column = window.cursor_columns(definition.source, table)
        indexed = any(i.columns[0] == cursor.name for i in indexes(source, table.oid))
        where: sql.Composable = sql.SQL("true")
        if stored.cursor:
            view = window.Window(definition.source, cursor, id_column, append=False)
            where = view.after(stored.cursor)
        small = table.kind in ("r", "m") and table.blocks <= _SMALL
        cheap, by_index = indexed or small or not stored.cursor, stored.cursor is not None
        rows = _count(source, definition, table, where, cheap, indexed=by_index)
        if rows == 0:
            return Behind(0, False, 0.0)
        seconds = None
        if stored.cursor and indexed and window.is_time(cursor):
            seconds = _seconds(source, definition, cursor.name, stored.cursor.value)
        if rows is not None and rows <= COUNTED:
            return Behind(rows, False, seconds)
        query = sql.SQL("select from {} where {}").format(definition.source.name, where)
        planned = planned_rows(source, query)
        return Behind(planned if planned > 1 else 0, True, seconds)  # it never says 0


def _behind_scan(
    source: Connection, definition: Definition, table: Table, stored: State
) -> Behind | None:
    """Count what the next scan is going to read; None where that takes too long."""
    where: sql.Composable = sql.SQL("true")
    if stored.cursor and stored.snapshot_xmin:
        where = changed_since(stored.snapshot_xmin)
    rows = _count(source, definition, table, where, True)
    if rows is not None and rows > COUNTED and not stored.cursor:
        rows = round(max(table.rows, rows))
    return None if rows is None else Behind(rows, rows > COUNTED, 0.0 if rows == 0 else None)


def _count(
    source: Connection,
    definition: Definition,
    table: Table,
    where: sql.Composable,
    cheap: bool,
    *,
    indexed: bool = False,
) -> int | None:
    """Count rows, up to one more than the limit; None where that would read the whole table."""
    if not cheap or table.kind not in ("r", "p", "m"):
        return None
    try:
        with source.transaction():
            # A bitmap scan would find every matching row before it counts the first one.
            source.execute("set local enable_bitmapscan = off")
            if indexed:
                source.execute("set local enable_seqscan = off")
            some = sql.SQL("select from {} where {} limit {}").format(
                definition.source.name, where, COUNTED + 1
            )
            row = source.execute(
                sql.SQL("select count(*) from ({}) as found").format(some)
            ).fetchone()
    except psycopg.errors.QueryCanceled:
        return None
    return int(row[0]) if row else None


def _seconds(
    source: Connection, definition: Definition, cursor: str, position: str
) -> float | None:
    """Return how much later than the position the newest cursor value is."""
    row = source.execute(
        sql.SQL(
            "select extract(epoch from max({0})::timestamptz - {1}::timestamptz)::float8 from {2}"
            " where isfinite({0}) and isfinite({1}::timestamptz)"
        ).format(
            sql.Identifier(cursor),
            sql.Literal(position),
            definition.source.name,
        )
    ).fetchone()
    return max(0.0, row[0]) if row and row[0] is not None else None
