"""A destination on Citus: distributed raw tables, which only some statements can reach."""

from __future__ import annotations

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


def distribute(destination: Connection, target: Destination) -> None:
    """Spread an empty raw table over the nodes."""
    destination.execute(
        "select create_distributed_table(%s, %s)",
        (target.name.as_string(destination), target.distribution_column),
    )
