"""What the dbt sources declare: one ``Definition`` a table, validated with file, line and key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

from psycopg import sql

from exporter.config.keys import UNITS, Values
from exporter.errors import DefinitionError

OWN = ("_exported_at", "_deleted_at")  # what raw has beside the source's columns
# What is said of a table, and what a function decides itself.
_OF_TABLES = ("database", "schema", "table", "read", "scan_below", "sweep", "columns", "exclude")


class Freshness(NamedTuple):
    """What dbt's ``freshness`` of a source says of the age of its newest row."""

    warn_after: timedelta | None
    error_after: timedelta | None

    def status(self, age: timedelta) -> str:
        """Return ``pass``, ``warn`` or ``error``, the words of `dbt source freshness`."""
        if self.error_after is not None and age > self.error_after:
            return "error"
        return "warn" if self.warn_after is not None and age > self.warn_after else "pass"


class Cursor(NamedTuple):
    """The column that grows with every change, and the column that orders ties of it."""

    field: str
    id_field: str | None
    lookback: timedelta | int | None  # as declared; None: the default of the cursor's type
    nulls: str  # error, skip or load: what becomes of rows without a cursor


class Function(NamedTuple):
    """A Python function that yields rows. ``folder`` is that of the dbt project."""

    module: str
    name: str
    folder: str
    in_order: bool  # of the cursor
    types: dict[str, str]  # column → its `data_type` in the YAML, where it has one

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


class SourceTable(NamedTuple):
    """The table that is read, and what of it. ``where`` is ``file:line`` of its declaration.

    With ``rows`` a function is called instead: ``table`` has its name, and there is no schema.
    """

    where: str
    schema: str
    table: str
    cursor: Cursor | None
    columns: tuple[str, ...] | None  # None: all
    expressions: dict[str, str]  # column → SQL that the source computes
    exclude: tuple[str, ...]
    read: str  # auto, scan, cursor, changes or rows
    scan_below: int  # bytes
    sweep: timedelta | None  # None: never
    database: str = "CORE"
    rows: Function | None = None

    @property
    def variable(self) -> str:
        """The environment variable that names its database; none ("") where a function is read."""
        return "" if self.rows else f"DATABASE_URL_{self.database}"

    @property
    def name(self) -> sql.Identifier:
        """The qualified name of the table."""
        return sql.Identifier(self.schema, self.table)

    @property
    def order(self) -> tuple[str, ...]:
        """The columns in whose order rows are read by a cursor: none without one."""
        names = (self.cursor.field, self.cursor.id_field) if self.cursor else ()
        return tuple(name for name in names if name)

    @property
    def is_scanned(self) -> bool:
        """Whether it is read by the transactions of its rows, and by nothing else."""
        return self.read == "scan" or (self.read == "auto" and self.cursor is None)

    @property
    def skipped(self) -> str | None:
        """The column without which a row is no row of raw, if there is one."""
        return self.cursor.field if self.cursor and self.cursor.nulls == "skip" else None

    def lands(self, column: str) -> bool:
        """Whether a column of the source gets into raw."""
        chosen = self.columns is None or column in self.columns
        return (chosen and column not in self.exclude) or column in self.expressions


class Destination(NamedTuple):
    """The raw table: where rows land, and what may become of it. ``key`` is its definition's."""

    key: str
    schema: str
    table: str
    # None in append mode; in upsert mode, where none are declared, until the source was asked.
    conflict_columns: tuple[str, ...]
    mode: str  # upsert, append or history
    evolution: str  # evolve or freeze: what a change of the source's columns may do to raw
    deletes: str  # ignore, mark or remove: what becomes of rows that are gone at the source
    distribution_column: str | None = None  # on Citus; None: the table stays where it is made

    @property
    def name(self) -> sql.Identifier:
        """The qualified name of the raw table."""
        return sql.Identifier(self.schema, self.table)

    @property
    def is_history(self) -> bool:
        """Whether raw keeps every version of a row."""
        return self.mode == "history"

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}"


class Definition(NamedTuple):
    """One table to land. ``where`` is ``file:line`` of its declaration."""

    key: str
    where: str
    source: SourceTable
    destination: Destination
    batch_rows: int
    freshness: Freshness | None = None
    tags: tuple[str, ...] = ()  # dbt's, of the source table


def source_variables(definitions: Iterable[Definition]) -> list[str]:
    """Return the variables that name the databases which these definitions are read from."""
    found = dict.fromkeys(definition.source.variable for definition in definitions)
    return [variable for variable in found if variable]


def parse(
    meta: Any,
    *,
    where: str,
    source: str,
    table: str,
    schema: str,
    freshness: Sequence[Any] = (),
    tags: Sequence[Any] = (),
    database: Any = None,
    types: Mapping[str, str] = MappingProxyType({}),
    folder: str = "",
) -> Definition:
    """Return the definition in ``config.meta.exporter``. Raises DefinitionError.

    ``freshness`` are the values of dbt's key of that name, the table's after its source's;
    ``database`` is what holds for all tables of the source; ``types`` are those of dbt's columns,
    and ``folder`` is the project's.
    """
    reader = Values(meta, where)
    key = reader.text("key", f"{source}.{table}")
    if reader.given("source.rows"):
        origin = _function(reader, types, folder)
    else:
        origin = _source(reader, database)
    return Definition(
        key=key,
        where=where,
        source=origin,
        destination=_destination(reader, key, schema, table, origin),
        batch_rows=reader.positive("batch_rows"),
        freshness=_freshness(freshness, where),
        tags=tuple(map(str, tags)),
    )


def _source(reader: Values, database: Any) -> SourceTable:
    if reader.given("source.in_order"):
        reader.fail("source.in_order", "goes with source.rows")
    columns, expressions = reader.columns("source.columns")
    source = SourceTable(
        where=reader.where,
        schema=reader.text("source.schema"),
        table=reader.text("source.table"),
        cursor=_cursor(reader) if reader.given("source.cursor") else None,
        columns=columns,
        expressions=expressions,
        exclude=reader.names("source.exclude"),
        read=reader.choice("source.read", ("auto", "scan", "cursor", "changes")),
        scan_below=reader.size("source.scan_below"),
        sweep=reader.time_or_never("source.sweep"),
        database=reader.database("source.database", database),
    )
    for name in source.order:
        if name in expressions:
            reader.fail("source.columns", f"computes {name}, which is read as the cursor")
    if source.read == "cursor" and source.cursor is None:
        reader.fail("source.cursor", "is required with read: cursor")
    if source.read == "changes" and source.cursor is not None:
        reader.fail("source.cursor", "has no place with read: changes, which needs none")
    if source.read == "changes" and expressions:
        reader.fail("source.columns", "cannot compute columns with read: changes")
    return source


def _function(reader: Values, types: Mapping[str, str], folder: str) -> SourceTable:
    """Return the source of a definition whose rows a function yields."""
    for name in _OF_TABLES:
        if reader.given(f"source.{name}"):
            reader.fail(f"source.{name}", "has no place with source.rows: the function decides")
    name, in_order = reader.text("source.rows"), reader.flag("source.in_order")
    found = re.fullmatch(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)", name)
    if not found:
        reader.fail("source.rows", "must name a module and a function: readers.posthog:events")
    cursor = _cursor(reader) if reader.given("source.cursor") else None
    if cursor and cursor.id_field:
        reader.fail("source.cursor.id_field", "has no place with source.rows: one column orders")
    if in_order and cursor is None:
        reader.fail("source.in_order", "needs source.cursor")
    if not reader.given("conflict_columns"):
        reader.fail(
            "conflict_columns",
            "is required with source.rows: a function may yield a row again, which only a key"
            " tells; without one, make one in the function, such as a hash of the row",
        )
    kinds = {column: kind for column, kind in types.items() if column not in OWN}
    return SourceTable(
        where=reader.where,
        schema="",
        table=name,
        cursor=cursor,
        columns=None,
        expressions={},
        exclude=(),
        read="rows",
        scan_below=0,
        sweep=None,
        rows=Function(found[1], found[2], folder, in_order, kinds),
    )


def _cursor(reader: Values) -> Cursor:
    id_field = "source.cursor.id_field"
    return Cursor(
        reader.text("source.cursor.field"),
        None if reader.value(id_field) is None else reader.text(id_field),
        reader.lookback("source.cursor.lookback"),
        reader.choice("source.cursor.nulls", ("error", "skip", "load")),
    )


def _destination(
    reader: Values, key: str, schema: str, table: str, source: SourceTable
) -> Destination:
    conflict = reader.names("conflict_columns")
    mode = reader.choice(
        "mode",
        ("upsert", "append", "history"),
        "upsert" if conflict or not source.cursor else "append",
    )
    if source.rows and mode == "append":
        reader.fail(
            "mode", "must be upsert with source.rows: a row that is yielded again would be twice"
        )
    if source.rows and reader.value("deletes") != "ignore":
        reader.fail(
            "deletes",
            "must be ignore with source.rows: that a function does not yield a row does not say"
            " that it is gone; exporter load KEY --full-refresh removes what it then leaves out",
        )
    follows, history = source.read == "changes", mode == "history"
    mirrors = follows and not history
    deletes = reader.choice("deletes", ("ignore", "mark", "remove"), "remove" if mirrors else None)
    if history and not follows:
        reader.fail("mode", "can be history with source.read: changes alone: others miss versions")
    if history and reader.given("deletes"):
        reader.fail("deletes", "has no place with mode: history, where a delete is a version")
    if history and reader.given("distribution_column"):
        reader.fail("distribution_column", "has no place with read: changes")
    if follows and mode == "append":
        reader.fail("mode", "must be upsert or history with read: changes")
    if mirrors and deletes == "ignore":
        reader.fail("deletes", "must be remove or mark with read: changes")
    if mode == "append" and source.cursor and source.cursor.nulls == "load":
        reader.fail("source.cursor.nulls", "cannot be load with mode: append, which reads once")
    if mode == "append" and deletes != "ignore":
        reader.fail("deletes", "must be ignore with mode: append, whose rows have no key")
    landed = None if source.columns is None else {*source.columns, *source.expressions}
    for name in conflict:
        if name in source.exclude or (landed is not None and name not in landed):
            reader.fail("conflict_columns", f"names {name}, which source.columns leaves out")
    distribution = reader.value("distribution_column", conflict[0] if conflict else None)
    if distribution is not None and conflict and distribution not in conflict:
        reader.fail(
            "distribution_column", "must be one of conflict_columns: Citus keeps them unique"
        )
    return Destination(
        key=key,
        schema=schema,
        table=table,
        conflict_columns=conflict if mode != "append" else (),
        mode=mode,
        evolution=reader.choice("schema", ("evolve", "freeze")),
        deletes=deletes,
        distribution_column=distribution,
    )


def _freshness(levels: Sequence[Any], where: str) -> Freshness | None:
    """Merge as dbt does: the later level wins; an explicit null takes away what was before."""
    found: dict[str, timedelta | None] = {}
    for level in levels:
        if level is None:
            found = {}
            continue
        for name in ("warn_after", "error_after"):
            value = level.get(name, {}) if isinstance(level, dict) else level
            if value is None:
                found[name] = None
            elif value != {}:
                wanted = value if isinstance(value, dict) else {}
                count, unit = wanted.get("count"), str(wanted.get("period"))
                if not isinstance(count, int) or unit not in UNITS:
                    raise DefinitionError(
                        f"{where}: freshness.{name} must be such as {{count: 1, period: day}}"
                    )
                found[name] = timedelta(seconds=count * UNITS[unit])
    warn, error = found.get("warn_after"), found.get("error_after")
    return Freshness(warn, error) if warn is not None or error is not None else None
