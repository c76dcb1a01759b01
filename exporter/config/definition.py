"""What the dbt sources declare: one ``Definition`` a table, validated with file, line and key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from psycopg import sql

from exporter.errors import DefinitionError


class Key(NamedTuple):
    """A key of the definition: what validation knows of it, and what the reference shows."""

    meaning: str
    default: Any = None  # taken where the YAML says nothing
    otherwise: str = "required"  # said in the default's place where it is not one value


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
        " the cursor is an integer",
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
    """What is read. ``where`` is ``file:line`` of its declaration."""

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

    ``freshness`` are dbt's own of that name, the table's after its source's.
    """
    reader = _Reader(where)
    root = reader.mapping(meta, "")
    origin = reader.mapping(root.get("source"), "source")
    cursor = reader.mapping(origin.get("cursor"), "source.cursor")
    conflict = reader.names(root.get("conflict_columns"), "conflict_columns") or ()
    mode = reader.choice(
        root.get("mode", "upsert" if conflict else "append"), "mode", ("upsert", "append")
    )
    if mode == "upsert" and not conflict:
        reader.fail("conflict_columns", "is required with mode: upsert")
    nulls = reader.choice(cursor["nulls"], "source.cursor.nulls", ("error", "skip", "load"))
    if mode == "append" and nulls == "load":
        reader.fail("source.cursor.nulls", "cannot be load with mode: append, which reads once")
    deletes = reader.choice(root["deletes"], "deletes", ("ignore", "mark", "remove"))
    if mode == "append" and deletes != "ignore":
        reader.fail("deletes", "must be ignore with mode: append, whose rows have no key")
    id_field = cursor.get("id_field")
    columns, expressions = reader.columns(origin.get("columns"), "source.columns")
    exclude = reader.names(origin.get("exclude"), "source.exclude") or ()
    for name in (cursor.get("field"), id_field):
        if name in expressions:
            reader.fail("source.columns", f"computes {name}, which is read as the cursor")
    for name in conflict:
        if name in exclude or (columns is not None and name not in {*columns, *expressions}):
            reader.fail("conflict_columns", f"names {name}, which source.columns leaves out")
    spread = root.get("distribution_column", conflict[0] if conflict else None)
    if spread is not None and spread not in (conflict or (spread,)):
        reader.fail(
            "distribution_column", "must be one of conflict_columns: Citus keeps them unique"
        )
    key = reader.text(root.get("key", f"{source}.{table}"), "key")
    return Definition(
        key=key,
        where=where,
        source=SourceTable(
            where=where,
            schema=reader.text(origin["schema"], "source.schema"),
            table=reader.text(origin.get("table"), "source.table"),
            cursor=Cursor(
                reader.text(cursor.get("field"), "source.cursor.field"),
                None if id_field is None else reader.text(id_field, "source.cursor.id_field"),
                reader.lookback(cursor.get("lookback"), "source.cursor.lookback"),
                nulls,
            ),
            columns=columns,
            expressions=expressions,
            exclude=exclude,
        ),
        destination=Destination(
            key=key,
            schema=schema,
            table=table,
            conflict_columns=conflict if mode == "upsert" else (),
            mode=mode,
            evolution=reader.choice(root["schema"], "schema", ("evolve", "freeze")),
            deletes=deletes,
            distribution_column=spread,
        ),
        batch_rows=reader.positive(root["batch_rows"], "batch_rows"),
        freshness=_freshness(freshness, where),
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
    """Takes values out of the YAML, and fails with their place."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, key: str, problem: str) -> None:
        place = f"exporter.{key}" if key else "exporter"
        raise DefinitionError(f"{self.where}: {place} {problem}")

    def mapping(self, value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(key, "is required, a mapping" if value is None else "must be a mapping")
        known = _keys_below(key)
        for name in value:
            if name not in known:
                near = difflib.get_close_matches(snake_case(str(name)), known, 1)
                full = f"{key}.{name}" if key else str(name)
                advice = f"did you mean {near[0]}?" if near else "known: " + ", ".join(known)
                self.fail(full, f"is not a key of the exporter; {advice}")
        return {name: one for name, one in known.items() if one is not None} | dict(value)

    def text(self, value: Any, key: str) -> str:
        if value is None:
            self.fail(key, "is required")
        if not isinstance(value, str) or not value:
            self.fail(key, "must be text")
        return str(value)

    def names(self, value: Any, key: str) -> tuple[str, ...] | None:
        if value is None:
            return None
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            self.fail(key, "must be a list of column names")
        if len(set(value)) != len(value):
            self.fail(key, "names a column twice")
        return tuple(value)

    def columns(self, value: Any, key: str) -> tuple[tuple[str, ...] | None, dict[str, str]]:
        """Names, and mappings of a name and an expression: the plain names, the expressions."""
        if not isinstance(value, list):
            return self.names(value, key), {}
        plain = [one for one in value if not isinstance(one, dict)]
        expressions: dict[str, str] = {}
        for one in value:
            if isinstance(one, dict):
                if sorted(one) != ["expression", "name"]:
                    self.fail(key, "must be names, or mappings with name and expression")
                name = self.text(one["name"], f"{key}.name")
                expressions[name] = self.text(one["expression"], f"{key}.expression")
        self.names([*plain, *expressions], key)
        return tuple(plain), expressions

    def choice(self, value: Any, key: str, choices: tuple[str, ...]) -> str:
        if value not in choices:
            self.fail(key, "must be one of " + ", ".join(choices))
        return str(value)

    def positive(self, value: Any, key: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, "must be a whole number above 0")
        return int(value)

    def lookback(self, value: Any, key: str) -> timedelta | int | None:
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        found = re.fullmatch(r"(\d+) *(second|minute|hour|day)s?", str(value).strip())
        if not found:
            self.fail(key, "must be a time such as '5 minutes', or a number")
            raise AssertionError
        return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


def _keys_below(group: str) -> dict[str, Any]:
    """The keys of a group, each with its default."""
    prefix = f"{group}." if group else ""
    found: dict[str, Any] = {}
    for name, key in KEYS.items():
        if name.startswith(prefix):
            first, _, below = name.removeprefix(prefix).partition(".")
            found[first] = None if below else key.default
    return found


def snake_case(name: str) -> str:
    """Return ``invoice_id`` for ``InvoiceID``, ``order_lines`` for ``Order Lines``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"\W+", "_", words).strip("_").lower()
