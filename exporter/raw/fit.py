"""Whether a relation that somebody else made can take rows: what it is, what it asks of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from psycopg import sql

from exporter.config import Destination
from exporter.errors import DriftError
from exporter.wire import Connection

_MOST_COLUMNS = 1600  # PostgreSQL's own bound; those that were dropped count, too
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}
_MADE = """
select c.relkind::text, c.relnatts::int,
    array(select attname::text from pg_attribute a where attrelid = c.oid and attidentity = 'a'),
    array(select attname::text from pg_attribute a where attrelid = c.oid and attgenerated <> ''),
    array(select attname::text from pg_attribute a join pg_type t on t.oid = a.atttypid
        where attrelid = c.oid and attnum > 0 and (attnotnull or typnotnull)
        and not atthasdef and attidentity = '' and typdefault is null)
from pg_class c where c.oid = to_regclass(%s)
"""
_INDEXES = """
select array(select a.attname::text from pg_attribute a where a.attrelid = i.indrelid
        and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1]) order by 1),
    i.indisprimary, c.relname,
    i.indisvalid and i.indimmediate and i.indpred is null and i.indexprs is null
from pg_index i join pg_class c on c.oid = i.indexrelid
where i.indrelid = to_regclass(%s) and i.indisunique
"""
_PARTITIONED_BY = """
select a.attname::text from pg_partitioned_table p
cross join lateral unnest(p.partattrs::int2[]) k (attnum)
left join pg_attribute a on a.attrelid = p.partrelid and a.attnum = k.attnum and k.attnum > 0
where p.partrelid = to_regclass(%s)
"""


class Made(NamedTuple):
    """What stands in the catalog of a relation that is there. Migrations may have made it."""

    kind: str  # pg_class.relkind
    width: int  # columns, those that were dropped included
    fixed: frozenset[str]  # identity columns that are always generated
    computed: frozenset[str]  # columns that it computes itself
    required: frozenset[str]  # columns for which each row has to bring a value


class Unique(NamedTuple):
    """A unique index."""

    columns: list[str]  # by name
    primary: bool
    name: str
    usable: bool  # by ON CONFLICT


def made(destination: Connection, target: Destination) -> Made:
    """Return what is known of the raw table, which is there."""
    row = destination.execute(_MADE, (target.name.as_string(destination),)).fetchone()
    assert row is not None
    kind, width, *names = row
    return Made(kind, width, *map(frozenset, names))


def refuse_unfit(target: Destination, found: Made, landed: Iterable[str]) -> None:
    """Raise DriftError for a relation into which no row of these columns could land."""
    if found.kind not in ("r", "p"):
        raise DriftError(
            f"{target.key}: {target} is {_KINDS.get(found.kind, 'no table')}, and rows land in"
            " tables alone",
            hint=f"rename or drop it; or give {target.key} another identifier in its YAML",
        )
    missing = sorted(found.required - {*landed})
    if missing:
        names = [sql.Identifier(name).as_string(None) for name in missing]
        raise DriftError(
            f"{target.key}: {target} has columns that are NOT NULL and have no default, of which"
            f" the source has none: {', '.join(missing)}",
            hint=f"alter table {target} "
            + ", ".join(f"alter column {name} drop not null" for name in names),
        )


def refuse_wide(target: Destination, width: int) -> None:
    """Raise DriftError for more columns than a table can have."""
    if width > _MOST_COLUMNS:
        raise DriftError(
            f"{target.key}: {target} would have {width:,} columns, those that were dropped"
            f" included; PostgreSQL's tables have {_MOST_COLUMNS:,} at most, and raw needs one for"
            " itself",
            hint="exporter.source.exclude, or columns: leave some at the source",
        )


def unique_indexes(destination: Connection, name: sql.Identifier) -> list[Unique]:
    """Return the unique indexes of the raw table; none where it is not there."""
    rows = destination.execute(_INDEXES, (name.as_string(destination),)).fetchall()
    return [Unique(*row) for row in rows]


def refuse_keyless(
    destination: Connection, target: Destination, indexes: Sequence[Unique], replaced: Unique | None
) -> None:
    """Raise DriftError where the raw table cannot be given a primary key on the key's columns.

    ``replaced`` is a primary key that would be given up for it.
    """
    keys = ", ".join(sql.Identifier(name).as_string(None) for name in target.conflict_columns)
    primary = next((one for one in indexes if one.primary and one is not replaced), None)
    if primary:
        why = ", which is deferrable," if not primary.usable else ""
        raise DriftError(
            f"{target.key}: {target} has no unique index for conflict_columns ({keys}); its primary"
            f" key ({', '.join(primary.columns)}){why} cannot serve",
            hint=f"create unique index on {target} ({keys})",
        )
    rows = destination.execute(_PARTITIONED_BY, (target.name.as_string(destination),)).fetchall()
    missing = [name or "an expression" for (name,) in rows if name not in target.conflict_columns]
    if missing:
        raise DriftError(
            f"{target.key}: {target} is partitioned by {', '.join(missing)}, which conflict_columns"
            f" ({keys}) do not name: PostgreSQL cannot keep them unique there",
            hint="name it in conflict_columns, too, if it never changes in a row; or let the load"
            " make a table that is not partitioned",
        )
