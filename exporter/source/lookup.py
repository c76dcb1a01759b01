"""Single questions to a catalog, of tables that need not be read: sizes, columns, indexes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from psycopg import sql

from exporter.config import SourceTable
from exporter.wire import Connection

# From statistics: to ask for a file's size would wait where a table is locked.
_SIZES = """
with recursive part (root, oid) as (
    select c.oid, c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where (n.nspname, c.relname) in (select * from unnest(%s::text[], %s::text[]))
    union all
    select p.root, i.inhrelid from part p join pg_inherits i on i.inhparent = p.oid
)
select n.nspname, r.relname, sum(greatest(c.relpages, 0))
from part p join pg_class c on c.oid = p.oid join pg_class r on r.oid = p.root
    join pg_namespace n on n.oid = r.relnamespace
group by r.oid, 1, 2
"""


def blocks_of(source: Connection, tables: Mapping[str, SourceTable]) -> dict[str, int]:
    """Return how many blocks each of the tables had when it was last analyzed, by its key."""
    names = {key: (table.schema, table.table) for key, table in tables.items()}
    lists = [list(part) for part in zip(*names.values(), strict=True)]
    rows = source.execute(_SIZES, lists).fetchall()
    sizes = {(schema, table): int(size) for schema, table, size in rows}
    return {key: sizes.get(name, 0) for key, name in names.items()}


def relation_columns(connection: Connection, schema: str, name: str) -> dict[str, str] | None:
    """Return name → type of a relation's columns, None where there is no such relation."""
    rows = connection.execute(
        "select a.attname, format_type(a.atttypid, a.atttypmod) from pg_class c"
        " join pg_namespace n on n.oid = c.relnamespace"
        " left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped"
        " where n.nspname = %s and c.relname = %s order by a.attnum",
        (schema, name),
    ).fetchall()
    return {row[0]: row[1] for row in rows if row[0] is not None} if rows else None


def quoted(connection: Connection, *names: str) -> str:
    """Return a dotted name for a person to paste: in quotes only where PostgreSQL needs them."""
    row = connection.execute(
        "select string_agg(quote_ident(n), '.' order by place)"
        " from unnest(%s::text[]) with ordinality t (n, place)",
        (list(names),),
    ).fetchone()
    assert row is not None
    return str(row[0])


class Index(NamedTuple):
    """An index that a read in the order of its columns can use."""

    columns: tuple[str, ...]
    unique: bool
    primary: bool


def indexes(connection: Connection, oid: int) -> list[Index]:
    """Return the indexes of a table, the primary key first."""
    rows = connection.execute(
        "select array_agg(a.attname::text order by k.place), i.indisunique, i.indisprimary"
        " from pg_index i"
        " join pg_class c on c.oid = i.indexrelid join pg_am m on m.oid = c.relam"
        " cross join lateral unnest((i.indkey::int2[])[0:i.indnkeyatts - 1])"
        " with ordinality k (attnum, place)"
        " join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum"
        " where i.indrelid = %s and i.indisvalid and i.indpred is null and i.indexprs is null"
        " and m.amname = 'btree' group by i.indexrelid, i.indisunique, i.indisprimary"
        " order by i.indisprimary desc, count(*), i.indexrelid",
        (oid,),
    )
    return [Index(tuple(names), unique, primary) for names, unique, primary in rows]


def planned_rows(connection: Connection, query: sql.Composable) -> int:
    """Return how many rows the planner expects of a query. Nothing is read."""
    row = connection.execute(sql.SQL("explain (format json) {}").format(query)).fetchone()
    assert row is not None
    return int(row[0][0]["Plan"]["Plan Rows"])
