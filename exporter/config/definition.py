"""What the dbt sources declare: one ``Definition`` a table, validated with file, line and key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

from psycopg import sql

from exporter.errors import DefinitionError, nearest


class Key(NamedTuple):
    """A key of the definition, as validation and the reference page need it."""

    meaning: str
    default: Any = None  # taken where the YAML says nothing
    otherwise: str = "required"  # shown in the default's place where it is not one value


KEYS = {
    "key": Key("what `exporter load` is given", otherwise="`source.table`, as dbt names it"),
    "source.schema": Key("schema at the source", "public"),
    "source.table": Key("table, view or partitioned table at the source"),
    "source.cursor.field": Key("column that grows with every change: a timestamp, date or integer"),
    "source.cursor.id_field": Key(
        "tie-breaker for rows that share a cursor value", otherwise="none"
    ),
    "source.cursor.lookback": Key(
        "how far behind a stamp may be that the database did not make: a time, or a number where"
        " the cursor is an integer. If it is set, it counts from the newest row where that is older"
        " than the oldest open transaction",
        otherwise="`5 minutes`; 0 for an integer and with `mode: append`",
    ),
    "source.cursor.nulls": Key("rows without a cursor: `error`, `skip` or `load`", "error"),
    "source.columns": Key(
        'columns to land; `{name: email_hash, expression: "md5(lower(email))"}` is computed by the'
        " source",
        otherwise="all",
    ),
    "source.exclude": Key("columns that do not leave the source", otherwise="none"),
    "conflict_columns": Key(
        "unique columns; the primary key of the raw table", otherwise="none: `mode: append`"
    ),
    "mode": Key(
        "`upsert`, a mirror; or `append`, an append-only log",
        otherwise="`upsert` with `conflict_columns`, else `append`",
    ),
    "schema": Key(
        "what a change of the source's columns may do to raw: `evolve` or `freeze`", "evolve"
    ),
    "deletes": Key(
        "what becomes of rows that are gone at the source, at the next `load --reconcile` or"
        " `verify --repair`: `ignore`, `mark` (in `_deleted_at`) or `remove`",
        "ignore",
    ),
    "batch_rows": Key("most rows of one transaction", 50_000),
    "distribution_column": Key(
        "on Citus: the column by which the raw table is distributed, one of `conflict_columns`",
        otherwise="the first of `conflict_columns`",
    ),
}
_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


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


class SourceTable(NamedTuple):
    """The table that is read, and what of it. ``where`` is ``file:line`` of its declaration."""

    where: str
    schema: str
    table: str
    cursor: Cursor
    columns: tuple[str, ...] | None  # None: all
    expressions: dict[str, str]  # column → SQL that the source computes
    exclude: tuple[str, ...]

    @property
    def name(self) -> sql.Identifier:
        """The qualified name of the table."""
        return sql.Identifier(self.schema, self.table)

    def lands(self, column: str) -> bool:
        """Whether a column of the source gets into raw."""
        chosen = self.columns is None or column in self.columns
        return (chosen and column not in self.exclude) or column in self.expressions


class Destination(NamedTuple):
    """The raw table: where rows land, and what may become of it. ``key`` is its definition's."""

    key: str
    schema: str
    table: str
    conflict_columns: tuple[str, ...]  # none in append mode
    mode: str  # upsert or append
    evolution: str  # evolve or freeze: what a change of the source's columns may do to raw
    deletes: str  # ignore, mark or remove: what becomes of rows that are gone at the source
    distribution_column: str | None = None  # on Citus; None: the table stays where it is made

    @property
    def name(self) -> sql.Identifier:
        """The qualified name of the raw table."""
        return sql.Identifier(self.schema, self.table)

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


def parse(
    meta: Any,
    *,
    where: str,
    source: str,
    table: str,
    schema: str,
    freshness: Sequence[Any] = (),
) -> Definition:
    """Return the definition in ``config.meta.exporter``. Raises DefinitionError.

    ``freshness`` are the values of dbt's key of that name, the table's after its source's.
    """
    reader = _Reader(meta, where)
    key = reader.text("key", f"{source}.{table}")
    origin = _source(reader)
    return Definition(
        key=key,
        where=where,
        source=origin,
        destination=_destination(reader, key, schema, table, origin),
        batch_rows=reader.positive("batch_rows"),
        freshness=_freshness(freshness, where),
    )


def _source(reader: _Reader) -> SourceTable:
    columns, expressions = reader.columns("source.columns")
    id_field = "source.cursor.id_field"
    cursor = Cursor(
        reader.text("source.cursor.field"),
        None if reader.value(id_field) is None else reader.text(id_field),
        reader.lookback("source.cursor.lookback"),
        reader.choice("source.cursor.nulls", ("error", "skip", "load")),
    )
    for name in (cursor.field, cursor.id_field):
        if name in expressions:
            reader.fail("source.columns", f"computes {name}, which is read as the cursor")
    return SourceTable(
        where=reader.where,
        schema=reader.text("source.schema"),
        table=reader.text("source.table"),
        cursor=cursor,
        columns=columns,
        expressions=expressions,
        exclude=reader.names("source.exclude"),
    )


def _destination(
    reader: _Reader, key: str, schema: str, table: str, source: SourceTable
) -> Destination:
    conflict = reader.names("conflict_columns")
    mode = reader.choice("mode", ("upsert", "append"), "upsert" if conflict else "append")
    deletes = reader.choice("deletes", ("ignore", "mark", "remove"))
    if mode == "upsert" and not conflict:
        reader.fail("conflict_columns", "is required with mode: upsert")
    if mode == "append" and source.cursor.nulls == "load":
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
        conflict_columns=conflict if mode == "upsert" else (),
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
                if not isinstance(count, int) or unit not in _UNITS:
                    raise DefinitionError(
                        f"{where}: freshness.{name} must be such as {{count: 1, period: day}}"
                    )
                found[name] = timedelta(seconds=count * _UNITS[unit])
    warn, error = found.get("warn_after"), found.get("error_after")
    return Freshness(warn, error) if warn is not None or error is not None else None


class _Reader:
    """The values of a definition by their dotted names, as in KEYS; an error names their place."""

    def __init__(self, meta: Any, where: str) -> None:
        self.where = where
        self._values: dict[str, Any] = {}
        self._add("", meta)
        self._add("source.", self._values.get("source"))
        self._add("source.cursor.", self._values.get("source.cursor"))

    def _add(self, prefix: str, group: Any) -> None:
        if not isinstance(group, dict):
            problem = "is required, a mapping" if group is None else "must be a mapping"
            self.fail(prefix.rstrip("."), problem)
        below = (name.removeprefix(prefix) for name in KEYS if name.startswith(prefix))
        known = list(dict.fromkeys(name.partition(".")[0] for name in below))
        for name, value in group.items():
            if name not in known:
                advice = nearest(snake_case(str(name)), known)
                self.fail(f"{prefix}{name}", f"is not a key of the exporter; {advice}")
            self._values[prefix + name] = value

    def fail(self, key: str, problem: str) -> NoReturn:
        place = f"exporter.{key}" if key else "exporter"
        raise DefinitionError(f"{self.where}: {place} {problem}")

    def value(self, key: str, default: Any = None) -> Any:
        """Return what the YAML says, which may be null; else the default."""
        return self._values.get(key, KEYS[key].default if default is None else default)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value(key, default)
        if value is None:
            self.fail(key, "is required")
        if not isinstance(value, str) or not value:
            self.fail(key, "must be text")
        return value

    def names(self, key: str, names: Any = None) -> tuple[str, ...]:
        """Return the names that the YAML lists, or check the given ones."""
        names = self.value(key) if names is None else names
        if names is None:
            return ()
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            self.fail(key, "must be a list of column names")
        if len(set(names)) != len(names):
            self.fail(key, "names a column twice")
        return tuple(names)

    def columns(self, key: str) -> tuple[tuple[str, ...] | None, dict[str, str]]:
        """Return the plain names, None for all columns; and the computed ones' expressions."""
        value = self.value(key)
        if not isinstance(value, list):
            return self.names(key) or None, {}
        plain = [item for item in value if not isinstance(item, dict)]
        expressions: dict[str, str] = {}
        for item in value:
            if isinstance(item, dict):
                if sorted(item) != ["expression", "name"]:
                    self.fail(key, "must be names, or mappings with name and expression")
                for part, text in item.items():
                    if not isinstance(text, str) or not text:
                        self.fail(f"{key}.{part}", "must be text")
                expressions[item["name"]] = item["expression"]
        self.names(key, [*plain, *expressions])
        return tuple(plain), expressions

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value = self.value(key, default)
        if value not in choices:
            self.fail(key, "must be one of " + ", ".join(choices))
        return str(value)

    def positive(self, key: str) -> int:
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, "must be a whole number above 0")
        return value

    def lookback(self, key: str) -> timedelta | int | None:
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        found = re.fullmatch(r"(\d+) *(second|minute|hour|day)s?", str(value).strip())
        if not found:
            self.fail(key, "must be a time such as '5 minutes', or a number")
        return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


def snake_case(name: str) -> str:
    """Return ``invoice_id`` for ``InvoiceID``, ``order_lines`` for ``Order Lines``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"\W+", "_", words).strip("_").lower()
