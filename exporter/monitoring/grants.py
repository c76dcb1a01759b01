"""The rights that a load needs: those that are missing, and the least that are enough."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.config import Definition
from exporter.source.lookup import quoted
from exporter.state import SCHEMA
from exporter.wire import Connection

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
    """Return the statements that give the source's role what it needs, and no more."""
    database, role = database_and_role(source)
    schemas = dict.fromkeys(definition.source.schema for definition in definitions)
    return [
        f"GRANT CONNECT ON DATABASE {database} TO {role};",
        f"GRANT pg_read_all_stats TO {role};",
        *(f"GRANT USAGE ON SCHEMA {quoted(source, schema)} TO {role};" for schema in schemas),
        *(f"GRANT SELECT ON {_source_name(source, it)} TO {role};" for it in definitions),
        *(
            [
                f"ALTER ROLE {role} REPLICATION;"
                " -- the first load prints the publication for the owner of the tables to make"
            ]
            if any(it.source.read == "changes" for it in definitions)
            else []
        ),
    ]


def least_on_destination(destination: Connection, definitions: list[Definition]) -> list[str]:
    """Return the same for the destination's role, which owns the schemas that it lands in."""
    database, role = database_and_role(destination)
    return [
        f"GRANT CONNECT, TEMPORARY ON DATABASE {database} TO {role};",
        *(
            f"CREATE SCHEMA IF NOT EXISTS {quoted(destination, schema)} AUTHORIZATION {role};"
            for schema in _schemas(definitions)
        ),
    ]


def missing_on_source(source: Connection, definition: Definition) -> Iterator[str]:
    """Yield the statements that would let this role read the definition's table."""
    _, role = database_and_role(source)
    schema = source.execute(_ON_SCHEMA, (definition.source.schema,)).fetchone()
    if schema and not schema[0]:
        yield f"GRANT USAGE ON SCHEMA {quoted(source, definition.source.schema)} TO {role};"
    name = (definition.source.schema, definition.source.table)
    table = source.execute(_ON_TABLE, (["SELECT"], *name)).fetchone()
    if not table or not table[2]:
        return
    # A right to some columns: what is missing of the others is found with them.
    some = source.execute("select has_any_column_privilege(%s::oid, 'select')", table[:1])
    if some.fetchone() != (True,):
        yield f"GRANT SELECT ON {_source_name(source, definition)} TO {role};"


def missing_for_publication(
    source: Connection, name: str | None, definitions: list[Definition]
) -> list[str]:
    """Return what lets this role add these tables to the publication, or make it with them."""
    row = source.execute(
        "select coalesce((select pg_has_role(pubowner, 'usage') from pg_publication"
        " where pubname = %s), has_database_privilege(current_database(), 'create'))",
        (name,),
    ).fetchone()
    wanted = (
        ["have the right to create in the database"] if row == (False,) and name is None else []
    )
    wanted += [f"own the publication {name}"] if row == (False,) and name else []
    for one in definitions:
        table = source.execute(_ON_TABLE, ([], one.source.schema, one.source.table)).fetchone()
        if table and not table[1]:
            wanted.append(f"own {_source_name(source, one)}")
    return wanted


def missing_on_destination(destination: Connection, definitions: list[Definition]) -> Iterator[str]:
    """Yield the statements that would let this role write the raw tables and the state's."""
    database, role = database_and_role(destination)
    row = destination.execute(
        "select has_database_privilege(current_database(), 'temporary'),"
        " has_database_privilege(current_database(), 'create')"
    ).fetchone()
    assert row is not None
    if not row[0]:
        yield f"GRANT TEMPORARY ON DATABASE {database} TO {role};"
    raw = (definition.destination for definition in definitions)
    tables = [(SCHEMA, name, ["SELECT", "INSERT", "UPDATE"]) for name in _STATE]
    tables += [(it.schema, it.table, ["SELECT", "INSERT", "UPDATE", "DELETE"]) for it in raw]
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
        for table, state in found.items():
            if state and state[2]:
                lacking, on = ", ".join(state[2]), quoted(destination, schema, table)
                yield f"GRANT {lacking} ON {on} TO {role};"


def owns(destination: Connection, definition: Definition) -> bool:
    """Whether this role may change the columns of the raw table; true where there is none."""
    row = destination.execute(
        _ON_TABLE, ([], definition.destination.schema, definition.destination.table)
    ).fetchone()
    return row is None or bool(row[1])


def _schemas(definitions: list[Definition]) -> list[str]:
    return list(dict.fromkeys([SCHEMA, *(it.destination.schema for it in definitions)]))


def _source_name(source: Connection, definition: Definition) -> str:
    return quoted(source, definition.source.schema, definition.source.table)


def database_and_role(session: Connection) -> tuple[str, str]:
    """Return the names of the session's database and role, quoted where they need it."""
    row = session.execute(
        "select quote_ident(current_database()), quote_ident(current_user)"
    ).fetchone()
    assert row is not None
    return row[0], row[1]
