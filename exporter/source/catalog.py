"""What the two catalogs know of a table: its kind, its columns, and their types in raw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import psycopg
from psycopg import sql

from exporter.config import Definition, SourceTable
from exporter.errors import SourceError, nearest
from exporter.source import types as raw_types
from exporter.source.table import Column, Heap, Table
from exporter.wire import Connection

_RELATION = """
with recursive rel as materialized (
    select c.* from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = %s and c.relname = %s and c.relkind in ('r', 'p', 'v', 'm', 'f')
),
part (oid, above) as (
    select oid, false from rel
    union
    select i.inhrelid, true from part p join pg_inherits i on i.inhparent = p.oid
    where (select relhassubclass from rel)
)
select c.oid, c.relkind::text, c.reltuples,
    current_setting('server_version_num')::int >= 140000,
    pg_size_bytes(current_setting('shared_buffers')) / current_setting('block_size')::int,
    coalesce((
        select json_agg(json_build_array(h.oid::bigint, n.nspname, h.relname,
            case when h.relkind in ('r', 'm')
                then pg_relation_size(h.oid) / current_setting('block_size')::int else 0 end,
            coalesce(pg_relation_filenode(h.oid)::text, ''), h.relkind,
            h.oid = c.oid or has_table_privilege(h.oid, 'select')
                and has_schema_privilege(n.oid, 'usage')) order by h.oid)
        from part p join pg_class h on h.oid = p.oid join pg_namespace n on n.oid = h.relnamespace
        where h.relkind not in ('p', 'v')
    ), '[]'),
    array(
        select a.attname::text from pg_index i
        cross join lateral unnest(i.indkey::int2[]) with ordinality k (attnum, place)
        join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
        where i.indrelid = c.oid and i.indisprimary and k.place <= i.indnkeyatts order by k.place),
    coalesce((
        select json_agg(k.names) from (
            select array_agg(a.attname) as names
            from pg_index i
            join pg_attribute a on a.attrelid = i.indrelid
                and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])
            where i.indrelid = c.oid and i.indisunique and i.indisvalid and i.indimmediate
                and i.indpred is null and i.indexprs is null
            group by i.indexrelid
        ) k), '[]'),
    array(select oid::bigint from part where above order by oid),
    array(
        select a.attname::text from pg_index i join pg_class x on x.oid = i.indexrelid
        join pg_am m on m.oid = x.relam and m.amname = 'btree'
        join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
        where i.indrelid = c.oid and i.indisvalid and i.indpred is null),
    case when c.relkind = 'f' or exists (
            select from pg_inherits i join pg_class l on l.oid = i.inhrelid
            where i.inhparent = c.oid and l.relkind = 'f') then 'a foreign table'
        when exists (select from pg_subscription_rel where srrelid = c.oid)
        then 'filled by logical replication' else '' end,
    row_security_active(c.oid),
    case when has_table_privilege(c.oid, 'select') then '{}' else array(
        select a.attname::text from pg_attribute a
        where a.attrelid = c.oid and not a.attisdropped
            and not has_column_privilege(c.oid, a.attnum, 'select')
        order by a.attnum) end
from rel c
"""
# Every type is taken apart to what it is made of: domain to base, array to element.
_COLUMNS = """
with recursive
col as (
    select attnum, attname, attnotnull, atttypid, atttypmod
    from pg_attribute where attrelid = %(oid)s and attnum > 0 and not attisdropped
    union all
    select ordinality::int2, name::name, false, typid, typmod
    from unnest(%(names)s::text[], %(types)s::oid[], %(typmods)s::int[])
        with ordinality as e (name, typid, typmod, ordinality)
),
part (attnum, typid, typmod, is_array, depth) as (
    select attnum, atttypid, atttypmod, false, 0 from col
    union all
    select p.attnum,
        case when t.typtype = 'd' then t.typbasetype else t.typelem end,
        case when t.typtype = 'd' and t.typtypmod >= 0 then t.typtypmod else p.typmod end,
        p.is_array or t.typtype <> 'd', p.depth + 1
    from part p join pg_type t on t.oid = p.typid
    where t.typtype = 'd' or (not p.is_array and t.typcategory = 'A' and exists (
        select from pg_type e where e.oid = t.typelem and e.typarray = t.oid))  -- no oidvector
),
last as (select distinct on (attnum) * from part order by attnum, depth desc)
select c.attname, format_type(c.atttypid, c.atttypmod), c.attnotnull, c.atttypmod,
    c.atttypid::bigint,
    format_type(l.typid, l.typmod) || case when l.is_array then '[]' else '' end,
    l.is_array, t.oid::bigint, t.typname, t.typtype::text, t.typcategory = 'A', l.typmod,
    case when t.oid::bigint >= %(unstable)s then (
        select e.extname from pg_depend d join pg_extension e on e.oid = d.refobjid
        where d.classid = 'pg_type'::regclass and d.objid = t.oid and d.deptype = 'e'
            and d.refclassid = 'pg_extension'::regclass) end
from col c join last l on l.attnum = c.attnum join pg_type t on t.oid = l.typid
order by c.attnum
"""


def find_table(
    source: Connection, declared: SourceTable, destination: Connection | None = None
) -> Table:
    """Read the source table's catalog entry. Raises SourceError where it is not there.

    The session then looks where the table's rows need it to.
    """
    source.look_in("")  # the table before may have needed more
    found = source.execute(_RELATION, (declared.schema, declared.table)).fetchone()
    if found is None:
        raise _missing_table(source, declared)
    oid, kind, rows, ranges, buffers, found_heaps, primary_key, *more = found
    keys, partitions, indexed, elsewhere, hides_rows, unreadable = more
    heaps = tuple(Heap(*heap) for heap in found_heaps)
    has_xmin = kind != "v" and "xmin" not in unreadable
    has_xmin = has_xmin and all(heap.kind in ("r", "m") for heap in heaps)
    table = Table(
        declared=declared,
        oid=oid,
        kind=kind,
        columns=_columns(source, destination, oid),
        computed=_computed(source, destination, declared),
        rows=rows,
        has_xmin=has_xmin,
        buffers=buffers,
        in_blocks=has_xmin
        and ranges
        and bool(heaps)
        and "ctid" not in unreadable
        and all(heap.readable for heap in heaps),
        # An index of a table does not cover the tables that inherit from it.
        unique_keys=() if kind == "r" and partitions else tuple(map(frozenset, keys)),
        primary_key=tuple(primary_key),
        heaps=heaps,
        partitions=tuple(partitions),
        indexed=frozenset(indexed),
        elsewhere=elsewhere,
        hides_rows=hides_rows,
        unreadable=tuple(unreadable),
    )
    require(table, "source.columns", declared.columns or ())
    require(table, "source.exclude", declared.exclude)
    look_further(source, table)
    return table


def look_further(source: Connection, table: Table) -> None:
    """Widen a session's search path by what the rows of a table need, which for most is nothing.

    Sessions look in pg_catalog alone: what somebody has put into `public` must not run in the place
    of PostgreSQL's own. But a definition's expressions, and the functions behind a view, were
    written for the role's own path. And the operators of an extension's type are in its schema: in
    pg_catalog, those of text would be taken for citext's, and compare in another order than the
    rows come in.
    """
    order = [column for column in table.columns if column.name in table.declared.order]
    paths = [_schemas_of(source, [column.base for column in order])]
    if table.declared.expressions or table.kind == "v":
        paths.append(source.role_path.strip())
    source.look_in(", ".join(path for path in paths if path))


def _schemas_of(connection: Connection, types: Iterable[str]) -> str:
    """Return the schemas of base types that are not PostgreSQL's own, as a search path."""
    asked = [one for one in types if "." in one]
    if not asked:
        return ""
    row = connection.execute(
        "select string_agg(distinct quote_ident(n.nspname), ', ') from unnest(%s::text[]) w"
        " join pg_type t on t.oid = to_regtype(w) join pg_namespace n on n.oid = t.typnamespace"
        " where t.typtype = 'b'",
        (asked,),
    ).fetchone()
    return row[0] or "" if row else ""


def columns_of(source: Connection, oid: int) -> tuple[Column, ...]:
    """Return a table's columns. ``raw_type`` is what a destination gives them that knows it."""
    return _columns(source, None, oid)


def typed_columns(session: Connection, where: str, types: Mapping[str, str]) -> tuple[Column, ...]:
    """Return columns of these types, as the session's server has them. Raises SourceError."""
    if not types:
        return ()
    found: dict[str, tuple[int, int]] = {}
    session.look_in(session.role_path)  # a type may be an extension's
    for kind in dict.fromkeys(types.values()):
        try:
            with session.transaction():
                result = session.execute(sql.SQL("select null::{}").format(sql.SQL(kind))).pgresult
        except psycopg.ProgrammingError as error:
            names = ", ".join(name for name, one in types.items() if one == kind)
            raise SourceError(
                f"{where}: data_type of {names}: {error.diag.message_primary}",
                hint="it is a type of the destination's server",
            ) from None
        assert result is not None
        found[kind] = result.ftype(0), result.fmod(0)
    session.look_in("")
    oids, typmods = zip(*(found[kind] for kind in types.values()), strict=True)
    return _columns(session, session, 0, [*types], oids, typmods)


def refuse_hidden(table: Table) -> None:
    """Raise SourceError where rows, or columns that land, are hidden from this role."""
    declared = table.declared
    read = [column.name for column in table.columns if column.name in declared.order]
    read += [column.name for column in table.landed if column.expression is None]
    hidden = [name for name in dict.fromkeys(read) if name in table.unreadable]
    if hidden:
        columns = ", ".join(sql.Identifier(name).as_string(None) for name in hidden)
        raise SourceError(
            f"{declared.where}: {declared.variable}'s role may not read {columns} of"
            f" {declared.schema}.{declared.table}",
            hint=f"grant select ({columns}) on {declared.name.as_string(None)} to it; or leave them"
            " out: exporter.source.exclude",
        )
    if table.hides_rows:
        raise SourceError(
            f"{declared.where}: row security hides rows of {declared.schema}.{declared.table} from"
            f" {declared.variable}'s role: they would be missing in raw, or be removed there",
            hint="ALTER ROLE … BYPASSRLS, for that role",
        )


def keyed(definition: Definition, table: Table) -> Definition:
    """Return the definition with the key that it leaves to the source. Raises SourceError."""
    target, declared = definition.destination, table.declared
    if target.mode == "append" or target.conflict_columns:
        return definition
    if not table.primary_key:
        raise SourceError(
            f"{declared.where}: {declared.schema}.{declared.table} has no primary key",
            hint="exporter.conflict_columns: [columns that are unique], or exporter.mode: append"
            " for a log",
        )
    keys = table.primary_key
    left_out = [name for name in keys if not declared.lands(name)]
    if left_out:
        raise SourceError(
            f"{declared.where}: exporter.source leaves out {', '.join(left_out)}, a column of the"
            f" primary key of {declared.schema}.{declared.table}",
            hint="exporter.conflict_columns: [columns that are unique]",
        )
    distribution = target.distribution_column or keys[0]
    return definition._replace(
        destination=target._replace(conflict_columns=keys, distribution_column=distribution)
    )


def require(table: Table, key: str, names: Iterable[str]) -> None:
    """Raise SourceError for a name that is no column of the table, nor computed for it."""
    known = [column.name for column in (*table.columns, *table.computed)]
    for name in names:
        if name not in known:
            raise missing_column(table.declared, key, name, known)


def missing_column(declared: SourceTable, key: str, name: str, known: Sequence[str]) -> SourceError:
    """Return the error for a column that the source does not have."""
    table = f"{declared.schema}.{declared.table}"
    return SourceError(
        f"{declared.where}: exporter.{key} names {name}, which {table} does not have",
        hint=nearest(name, known),
    )


def _computed(
    source: Connection, destination: Connection | None, declared: SourceTable
) -> tuple[Column, ...]:
    """Describe what the definition's expressions give. Raises SourceError for a wrong one."""
    if not declared.expressions:
        return ()
    types, typmods = [], []
    source.look_in(source.role_path)
    for name, expression in declared.expressions.items():
        query = sql.SQL("select ({}) from {} limit 0").format(sql.SQL(expression), declared.name)
        try:
            with source.transaction():
                result = source.execute(query).pgresult
        except psycopg.ProgrammingError as error:
            raise SourceError(
                f"{declared.where}: exporter.source.columns: the expression of {name}:"
                f" {error.diag.message_primary}",
                hint="it is SQL that the source computes for each row",
            ) from None
        assert result is not None
        types.append(result.ftype(0))
        typmods.append(result.fmod(0))
    return tuple(
        column._replace(expression=declared.expressions[column.name])
        for column in _columns(source, destination, 0, [*declared.expressions], types, typmods)
    )


def _columns(
    source: Connection,
    destination: Connection | None,
    oid: int,
    names: Sequence[str] = (),
    types: Sequence[int] = (),
    typmods: Sequence[int] = (),
) -> tuple[Column, ...]:
    """Describe the columns of a table, and expressions whose names and types are given."""
    asked = {"oid": oid, "names": [*names], "types": [*types], "typmods": [*typmods]}
    rows = source.execute(_COLUMNS, asked | {"unstable": raw_types.FIRST_UNSTABLE_OID}).fetchall()
    kinds = [raw_types.Kind(*row[5:]) for row in rows]
    ours = source.info.server_version
    theirs = destination.info.server_version if destination else ours
    known = raw_types.known(destination, kinds, ours)
    columns = []
    for (name, declared, not_null, typmod, type_id, *_), kind in zip(rows, kinds, strict=True):
        raw, binary = raw_types.decide(kind, known.get(kind), ours, theirs)
        streamed = type_id if binary and raw_types.is_streamed(kind, type_id, raw) else 0
        columns.append(Column(name, declared, kind.base, raw, not_null, binary, typmod, streamed))
    return tuple(columns)


def _missing_table(source: Connection, declared: SourceTable) -> SourceError:
    known = source.execute(
        "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname = %s and c.relkind in ('r', 'p', 'v', 'm', 'f')",
        (declared.schema,),
    )
    wanted = f'{declared.schema}."{declared.table}"'
    return SourceError(
        f"{declared.where}: the source database has no table {wanted}",
        hint=nearest(declared.table, [name for (name,) in known]),
    )
