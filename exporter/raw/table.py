"""The raw table: made from the source's catalog, or brought to the source's columns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter import state
from exporter.config import OWN, Destination
from exporter.errors import DriftError, SourceError
from exporter.raw import citus, drift, fit
from exporter.raw.drift import Change
from exporter.source import BEYOND, Column, Table, is_proved, versions
from exporter.source.catalog import require
from exporter.source.lookup import relation_columns
from exporter.wire import Connection

# The latter with deletes: mark, when a row was found to be gone; NULL while it lives.
STAMP, DELETED = OWN
_MOMENT = "timestamp with time zone"
_SMALL = 1024**3  # bytes of a raw table that a load may write anew, for a wider type
_FILL = 90  # percent: a changed row finds room in its page, and the key's index stays as it is


class RawTable(NamedTuple):
    """The raw table of a definition, as the rows of this load find it."""

    target: Destination
    columns: tuple[Column, ...]  # those that are read: the source's, and what it has lost
    unique_at_source: bool
    exact: bool  # raw's types are the ones we would give it: the binary format may be used
    stamped: bool  # it has `_exported_at`; a table that migrations own may lack it
    marked: bool  # it has `_deleted_at`
    key_is_not_null: bool = True
    fixed: frozenset[str] = frozenset()  # identity columns, which no update may touch
    narrow: Mapping[str, str] = MappingProxyType({})  # columns whose type in raw may round values
    on_citus: bool = False  # distributed: not every statement can reach its rows

    @property
    def name(self) -> sql.Identifier:
        """The table's qualified name."""
        return self.target.name

    @property
    def names(self) -> list[sql.Identifier]:
        """The columns' names."""
        return [sql.Identifier(column.name) for column in self.columns]

    @property
    def key(self) -> list[sql.Identifier]:
        """The columns of ON CONFLICT; none in append mode."""
        return [sql.Identifier(name) for name in self.target.conflict_columns]

    @property
    def identity(self) -> tuple[str, ...]:
        """The columns of its primary key: of a history, those of a version."""
        return _identity(self.target, self.target.conflict_columns)

    @property
    def keyed(self) -> bool:
        """Whether a key that the source proves to be unique, and never NULL, tells rows apart."""
        return bool(self.key) and self.unique_at_source and self.key_is_not_null

    @property
    def binary(self) -> bool:
        """Whether rows may go into it in COPY's binary format, with their stamp."""
        return self.exact and self.stamped and all(column.binary for column in self.columns)


class Preparation(NamedTuple):
    """What is to be done for the raw table to take the source's rows, and what it is then."""

    raw: RawTable
    creation: sql.Composed | None  # where there is no table yet
    changes: tuple[Change, ...]
    notices: tuple[str, ...]  # what a person should know though nothing is to be done
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
                if planned.raw.on_citus:
                    citus.distribute(destination, target)
            for change in planned.changes:
                began = time.monotonic()
                _change(destination, target, change.statement)
                seconds = f"; raw was written anew in {time.monotonic() - began:.1f} s"
                say(change.said + (seconds if change.rewrites else ""))
            state.remember_columns(destination, target, planned.remembered)
    for notice in planned.notices:
        say(notice)
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
    if not columns:  # not before its rows are read
        nothing = target._replace(conflict_columns=())
        return Preparation(RawTable(nothing, (), True, True, True, False), None, (), (), {})
    conflict = frozenset(target.conflict_columns)
    unique = is_proved(table, target.conflict_columns)
    not_null = all(column.not_null for column in table.landed if column.name in conflict)
    require(table, "conflict_columns", target.conflict_columns)
    refuse_own_names(target, table)
    existing = relation_columns(destination, target.schema, target.table)
    if existing is not None:
        refuse_other_kind(target, table, existing)
    marked = target.deletes == "mark"
    if existing is None:
        on_citus = target.distribution_column is not None and citus.is_here(destination)
        raw = RawTable(target, columns, unique, True, True, marked, not_null, on_citus=on_citus)
        fit.refuse_wide(target, len(columns) + 1 + marked)
        created = creation(target, columns)
        return Preparation(raw, created, (), (), {column.name: column.base for column in columns})
    made = fit.made(destination, target)
    fit.refuse_unfit(target, made, [*(column.name for column in columns), STAMP])
    columns = tuple(column for column in columns if column.name not in made.computed)
    found = drift.plan(
        target,
        columns,
        [c.name for c in table.columns],
        existing,
        before,
        may_rewrite=lambda: _size(destination, target) <= _SMALL,
    )
    changed = {change.column for change in found.changes}
    exact = all(existing.get(c.name) == c.raw_type for c in columns if c.name not in changed)
    stamped = STAMP in existing or target.evolution == "evolve"
    marked = marked or existing.get(DELETED) == _MOMENT
    columns += found.gone
    raw = RawTable(
        target,
        columns,
        unique,
        exact,
        stamped,
        marked and DELETED not in {column.name for column in columns},
        not_null,
        made.fixed,
        {
            c.name: existing[c.name]
            for c in columns
            if c.name in existing
            and c.name not in changed
            and drift.rounds(existing[c.name], c.raw_type)
        },
        citus.is_here(destination) and citus.has(destination, target),
    )
    changes = (*found.changes, *_own_columns(target, existing))
    added = [change.column for change in changes if change.column not in existing]
    fit.refuse_wide(target, made.width + len(added))
    notices = found.told if stamped else (*found.told, _unstamped(target))
    return Preparation(raw, None, changes, notices, found.remembered)


def refuse_own_names(target: Destination, table: Table) -> None:
    """Raise SourceError for a column of a name that raw, or the rows on their way, need."""
    needed = {STAMP: "raw", BEYOND.name: "staging"}
    if target.deletes == "mark":
        needed[DELETED] = "exporter.deletes: mark"
    landed = [column.name for column in table.landed]
    if target.is_history:  # what has a name of these is ours, in the source's place
        needed |= dict.fromkeys(versions.OWN, "exporter.mode: history")
        landed = [c.name for c in table.columns if table.declared.lands(c.name)]
    for name in landed:
        if name in needed:
            raise SourceError(
                f"{table.declared.where}: the source has a column {name}, a name that"
                f" {needed[name]} needs",
                hint=f"exporter.source.exclude: [{name}]",
            )


def refuse_other_kind(target: Destination, table: Table, existing: Iterable[str]) -> None:
    """Raise DriftError for a history that is to be a mirror or a log, and the other way round."""
    found = {*versions.OWN} & {*existing} - {column.name for column in table.columns}
    wrong = ""
    if target.is_history and len(found) < len(versions.OWN):
        missing = ", ".join(name for name in versions.OWN if name not in found)
        wrong = f"lacks {missing}: it is no history"
    elif not target.is_history and len(found) == len(versions.OWN):
        wrong = "has the versions of rows: it is a history"
    if wrong:
        raise DriftError(
            f"{target.key}: {target} {wrong}, and exporter.mode is {target.mode}",
            hint=f"alter table {target} rename to …; or give {target.key} another identifier",
        )


def _size(destination: Connection, target: Destination) -> int:
    row = destination.execute(
        "select pg_total_relation_size(to_regclass(%s))", (target.name.as_string(destination),)
    ).fetchone()
    return int(row[0] or 0) if row else 0


def _own_columns(target: Destination, existing: dict[str, str]) -> Iterator[Change]:
    """Yield what gives a table that was there before the columns that are ours."""
    statement = sql.SQL("alter table {} add column {} timestamptz")
    if STAMP not in existing and target.evolution == "evolve":
        stamp = statement.format(target.name, sql.Identifier(STAMP))
        stamp += sql.SQL(" not null default now()")
        yield Change(stamp, f"{target} has {STAMP} from now on", STAMP)
    if DELETED not in existing and target.deletes == "mark":
        deleted = statement.format(target.name, sql.Identifier(DELETED))
        what = f"{target} has no {DELETED}, which exporter.deletes: mark needs"
        drift.refuse_if_frozen(target, what, deleted)
        yield Change(deleted, f"{target} has {DELETED} from now on", DELETED)


def _unstamped(target: Destination) -> str:
    return (
        f"{target} has no {STAMP}, and exporter.schema: freeze leaves it so: no model can tell its"
        " new rows"
    )


def _change(destination: Connection, target: Destination, statement: sql.Composed) -> None:
    """Alter the raw table. Raises DriftError where something depends on it, or it is another's."""
    try:
        destination.execute(statement)
    except (psycopg.errors.FeatureNotSupported, psycopg.errors.InsufficientPrivilege) as error:
        problem, advice = error.diag.message_primary, "run it as the table's owner"
        if isinstance(error, psycopg.errors.FeatureNotSupported):  # a view has the column
            problem = f"{problem}: {error.diag.message_detail}"
            advice = (
                "drop before it what depends on the column, and make that anew after it, as dbt run"
                " does"
            )
        hint = f"{statement.as_string(destination)}; {advice}"
        raise DriftError(f"{target.key}: {problem}", hint=hint) from None


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
    changes = target.conflict_columns and not target.is_history
    fill = sql.SQL(f" with (fillfactor = {_FILL})" if changes else "")
    if key and target.conflict_columns:
        identity = _identity(target, target.conflict_columns)
        names = sql.SQL(", ").join(sql.Identifier(name) for name in identity)
        parts.append(sql.SQL("primary key ({})").format(names))
    columns_and_key = sql.SQL(",\n    ").join(parts)
    return sql.SQL("create table {} (\n    {}\n){}").format(target.name, columns_and_key, fill)


def _identity(target: Destination, key: Sequence[str]) -> tuple[str, ...]:
    return (*key, *(versions.ORDER if target.is_history and key else ()))


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


def key_statement(
    destination: Connection, raw: RawTable, old_key: Sequence[str] = ()
) -> sql.Composed | None:
    """Return what gives the raw table its primary key, None where a unique index covers it.

    A primary key on ``old_key``, which an earlier definition had, is given up for it. Raises
    DriftError where the table cannot have it.
    """
    if not raw.key:
        return None
    indexes = fit.unique_indexes(destination, raw.name)
    if any(one.usable and one.columns == sorted(raw.identity) for one in indexes):
        return None
    before = sorted(_identity(raw.target, old_key))
    old = [one for one in indexes if one.primary and one.usable and one.columns == before]
    fit.refuse_keyless(destination, raw.target, indexes, old[0] if old else None)
    statement = sql.SQL("alter table {} ").format(raw.name)
    if old:
        statement += sql.SQL("drop constraint {}, ").format(sql.Identifier(old[0].name))
    names = sql.SQL(", ").join(map(sql.Identifier, raw.identity))
    return statement + sql.SQL("add primary key ({})").format(names)


def ensure_key(destination: Connection, raw: RawTable, old_key: Sequence[str] = ()) -> None:
    """Give the raw table its primary key unless a unique index covers it. Raises DriftError."""
    statement = key_statement(destination, raw, old_key)
    if statement is None:
        return
    target, keys = raw.target, ", ".join(raw.identity)
    try:
        destination.execute(statement)
    except psycopg.errors.UniqueViolation:
        raise DriftError(
            f"{target.key}: {target} holds rows that share conflict_columns ({keys})",
            hint=f"correct conflict_columns; or truncate table {target}, then exporter load"
            f" {target.key}, which begins anew",
        ) from None
    except psycopg.errors.NotNullViolation:
        raise DriftError(
            f"{target.key}: {target} holds rows that have NULL in conflict_columns ({keys})",
            hint=f"delete these rows of {target}; or truncate it, then exporter load {target.key}",
        ) from None
