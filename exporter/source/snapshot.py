"""What the reading session sees, and what other sessions can still commit behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter.config import SourceTable
from exporter.errors import SourceError
from exporter.source.table import Table
from exporter.state import Source, State
from exporter.wire import Connection, first_line, own_sessions

TRUE = sql.SQL("true")
_XID_TRUST = 1_000_000_000  # half of the distance at which age() of a transaction id turns over
# Our own sessions on the source write nothing there. Those of other processes and machines are not
# known for ours, and hold the horizon back like anybody's: rows come later, and none is lost.
# Sessions are asked for before prepared transactions: one that is just becoming prepared is then
# found in one of the two at least.
_OPEN = """
with open as materialized (
    select min(xact_start) as oldest, count(*) filter (
        where usesysid is not null and state is null and not pg_has_role(usesysid, 'usage')
    ) as hidden
    from pg_stat_activity a
    where datname = current_database() and pid <> pg_backend_pid()
        and backend_type not in ('autovacuum worker', 'walsender')
        and not exists (
            select from unnest(%s::int[], %s::timestamptz[]) ours (pid, began)
            where ours.pid = a.pid and ours.began = a.backend_start)
)
select clock_timestamp()::text,
    case when pg_is_in_recovery() then least(clock_timestamp(), pg_last_xact_replay_timestamp())
        else least(oldest, clock_timestamp()) end::text,
    hidden > 0 and not pg_has_role('pg_read_all_stats', 'usage'), pg_is_in_recovery(),
    has_function_privilege('pg_control_system()', 'execute')
        and has_function_privilege('pg_control_checkpoint()', 'execute')
from open
"""
# The timeline is asked of the WAL: pg_control_checkpoint() has the old one until the first
# checkpoint after a promotion. What the role may not ask is null.
_IDENTITY = """
select exists (select from pg_prepared_xacts where database = current_database()),
    {cluster}, (select oid::bigint from pg_database where datname = current_database()),
    current_database(),
    case when pg_is_in_recovery() then {recovery} else
        ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int end,
    (case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end
        - '0/0'::pg_lsn)::bigint
"""
_ASKED = {
    True: _IDENTITY.format(
        cluster="(select system_identifier::text from pg_control_system())",
        recovery="(select timeline_id from pg_control_checkpoint())",
    ),
    False: _IDENTITY.format(cluster="null", recovery="null"),
}
_BEGIN = sql.SQL("begin isolation level repeatable read read only")
# What a query reads of the catalog is as the snapshot has it; what these functions look up is as
# it is now. The file of a system catalog is not in the catalog.
_REPLACED = """
with recursive seen (oid, file) as (
    select c.oid, c.relfilenode from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where to_regclass(%s) = c.oid and n.nspname = %s and c.relname = %s
    union all
    select c.oid, c.relfilenode
    from seen s join pg_inherits i on i.inhparent = s.oid join pg_class c on c.oid = i.inhrelid
)
select coalesce(bool_or(file <> 0 and file is distinct from pg_relation_filenode(oid)), true)
from seen
"""


class Server(NamedTuple):
    """Which server and database it is; None for what the role may not ask."""

    cluster: str | None
    database: str  # its oid and its name
    timeline: int | None
    lsn: int | None

    @property
    def identity(self) -> str:
        """Within what transaction ids mean something: cluster, timeline and database."""
        return "/".join(str(one) for one in (self.cluster, self.timeline, self.database) if one)


class Horizon(NamedTuple):
    """What the source's other sessions can still commit behind. Times are ISO text, UTC."""

    clock: str
    oldest_open: str  # '-infinity' where it cannot be told
    blind: bool  # sessions of other roles are hidden from us
    standby: bool
    server: Server


class Snapshot(NamedTuple):
    """What the reading transaction sees.

    ``xmin`` is its oldest running transaction, ``xmax`` the next one to begin. ``since``, where it
    is known, is the ``xmin`` of the snapshot before: rows of an older transaction were in that one.
    """

    xmin: str
    xmax: str
    since: str | None

    def newer(self, xid: str | None) -> sql.Composable:
        """Return the condition for rows of this transaction id or a later one.

        Of an id that is too far behind to be compared with, or of none, it is true.
        """
        return changed_since(xid) if xid and _is_near(xid, self.xmax) else TRUE


def observe(source: Connection, stored: State) -> Horizon:
    """Look at what is open on the source. Must run before the snapshot is taken."""
    row = source.execute(_OPEN, own_sessions(source)).fetchone()
    assert row is not None
    clock, oldest, blind, standby, controls = row
    rest = source.execute(_ASKED[controls]).fetchone()
    assert rest is not None
    prepared, cluster, oid, name, timeline, lsn = rest
    if prepared:
        # When a prepared transaction began is not recorded. It was open, or had not begun, when
        # we last looked, so it began at or after that horizon.
        oldest = stored.horizon or "-infinity"
    server = Server(cluster, f"{oid}/{name}", timeline, lsn)
    return Horizon(clock, oldest, blind, standby, server)


@contextlib.contextmanager
def reading(source: Connection, declared: SourceTable) -> Iterator[None]:
    """Open the transaction that reads: one snapshot, of a table that nobody rewrites meanwhile.

    Raises SourceError.
    """
    table = declared.name
    try:
        # Locked before the snapshot is taken: a table that is rewritten between the two looks
        # empty to the snapshot, and the watermark would pass its rows.
        source.execute(_BEGIN + sql.SQL("; lock table {} in access share mode").format(table))
    except (psycopg.errors.UndefinedTable, psycopg.errors.WrongObjectType):
        source.execute(sql.SQL("rollback; ") + _BEGIN)
    except psycopg.errors.InsufficientPrivilege:
        _lock_by_reading(source, declared)
    yield
    source.execute("commit")


def _lock_by_reading(source: Connection, declared: SourceTable) -> None:
    """Lock the table for a role that may read some of its columns: LOCK wants a right to them all.

    A query takes the same lock, and the snapshot before it. So it is looked whether the table was
    rewritten or replaced between the two: then there is another try. Raises SourceError.
    """
    name = declared.name.as_string(source)
    query = _BEGIN + sql.SQL("; select from {} limit 0").format(declared.name)
    while True:
        try:
            source.execute(sql.SQL("rollback; ") + query)
        except psycopg.errors.InsufficientPrivilege as error:
            raise SourceError(
                f"{declared.where}: {first_line(error)}",
                hint=f"grant select on {name} to {declared.variable}'s role",
            ) from None
        if not is_replaced(source, declared):
            return


def is_replaced(source: Connection, declared: SourceTable) -> bool:
    """Whether the table was rewritten or replaced after the running transaction's snapshot."""
    name = declared.name.as_string(source)
    row = source.execute(_REPLACED, (name, declared.schema, declared.table)).fetchone()
    return not row or bool(row[0])


def join_snapshot(source: Connection, declared: SourceTable, snapshot: str | None) -> bool:
    """Open a transaction that sees an exported snapshot; false where that shows nothing any more.

    Raises psycopg.Error where the snapshot is gone.
    """
    shared = sql.SQL("set transaction snapshot {}").format(sql.Literal(snapshot))
    try:
        # Locked first: if the other session is still there afterwards, its own lock has been held
        # until this one was, and nobody has written the table anew, which would look empty.
        lock = sql.SQL("; lock table {} in access share mode").format(declared.name)
        source.execute(_BEGIN + lock)
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.WrongObjectType):
        query = sql.SQL("rollback; {}; {}; select from {} limit 0")
        source.execute(query.format(_BEGIN, shared, declared.name))
        return not is_replaced(source, declared)
    source.execute(shared)
    return True


def take_snapshot(source: Connection, stored: State, horizon: Horizon) -> Snapshot:
    """Return what the running REPEATABLE READ transaction sees."""
    row = source.execute(
        "select pg_snapshot_xmin(pg_current_snapshot())::text,"
        " pg_snapshot_xmax(pg_current_snapshot())::text"
    ).fetchone()
    assert row is not None
    xmin, xmax = row
    since, here = stored.snapshot_xmin, stored.source == horizon.server.identity
    return Snapshot(xmin, xmax, since if since and here and _is_near(since, xmax) else None)


def _is_near(xid: str, xmax: str) -> bool:
    """Tell whether a transaction id can be compared with those that rows have today."""
    return 0 <= int(xmax) - int(xid) < _XID_TRUST


def found(horizon: Horizon, snapshot: Snapshot, table: Table) -> Source:
    """Return what a position is bound to at the source."""
    server, declared = horizon.server, table.declared
    return Source(
        cluster=server.cluster,
        database=server.database,
        timeline=server.timeline,
        lsn=server.lsn,
        next_xid=int(snapshot.xmax),
        standby=horizon.standby,
        clock=horizon.clock,
        table=f"{declared.schema}.{declared.table}",
        oid=table.oid,
        partitions=table.partitions,
    )


def changed_since(xid: str) -> sql.Composable:
    """Return the condition for rows written by that transaction, by its full id, or a later one."""
    # A row has the lower half of the id. A subquery is computed once, not for each row.
    low = sql.Literal(str(int(xid) % 2**32))
    return sql.SQL("age(xmin) <= (select age({}::xid))").format(low)
