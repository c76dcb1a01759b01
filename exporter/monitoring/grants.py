"""The rights that a load needs: which of them are missing, and the least that would do."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.config import Definition
from exporter.source.catalog import quoted
from exporter.state.position import SCHEMA
from exporter.wire.connection import Connection

_ON_TABLE = (
    "select c.oid, pg_has_role(c.relowner, 'usage'),"
    " array(select p from unnest(%s::text[]) p where not has_table_privilege(c.oid, p))"
    " from pg_class c join pg_namespace n on n.oid = c.relnamespace"
    " where n.nspname = %s and c.relname = %s"
)
_ON_SCHEMA = (
    "select has_schema_privilege(oid, 'usage'), has_schema_privilege(oid, 'create')"
    " from pg_namespace where nspname = %s"
)
_STATE = ("_exporter_state", "_exporter_runs")


def least_on_source(source: Connection, definitions: list[Definition]) -> list[str]:
    """Return what the source's role needs and no more, for its administrator to run."""
    database, role = _where(source)
    schemas = dict.fromkeys(one.source.schema for one in definitions)
    return [
        f"GRANT CONNECT ON DATABASE {database} TO {role};",
        f"GRANT pg_read_all_stats TO {role};",
        *(f"GRANT USAGE ON SCHEMA {quoted(source, one)} TO {role};" for one in schemas),
        *(f"GRANT SELECT ON {_source_name(source, one)} TO {role};" for one in definitions),
    ]


def least_on_destination(destination: Connection, definitions: list[Definition]) -> list[str]:
    """Return what the destination's role needs and no more: the schemas are its own."""
    database, role = _where(destination)
    return [
        f"GRANT CONNECT, TEMPORARY ON DATABASE {database} TO {role};",
        *(
            f"CREATE SCHEMA IF NOT EXISTS {quoted(destination, one)} AUTHORIZATION {role};"
            for one in _schemas(definitions)
        ),
    ]


def missing_on_source(source: Connection, definition: Definition) -> Iterator[str]:
    """Yield the statements that would let this role read the definition's table."""
    _, role = _where(source)
    schema = source.execute(_ON_SCHEMA, (definition.source.schema,)).fetchone()
    if schema and not schema[0]:
        yield f"GRANT USAGE ON SCHEMA {quoted(source, definition.source.schema)} TO {role};"
    name = (definition.source.schema, definition.source.table)
    table = source.execute(_ON_TABLE, (["SELECT"], *name)).fetchone()
    if table and table[2]:
        yield f"GRANT SELECT ON {_source_name(source, definition)} TO {role};"


def missing_on_destination(destination: Connection, definitions: list[Definition]) -> Iterator[str]:
    """Yield the statements that would let this role write raw, and the tables beside it."""
    database, role = _where(destination)
    row = destination.execute(
        "select has_database_privilege(current_database(), 'temporary'),"
        " has_database_privilege(current_database(), 'create')"
    ).fetchone()
    assert row is not None
    if not row[0]:
        yield f"GRANT TEMPORARY ON DATABASE {database} TO {role};"
    tables = [(SCHEMA, name, ["SELECT", "INSERT", "UPDATE"]) for name in _STATE]
    tables += [
        (one.destination.schema, one.destination.table, ["SELECT", "INSERT", "UPDATE", "DELETE"])
        for one in definitions
    ]
    for schema in _schemas(definitions):
        rights = destination.execute(_ON_SCHEMA, (schema,)).fetchone()
        name = quoted(destination, schema)
        if rights is None:
            if not row[1]:
                yield f"CREATE SCHEMA {name} AUTHORIZATION {role};"
            continue
        found = {
            table: destination.execute(_ON_TABLE, (wanted, schema, table)).fetchone()
            for where, table, wanted in tables
            if where == schema
        }
        wanted = ["USAGE"] if not rights[0] else []
        if not rights[1] and not all(found.values()):
            wanted.append("CREATE")
        if wanted:
            yield f"GRANT {', '.join(wanted)} ON SCHEMA {name} TO {role};"
        for table, one in found.items():
            if one and one[2]:
                yield (
                    f"GRANT {', '.join(one[2])} ON {quoted(destination, schema, table)} TO {role};"
                )


def owns(destination: Connection, definition: Definition) -> bool:
    """Tell whether this role may change the columns of the raw table; true where there is none."""
    row = destination.execute(
        _ON_TABLE, ([], definition.destination.schema, definition.destination.table)
    ).fetchone()
    return row is None or bool(row[1])


def _schemas(definitions: list[Definition]) -> list[str]:
    return list(dict.fromkeys([SCHEMA, *(one.destination.schema for one in definitions)]))


def _source_name(source: Connection, definition: Definition) -> str:
    return quoted(source, definition.source.schema, definition.source.table)


def _where(session: Connection) -> tuple[str, str]:
    row = session.execute(
        "select quote_ident(current_database()), quote_ident(current_user)"
    ).fetchone()
    assert row is not None
    return row[0], row[1]
