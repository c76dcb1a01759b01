"""What the reading session sees, and what other sessions can still commit behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter.config import SourceTable
from exporter.errors import SourceError
from exporter.state import State
from exporter.wire import Connection, first_line

TRUE = sql.SQL("true")
_XID_TRUST = 1_000_000_000  # half of the distance at which age() of a transaction id turns over
# Sessions are asked for before prepared transactions: one that is just becoming prepared is then
# found in one of the two at least.
_OPEN = """
with open as materialized (
    select min(xact_start) as oldest, count(*) filter (
        where usesysid is not null and state is null and not pg_has_role(usesysid, 'usage')
    ) as hidden
    from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid()
        and backend_type not in ('autovacuum worker', 'walsender')
        and application_name is distinct from 'dbt-exporter'
)
select clock_timestamp()::text,
    case when pg_is_in_recovery() then least(clock_timestamp(), pg_last_xact_replay_timestamp())
        else least(oldest, clock_timestamp()) end::text,
    hidden > 0 and not pg_has_role('pg_read_all_stats', 'usage'), pg_is_in_recovery(),
    has_function_privilege('pg_control_system()', 'execute')
        and has_function_privilege('pg_control_checkpoint()', 'execute')
from open
"""
_PREPARED = "select exists (select from pg_prepared_xacts where database = current_database())"
_DATABASE = (
    "select format('%s/%s', oid, datname) from pg_database where datname = current_database()"
)
_IDENTITY = (
    "select format('%s/%s/%s', c.system_identifier, k.timeline_id, d.oid) from"
    " pg_control_system() c, pg_control_checkpoint() k, pg_database d"
    " where d.datname = current_database()"
)


class Horizon(NamedTuple):
    """What the source's other sessions can still commit behind. Times are ISO text, UTC."""

    clock: str
    oldest_open: str  # '-infinity' where it cannot be told
    blind: bool  # sessions of other roles are hidden from us
    standby: bool
    identity: str  # system, timeline and database: transaction ids mean something within one


class Snapshot(NamedTuple):
    """What the reading transaction sees.

    ``xmin`` is its oldest running transaction. ``since``, where it is known, is that of the
    snapshot before: rows of an older transaction were in that one already.
    """

    xmin: str
    since: str | None


def observe(source: Connection, stored: State) -> Horizon:
    """Look at what is open on the source. Must run before the snapshot is taken."""
    row = source.execute(_OPEN).fetchone()
    assert row is not None
    clock, oldest, blind, standby, controls = row
    rest = source.execute(f"{_PREPARED}, ({_IDENTITY if controls else _DATABASE})").fetchone()
    assert rest is not None
    prepared, identity = rest
    if prepared:
        # When a prepared transaction began is not recorded. It was open, or had not begun, when
        # we last looked, so it began at or after that horizon.
        oldest = stored.horizon or "-infinity"
    return Horizon(clock, oldest, blind, standby, identity or "")


@contextlib.contextmanager
def reading(source: Connection, declared: SourceTable) -> Iterator[None]:
    """Open the transaction that reads: one snapshot, of a table that nobody rewrites meanwhile.

    Raises SourceError.
    """
    table = declared.name
    begin = sql.SQL("begin isolation level repeatable read read only")
    try:
        # Locked before the snapshot is taken: a table that is rewritten between the two looks
        # empty to the snapshot, and the watermark would pass its rows.
        source.execute(begin + sql.SQL("; lock table {} in access share mode").format(table))
    except (psycopg.errors.UndefinedTable, psycopg.errors.WrongObjectType):
        source.execute(sql.SQL("rollback; ") + begin)
    except psycopg.errors.InsufficientPrivilege as error:
        raise SourceError(
            f"{declared.where}: {first_line(error)}",
            hint=f"grant select on {table.as_string(source)} to DATABASE_URL_CORE's role",
        ) from None
    yield
    source.execute("commit")


def take_snapshot(source: Connection, stored: State, horizon: Horizon) -> Snapshot:
    """Return what the running REPEATABLE READ transaction sees."""
    row = source.execute(
        "select pg_snapshot_xmin(pg_current_snapshot())::text,"
        " pg_snapshot_xmax(pg_current_snapshot())::text"
    ).fetchone()
    assert row is not None
    before = int(stored.snapshot_xmin) if stored.snapshot_xmin else None
    usable = (
        before is not None
        and stored.source == horizon.identity
        and 0 <= int(row[1]) - before < _XID_TRUST
    )
    return Snapshot(row[0], str(before % 2**32) if before is not None and usable else None)


def changed_since(xid: str) -> sql.Composable:
    """Return the condition for rows written by that transaction id or a later one."""
    return sql.SQL("age(xmin) <= age({}::xid)").format(sql.Literal(xid))
