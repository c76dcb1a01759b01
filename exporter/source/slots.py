"""The replication slot at the source: made, found, waited for, ended."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter.errors import SourceError
from exporter.source import standby
from exporter.wire import Connection, first_line
from exporter.wire.replication import lsn_number, lsn_text

PREFIX = "exporter_"
_WAIT = 60.0  # seconds for transactions that were running to end
_TELL = 3.0  # seconds after which a person is told whom we wait for
PLUGIN = "pgoutput"
_DISK = 10.0  # seconds that the WAL may take to get there
_NUDGE = 0.1  # seconds after which we see to it
_FLUSH = (
    "begin; set local synchronous_commit = on;"
    " select pg_logical_emit_message(true, 'dbt-exporter', ''); commit"
)
_PAGE, _HEADERS = 8192, (24, 40)  # bytes of the WAL's pages, and of what each begins with
_RIGHT = "alter role {} replication"  # the same on Cloud SQL and Azure


# The primary tells a standby now and then which transactions run: without that, no slot is made.
_TELLING = "on the primary: select pg_log_standby_snapshot(), and let long transactions end"

_LOST = {
    "rows_removed": "the primary has removed rows that it needs (hot_standby_feedback is off)",
    "wal_level_insufficient": "the primary has no wal_level = logical any more",
    "wal_removed": "the source has removed WAL that it held back (max_slot_wal_keep_size)",
    "idle_timeout": "nobody has read it for so long (idle_replication_slot_timeout)",
}


class Found(NamedTuple):
    """A slot as the source has it. ``held`` are the bytes of WAL that it holds back.

    ``lost``: why it cannot be read any more, "" where it can. ``end`` is where the source's WAL is
    now. ``idle``: for how many seconds nobody has read it; None before PostgreSQL 17, and of one
    that is being read. ``synced``: it was made at the primary, whose standby the source is or was.
    """

    name: str
    plugin: str
    database: str | None
    active_pid: int | None
    confirmed: str | None
    lost: str
    held: int | None
    end: str
    idle: float | None
    synced: bool


def new_name(destination: Connection) -> str:
    """Return a name that nobody else has: it says which database is the destination."""
    database = re.sub(r"[^a-z0-9]+", "_", destination.info.dbname.lower())[:40].strip("_")
    return f"{PREFIX}{database}_{secrets.token_hex(4)}"


def refuse_unfit(source: Connection) -> None:
    """Raise SourceError where the server, or the role, cannot have a slot."""
    for _, error in unfit(source):
        raise error


def unfit(source: Connection) -> Iterator[tuple[str, SourceError]]:
    """Yield why the server, or the role, cannot have a slot: what is wrong, and the error."""
    row = source.execute(
        "select current_setting('wal_level'), pg_is_in_recovery(), current_user,"
        " quote_ident(current_user),"
        " (select rolreplication or rolsuper from pg_roles where rolname = current_user)"
        " or coalesce((select pg_has_role(oid, 'usage') from pg_roles"
        " where rolname = 'rds_replication'), false),"
        " exists (select from pg_roles where rolname = 'rds_replication')"
    ).fetchone()
    assert row is not None
    level, replica, role, quoted, may, amazon = row
    if replica and source.info.server_version < 160000:
        yield (
            "standby",
            SourceError(
                f"{source.variable} leads to a standby, and before PostgreSQL 16 changes are read"
                " from the primary alone",
                hint=f"{source.variable}: the primary; or exporter.source.read: scan",
            ),
        )
    if level != "logical":
        yield (
            "wal_level",
            SourceError(
                f"the source has wal_level = {level}, and changes need logical",
                hint="alter system set wal_level = logical, and a restart; on RDS:"
                " rds.logical_replication = 1; on Cloud SQL: cloudsql.logical_decoding = on",
            ),
        )
    if not may:
        grant = f"grant rds_replication to {quoted}" if amazon else _RIGHT.format(quoted)
        yield (
            "replication",
            SourceError(
                f"{source.variable}: the role {role} must not read a replication slot", hint=grant
            ),
        )


def find(source: Connection, name: str | None = None) -> list[Found]:
    """Return the slots of that name, or all of ours."""
    rows = source.execute(
        "select slot_name, plugin, database, active_pid, confirmed_flush_lsn::text,"
        # By name: servers before 17 lack the one column, those before 16 the other.
        " case when coalesce(wal_status <> 'lost', true) and restart_lsn is not null then ''"
        " when (to_jsonb(s)->>'conflicting')::bool and restart_lsn is not null then 'rows_removed'"
        " else coalesce(to_jsonb(s)->>'invalidation_reason', 'wal_removed') end,"
        " pg_wal_lsn_diff(lsn, restart_lsn)::bigint, lsn::text,"
        " extract(epoch from clock_timestamp()"
        " - (to_jsonb(s)->>'inactive_since')::timestamptz)::float8,"
        " coalesce((to_jsonb(s)->>'synced')::bool, false)"
        " from pg_replication_slots s, (select case when pg_is_in_recovery()"
        " then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end) w (lsn)"
        " where slot_name = coalesce(%s, slot_name)"
        " and starts_with(slot_name, %s) order by 1",
        (name, "" if name else PREFIX),
    ).fetchall()
    return [Found(*row)._replace(lost=_LOST.get(row[5], row[5])) for row in rows]


def make(source: Connection, name: str, say: Callable[[str], None]) -> str:
    """Make the slot; return its position. Raises SourceError.

    It waits for every transaction that is writing, whichever table it writes.
    """
    replica = standby.is_standby(source)
    failover = ", failover => true" if source.info.server_version >= 170000 and not replica else ""
    statement = sql.SQL(
        "select lsn::text from pg_create_logical_replication_slot({}, {}{})"
    ).format(sql.Literal(name), sql.Literal(PLUGIN), sql.SQL(failover))
    until = time.monotonic() + _WAIT
    wait = _TELL
    try:
        while True:
            try:
                source.execute(
                    sql.SQL("set statement_timeout = {}").format(
                        sql.Literal(f"{1000 * wait:.0f}ms")
                    )
                )
                row = source.execute(statement).fetchone()
                assert row is not None
                return str(row[0])
            except psycopg.errors.QueryCanceled:
                if time.monotonic() > until:
                    raise _waits(source) from None
                say(f"making the slot waits for {writers(source) or 'transactions'} to end")
                wait = until - time.monotonic() + 1
            finally:
                source.execute("set statement_timeout = 0")
    except psycopg.errors.ConfigurationLimitExceeded as error:
        raise SourceError(
            f"the source has no replication slot left: {first_line(error)}",
            hint="raise max_replication_slots, or drop a slot: select slot_name, active from"
            " pg_replication_slots",
        ) from None
    except psycopg.errors.InsufficientPrivilege as error:
        raise SourceError(
            f"no slot could be made: {first_line(error)}", hint=_RIGHT.format(source.info.user)
        ) from None
    except psycopg.errors.ObjectNotInPrerequisiteState as error:
        raise SourceError(
            f"no slot could be made: {first_line(error)}",
            hint="alter system set wal_level = logical, and a restart; of a standby, on its primary"
            " as well",
        ) from None


def drop_slot(source: Connection, name: str) -> None:
    """End the slot of that name, where there is one. Raises SourceError."""
    found = find(source, name)
    try:
        if found:
            source.execute("select pg_drop_replication_slot(%s)", (name,))
    except psycopg.errors.ObjectInUse:
        raise SourceError(
            f"the slot {name} is being read by process {found[0].active_pid}",
            hint="let that load end",
        ) from None


def drop(source: Connection, name: str) -> None:
    """End the slot and the publication of that name, where they are. Raises SourceError."""
    drop_slot(source, name)
    try:
        source.execute(sql.SQL("drop publication if exists {}").format(sql.Identifier(name)))
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction) as error:
        raise SourceError(
            first_line(error), hint=f'as the owner, on the primary: drop publication "{name}"'
        ) from None


class Limits(NamedTuple):
    """What the source has for slots. ``keep`` are the bytes of WAL that each may hold back."""

    slots: int
    slots_used: int
    senders: int
    senders_used: int
    keep: int | None  # None: no limit


def limits(source: Connection) -> Limits:
    """Return what the source has for slots, and what is taken of it."""
    row = source.execute(
        "select current_setting('max_replication_slots')::int,"
        " (select count(*) from pg_replication_slots), current_setting('max_wal_senders')::int,"
        " (select count(*) from pg_stat_replication),"
        " nullif(pg_size_bytes(current_setting('max_slot_wal_keep_size')), -1)"
    ).fetchone()
    assert row is not None
    return Limits(*row)


def await_writers(source: Connection, say: Callable[[str], None]) -> None:
    """Wait until every transaction that is writing now has ended. Raises SourceError.

    What such a one does may be missing both in a snapshot and in the changes behind the slot's
    position, or of a table that it began to write before the publication had it.
    """
    # The next id to be given. Transactions may be running behind the snapshot's own xmax.
    row = source.execute(
        "select (next::text::bigint + age(next::xid))::text"
        " from pg_snapshot_xmax(pg_current_snapshot()) next"
    ).fetchone()
    assert row is not None
    until, told = time.monotonic() + _WAIT, time.monotonic() + _TELL
    while True:
        ended = source.execute(
            "select pg_snapshot_xmin(pg_current_snapshot()) >= %s::xid8", row
        ).fetchone()
        if ended == (True,):
            return
        if time.monotonic() > until:
            raise _waits(source)
        if told and time.monotonic() > told:
            say(f"the copy waits for {writers(source) or 'transactions'} to end")
            told = 0.0
        time.sleep(0.01)


def _waits(source: Connection) -> SourceError:
    if standby.is_standby(source):
        return SourceError(
            f"the primary did not tell within {_WAIT:.0f} s that what was running there has ended:"
            " before it has, what it writes could be missed",
            hint=_TELLING,
        )
    return SourceError(
        f"{writers(source) or 'a transaction'} did not end within {_WAIT:.0f} s: before it has,"
        " what it writes could be missed",
        hint="let it end, or end it: select pg_terminate_backend(<process>); rollback prepared"
        " '<transaction>'",
    )


def writers(source: Connection) -> str:
    """Return who writes now, for people; "" where nobody does."""
    rows = source.execute(
        "select 'process ' || pid || coalesce(' (' || nullif(application_name, '') || ')', '')"
        " || ', in a transaction since ' || date_trunc('second', xact_start)"
        " from pg_stat_activity where backend_xid is not null and pid <> pg_backend_pid()"
        " union all select 'the prepared transaction ' || gid from pg_prepared_xacts limit 3"
    ).fetchall()
    return "; ".join(text for (text,) in rows)


def end_of_wal(source: Connection) -> int:
    """Return the position that has all that was committed before. Raises SourceError.

    It is on disk there: what is not yet, no slot sends. Of a standby, it is what was replayed.
    """
    if standby.is_standby(source):
        return standby.end_of_wal(source)
    row = source.execute("select pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    end = lsn_number(row[0])
    if end % _PAGE in _HEADERS:  # where the next record goes, behind the header of a new page
        end -= end % _PAGE
    until, nudge = time.monotonic() + _DISK, time.monotonic() + _NUDGE
    while True:  # what is committed without waiting for the disk reaches it within a second
        flushed = source.execute("select pg_current_wal_flush_lsn()::text").fetchone()
        if flushed and lsn_number(flushed[0]) >= end:
            return end
        if time.monotonic() > until:
            raise SourceError(
                "the source does not write its WAL to disk",
                hint="select * from pg_stat_activity where backend_type = 'walwriter'",
            )
        if time.monotonic() > nudge:
            # What a reader tidied up is written by nobody before somebody commits.
            source.execute(_FLUSH)
            nudge = until
        time.sleep(0.005)


def await_standbys(source: Connection, name: str, end: int, say: Callable[[str], None]) -> None:
    """Wait until the standbys that the source waits for have its WAL. Raises SourceError.

    Of a slot that they may take over, it gives out no change before (PostgreSQL 17).
    """
    if away := standbys_behind(source, name):
        raise SourceError(
            f"the source sends no changes before its standbys have them, and none reads"
            f" {', '.join(away)}",
            hint="start the standby, or take it out of synchronized_standby_slots",
        )
    until, told = time.monotonic() + _WAIT, time.monotonic() + _TELL
    while behind := standbys_behind(source, name, end):
        who = ", ".join(behind)
        if time.monotonic() > until:
            raise SourceError(
                f"{who} did not get the source's WAL within {_WAIT:.0f} s, and no change is given"
                " out before (synchronized_standby_slots)",
                hint="start that standby, or take it out of synchronized_standby_slots",
            )
        if told and time.monotonic() > told:
            say(f"waits for the standby of {who} to get the WAL (synchronized_standby_slots)")
            told = 0.0
        time.sleep(0.02)


def standbys_behind(source: Connection, name: str, end: int | None = None) -> list[str]:
    """Return the slots of standbys for which that slot waits: they are not read, or not so far."""
    rows = source.execute(
        "select trim(both '\" ' from w.name) from regexp_split_to_table("
        "coalesce(current_setting('synchronized_standby_slots', true), ''), ',') w (name)"
        " left join pg_replication_slots s on s.slot_name = trim(both '\" ' from w.name)"
        " where trim(w.name) <> '' and (s.active_pid is null or s.restart_lsn < %s::pg_lsn)"
        " and exists (select from pg_replication_slots o where o.slot_name = %s"
        " and to_jsonb(o) ->> 'failover' = 'true') order by 1",
        (None if end is None else lsn_text(end), name),
    ).fetchall()
    return [one for (one,) in rows]


class Identity(NamedTuple):
    """How a table, or a partition, tells its old rows in the WAL."""

    name: str
    kind: str  # pg_class.relreplident
    columns: frozenset[str]
    logged: bool


def identities(source: Connection, oids: Iterable[int]) -> list[Identity]:
    """Return the replica identity of each of these tables."""
    rows = source.execute(
        "select c.oid::regclass::text, c.relreplident::text, array(select a.attname::text"
        " from pg_index i join pg_attribute a on a.attrelid = c.oid"
        " and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])"
        " where i.indrelid = c.oid and case c.relreplident when 'd' then i.indisprimary"
        " when 'i' then i.indisreplident else false end), c.relpersistence = 'p'"
        " from pg_class c where c.oid = any(%s::oid[]) order by 1",
        (list(oids),),
    ).fetchall()
    return [Identity(name, kind, frozenset(names), logged) for name, kind, names, logged in rows]
