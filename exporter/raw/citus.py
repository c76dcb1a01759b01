"""A destination on Citus: raw tables in shards, which only some statements can reach."""

from __future__ import annotations

from psycopg import sql

from exporter.config import Destination
from exporter.wire import Connection


def is_here(destination: Connection) -> bool:
    """Whether the database has the extension."""
    row = destination.execute("select from pg_extension where extname = 'citus'").fetchone()
    return row is not None


def has(destination: Connection, target: Destination) -> bool:
    """Whether the raw table, which is there, is one of Citus: distributed or a reference table."""
    row = destination.execute(
        "select from pg_dist_partition where logicalrelid = to_regclass(%s)",
        (target.name.as_string(destination),),
    ).fetchone()
    return row is not None


def distribution(target: Destination) -> sql.Composed:
    """Return the statement that spreads an empty raw table over the nodes."""
    name = target.name.as_string(None)
    return sql.SQL("select create_distributed_table({}, {})").format(
        sql.Literal(name), sql.Literal(target.distribution_column)
    )
