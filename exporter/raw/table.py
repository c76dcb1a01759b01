"""The raw table: made from the source's catalog, or brought to the source's columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter import state
from exporter.config import Destination
from exporter.errors import DriftError, SourceError
from exporter.raw import citus, drift
from exporter.raw.drift import Change
from exporter.source import Column, Table
from exporter.source.catalog import relation_columns, require
from exporter.wire import Connection

STAMP = "_exported_at"
DELETED = "_deleted_at"  # with deletes: mark, when a row was found to be gone; NULL while it lives
_MOMENT = "timestamp with time zone"
_FILL = 90  # percent: a changed row finds room in its page, and the key's index stays as it is


class RawTable(NamedTuple):
    """The raw table of a definition, as the rows of this load find it."""

    target: Destination
    columns: tuple[Column, ...]  # those that are read: the source's, and what it has lost
    unique_at_source: bool
    exact: bool  # raw's types are the ones we would give it: the binary format may be used
    stamped: bool  # it has `_exported_at`; a table that migrations own may lack it
    marked: bool  # it has `_deleted_at`
    in_shards: bool = False  # Citus has it: not every statement can reach it

    @property
    def name(self) -> sql.Identifier:
        """The table's qualified name."""
        return self.target.name

    @property
    def key(self) -> list[sql.Identifier]:
        """The columns of ON CONFLICT; none in append mode."""
        return [sql.Identifier(name) for name in self.target.conflict_columns]

    @property
    def keyed(self) -> bool:
        """Whether a key that is unique at the source, too, tells its rows apart."""
        return self.unique_at_source and bool(self.target.conflict_columns)

    @property
    def binary(self) -> bool:
        """Whether rows may go into it in COPY's binary format, with their stamp."""
        return self.exact and self.stamped and all(column.binary for column in self.columns)


class Preparation(NamedTuple):
    """What is to be done for the raw table to take the source's rows, and what it is then."""

    raw: RawTable
    creation: sql.Composed | None  # where there is no table yet
    changes: tuple[Change, ...]
    told: tuple[str, ...]
    remembered: dict[str, str | None]


def prepare(
    destination: Connection,
    target: Destination,
    table: Table,
    say: Callable[[str], None],
) -> RawTable:
    """Create the raw table, or bring it to the source's columns. Raises DriftError."""
    before = state.remembered_columns(destination, target)
    planned = plan(destination, target, table, before)
    if planned.creation or planned.changes or planned.remembered != before:
        with destination.transaction():
            if planned.creation:
                state.create_schema(destination, target.schema)
                destination.execute(planned.creation)
                if planned.raw.in_shards:
                    destination.execute(citus.distribution(target))
            for change in planned.changes:
                _change(destination, target, change.statement)
                say(change.said)
            state.remember_columns(destination, target, planned.remembered)
    for told in planned.told:
        say(told)
    return planned.raw


def plan(
    destination: Connection,
    target: Destination,
    table: Table,
    before: dict[str, str | None] | None,
) -> Preparation:
    """Decide what becomes of the raw table; ``before`` are the columns of the last load.

    Raises DriftError.
    """
    columns = table.landed
    conflict = frozenset(target.conflict_columns)
    unique = any(key <= conflict for key in table.unique_keys)
    require(table, "conflict_columns", target.conflict_columns)
    _refuse_own_names(target, table)
    existing = relation_columns(destination, target.schema, target.table)
    created: sql.Composed | None = None
    changes: tuple[Change, ...] = ()
    told: tuple[str, ...] = ()
    stamped = exact = True
    marked = target.deletes == "mark"
    remembered: dict[str, str | None] = {c.name: c.base for c in columns}
    gone: tuple[Column, ...] = ()
    if existing is None:
        created = creation(target, columns)
        in_shards = target.distribution_column is not None and citus.is_here(destination)
    else:
        in_shards = citus.is_here(destination) and citus.has(destination, target)
        found = drift.plan(target, columns, [c.name for c in table.columns], existing, before)
        gone, remembered = found.gone, found.remembered
        stamped = STAMP in existing or target.evolution == "evolve"
        changes = (*found.changes, *_own_columns(target, existing))
        told = (*found.told, *(() if stamped else (_unstamped(target),)))
        changed = {change.column for change in found.changes}
        exact = all(existing.get(c.name) == c.raw_type for c in columns if c.name not in changed)
        marked = marked or existing.get(DELETED) == _MOMENT
    columns += gone
    names = {column.name for column in columns}
    marked = marked and DELETED not in names
    raw = RawTable(target, columns, unique, exact, stamped, marked, in_shards)
    return Preparation(raw, created, changes, told, remembered)


def _refuse_own_names(target: Destination, table: Table) -> None:
    if target.deletes == "mark" and DELETED in {column.name for column in table.landed}:
        raise SourceError(
            f"{table.declared.where}: the source has a column {DELETED}, a name that"
            " exporter.deletes: mark needs",
            hint=f"exporter.source.exclude: [{DELETED}]",
        )


def _own_columns(target: Destination, existing: dict[str, str]) -> Iterator[Change]:
    """Yield what gives a table that was there before the columns that are ours."""
    table = target.name
    name = str(target)
    statement = sql.SQL("alter table {} add column {} timestamptz")
    if STAMP not in existing and target.evolution == "evolve":
        stamp = statement.format(table, sql.Identifier(STAMP)) + sql.SQL(" not null default now()")
        yield Change(stamp, f"{name} has {STAMP} from now on", STAMP)
    if DELETED not in existing and target.deletes == "mark":
        deleted = statement.format(table, sql.Identifier(DELETED))
        if target.evolution == "freeze":
            raise DriftError(
                f"{target.key}: {name} has no {DELETED}, which exporter.deletes: mark needs,"
                " and exporter.schema is freeze",
                hint=deleted.as_string(None),
            )
        yield Change(deleted, f"{name} has {DELETED} from now on", DELETED)


def _unstamped(target: Destination) -> str:
    return (
        f"{target} has no {STAMP}, and exporter.schema: freeze leaves"
        " it so: no model can tell its new rows"
    )


def _change(destination: Connection, target: Destination, statement: sql.Composed) -> None:
    """Alter the raw table. Raises DriftError where something depends on it, or it is another's."""
    try:
        destination.execute(statement)
    except psycopg.errors.FeatureNotSupported as error:  # a view has the column
        raise DriftError(
            f"{target.key}: {error.diag.message_primary}: {error.diag.message_detail}",
            hint=f"{statement.as_string(destination)}; drop before it what depends on the column,"
            " and make that anew after it, as dbt run does",
        ) from None
    except psycopg.errors.InsufficientPrivilege as error:
        raise DriftError(
            f"{target.key}: {error.diag.message_primary}",
            hint=f"{statement.as_string(destination)}; run it as the table's owner",
        ) from None


def creation(target: Destination, columns: Iterable[Column], *, key: bool = False) -> sql.Composed:
    """Return the statement that makes the raw table; with ``key``, its primary key, too."""
    parts = [
        sql.SQL("{} {}{}").format(
            sql.Identifier(column.name),
            sql.SQL(column.raw_type),
            sql.SQL(" not null" if column.name in target.conflict_columns else ""),
        )
        for column in columns
    ]
    parts.append(sql.SQL("{} timestamptz not null").format(sql.Identifier(STAMP)))
    if target.deletes == "mark":
        parts.append(sql.SQL("{} timestamptz").format(sql.Identifier(DELETED)))
    fill = sql.SQL(f" with (fillfactor = {_FILL})" if target.conflict_columns else "")
    if key and target.conflict_columns:
        names = sql.SQL(", ").join(sql.Identifier(name) for name in target.conflict_columns)
        parts.append(sql.SQL("primary key ({})").format(names))
    return sql.SQL("create table {} (\n    {}\n){}").format(
        target.name,
        sql.SQL(",\n    ").join(parts),
        fill,
    )


def oid_and_emptiness(destination: Connection, target: Destination) -> tuple[int, bool]:
    """Return the raw table's oid, and whether it has no row; 0 and true before it is made."""
    statement = sql.SQL(
        "select pg_catalog.to_regclass({})::oid::bigint, not exists (select from {})"
    ).format(sql.Literal(target.name.as_string(destination)), target.name)
    try:
        row = destination.execute(statement).fetchone()
    except psycopg.errors.UndefinedTable:
        return 0, True
    assert row is not None
    return row[0], row[1]


def key_statement(destination: Connection, raw: RawTable) -> sql.Composed | None:
    """Return what gives the raw table its primary key, None where a unique index covers it."""
    if not raw.key:
        return None
    found = destination.execute(
        "select from pg_index i where i.indrelid = to_regclass(%s) and i.indisunique"
        " and i.indisvalid and i.indimmediate and i.indpred is null and i.indexprs is null and ("
        "  select array_agg(a.attname::text order by a.attname::text) from pg_attribute a"
        "  where a.attrelid = i.indrelid"
        "  and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])"
        " ) = (select array_agg(n order by n) from unnest(%s::text[]) n)",
        (raw.name.as_string(destination), list(raw.target.conflict_columns)),
    ).fetchone()
    if found is not None:
        return None
    return sql.SQL("alter table {} add primary key ({})").format(
        raw.name, sql.SQL(", ").join(raw.key)
    )


def ensure_key(destination: Connection, raw: RawTable) -> None:
    """Give the raw table its primary key unless a unique index covers it. Raises DriftError."""
    statement = key_statement(destination, raw)
    if statement is None:
        return
    try:
        destination.execute(statement)
    except psycopg.errors.UniqueViolation:
        keys = ", ".join(raw.target.conflict_columns)
        raise DriftError(
            f"{raw.target.key}: {raw.target} holds rows that share conflict_columns ({keys})",
            hint="correct conflict_columns, or run with --full-refresh",
        ) from None
