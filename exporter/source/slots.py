"""The replication slot and the publication at the source: made, found, changed, ended."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter.config import SourceTable
from exporter.errors import SourceError
from exporter.wire import Connection, first_line
from exporter.wire.replication import lsn_number

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
_COMMA = sql.SQL(", ")
_RIGHT = (
    "alter role {} replication; on RDS: grant rds_replication to it; on Cloud SQL and Azure: alter"
    " role … with replication"
)


class Found(NamedTuple):
    """A slot as the source has it. ``held`` are the bytes of WAL that it holds back."""

    name: str
    plugin: str
    database: str | None
    active_pid: int | None
    confirmed: str | None
    lost: bool
    held: int | None


def new_name(destination: Connection) -> str:
    """Return a name that nobody else has: it says which database is the destination."""
    database = re.sub(r"[^a-z0-9]+", "_", destination.info.dbname.lower())[:40].strip("_")
    return f"{PREFIX}{database}_{secrets.token_hex(4)}"


def refuse_unfit(source: Connection) -> None:
    """Raise SourceError where the server, or the role, cannot have a slot."""
    row = source.execute(
        "select current_setting('wal_level'), pg_is_in_recovery(), current_user,"
        " (select rolreplication or rolsuper from pg_roles where rolname = current_user)"
        " or coalesce((select pg_has_role(oid, 'usage') from pg_roles"
        " where rolname = 'rds_replication'), false)"
    ).fetchone()
    assert row is not None
    level, standby, role, may = row
    if standby:
        raise SourceError(
            f"{source.variable} leads to a standby, whose snapshots do not tell what runs on its"
            " primary: changes are read from the primary",
            hint=f"{source.variable}: the primary; or exporter.source.read: scan",
        )
    if level != "logical":
        raise SourceError(
            f"the source has wal_level = {level}, and changes need logical",
            hint="alter system set wal_level = logical, and a restart; on RDS:"
            " rds.logical_replication = 1; on Cloud SQL: cloudsql.logical_decoding = on",
        )
    if not may:
        raise SourceError(
            f"{source.variable}: the role {role} must not read a replication slot",
            hint=_RIGHT.format(role),
        )


def find(source: Connection, name: str | None = None) -> list[Found]:
    """Return the slots of that name, or all of ours."""
    rows = source.execute(
        "select slot_name, plugin, database, active_pid, confirmed_flush_lsn::text,"
        " coalesce(wal_status = 'lost', false) or restart_lsn is null,"
        " pg_wal_lsn_diff(case when pg_is_in_recovery() then pg_last_wal_replay_lsn()"
        " else pg_current_wal_lsn() end, restart_lsn)::bigint"
        " from pg_replication_slots where slot_name = coalesce(%s, slot_name)"
        " and starts_with(slot_name, %s) order by 1",
        (name, "" if name else PREFIX),
    ).fetchall()
    return [Found(*row) for row in rows]


def make(source: Connection, name: str, say: Callable[[str], None]) -> str:
    """Make the slot; return its position. Raises SourceError.

    It waits for every transaction that is writing, whichever table it writes.
    """
    failover = ", failover => true" if source.info.server_version >= 170000 else ""
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
                say(f"making the slot waits for {_writers(source) or 'transactions'} to end")
                wait = until - time.monotonic() + 1
            finally:
                source.execute("set statement_timeout = 0")
    except psycopg.errors.ConfigurationLimitExceeded as error:
        raise SourceError(
            f"the source has no replication slot left: {first_line(error)}",
            hint="raise max_replication_slots, or drop a slot: select slot_name, active from"
            " pg_replication_slots",
        ) from None
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ObjectNotInPrerequisiteState) as e:
        raise SourceError(
            f"no slot could be made: {first_line(e)}", hint=_RIGHT.format(source.info.user)
        ) from None


def drop(source: Connection, name: str) -> None:
    """End the slot and the publication of that name, where they are. Raises SourceError."""
    found = find(source, name)
    try:
        if found:
            source.execute("select pg_drop_replication_slot(%s)", (name,))
        source.execute(sql.SQL("drop publication if exists {}").format(sql.Identifier(name)))
    except psycopg.errors.ObjectInUse:
        raise SourceError(
            f"the slot {name} is being read by process {found[0].active_pid}",
            hint="let that load end",
        ) from None
    except psycopg.errors.InsufficientPrivilege as error:
        raise SourceError(
            first_line(error), hint=f'as the owner: drop publication "{name}"'
        ) from None


class Publication(NamedTuple):
    """What a publication sends: of each table of ``present`` whether it is all of its changes."""

    whole: bool  # every kind of change, of partitions by their root
    all_tables: bool
    present: dict[tuple[str, str], bool]


def publication(source: Connection, name: str) -> Publication | None:
    """Return the publication of that name, None where there is none."""
    row = source.execute(
        "select oid, puballtables,"
        " pubviaroot and pubinsert and pubupdate and pubdelete and pubtruncate"
        " from pg_publication where pubname = %s",
        (name,),
    ).fetchone()
    if row is None:
        return None
    oid, all_tables, whole = row
    filtered = "false"
    if source.info.server_version >= 150000:
        filtered = "prqual is not null or prattrs is not null"
    found = source.execute(
        sql.SQL(
            "select n.nspname, c.relname, not ({}) from pg_publication_rel r"
            " join pg_class c on c.oid = r.prrelid join pg_namespace n on n.oid = c.relnamespace"
            " where r.prpubid = %s"
        ).format(sql.SQL(filtered)),
        (oid,),
    )
    present = {(schema, table): all_of_it for schema, table, all_of_it in found}
    return Publication(whole, all_tables, present)


def unsent(now: Publication | None, tables: Iterable[SourceTable]) -> list[SourceTable]:
    """Return the tables of which some changes are not sent."""
    if now is None or not now.whole:
        return list(tables)
    if now.all_tables:
        return []
    return [one for one in tables if not now.present.get((one.schema, one.table))]


def sent(source: Connection, name: str, table: int) -> str | None:
    """Return what of the publication sends a table: another one when it was altered meanwhile."""
    row = source.execute(
        "select concat_ws('/', p.oid, p.xmin, r.oid) from pg_publication p"
        " left join pg_publication_rel r on r.prpubid = p.oid and r.prrelid = %s"
        " where p.pubname = %s",
        (table, name),
    ).fetchone()
    return row[0] if row else None


def refuse_nested(source: Connection, tables: Sequence[int]) -> None:
    """Raise SourceError for a partition beside a table that it belongs to.

    A publication sends its changes once, as those of the table.
    """
    row = source.execute(
        "select t::oid::regclass::text, a::text from unnest(%(tables)s::oid[]) t,"
        " pg_partition_ancestors(t) a where a::oid = any(%(tables)s::oid[]) and a::oid <> t",
        {"tables": list(tables)},
    ).fetchone()
    if row:
        raise SourceError(
            f"{row[0]} is a partition of {row[1]}: a slot sends its changes as those of {row[1]}",
            hint="read one of the two by its changes, the other one by scan",
        )


def publish(
    source: Connection,
    name: str,
    now: Publication | None,
    tables: Sequence[SourceTable],
    say: Callable[[str], None],
) -> None:
    """Bring the publication, as it is ``now``, to these tables. Raises SourceError."""
    wanted = {(one.schema, one.table): one.name for one in tables}
    named = sql.Identifier(name)
    options = sql.SQL(
        "publish_via_partition_root = true, publish = 'insert, update, delete, truncate'"
    )
    if now is None:
        statement = sql.SQL("create publication {} for table {} with ({})")
        _change(source, statement.format(named, _COMMA.join(wanted.values()), options))
        return
    if not now.whole:
        _change(source, sql.SQL("alter publication {} set ({})").format(named, options))
    if now.all_tables:
        return
    # One that sends some rows or columns alone is taken out, and put in again as a whole.
    gone = [one for one, whole in now.present.items() if one not in wanted or not whole]
    added = [name for one, name in wanted.items() if not now.present.get(one)]
    for action, names in (("drop", [sql.Identifier(*one) for one in gone]), ("add", added)):
        if names:
            statement = sql.SQL("alter publication {} {} table {}")
            _change(source, statement.format(named, sql.SQL(action), _COMMA.join(names)))
    for schema, table in (one for one in gone if one not in wanted):
        say(f"{schema}.{table} is not read by its changes any more: it has left {name}")


def _change(source: Connection, statement: sql.Composed) -> None:
    try:
        source.execute(statement)
    except psycopg.errors.InsufficientPrivilege as error:
        raise SourceError(
            f"the publication cannot be changed: {first_line(error)}",
            hint=f"as the owner of the tables: {statement.as_string(source)}",
        ) from None


def await_writers(source: Connection, say: Callable[[str], None]) -> None:
    """Wait until every transaction that is writing now has ended. Raises SourceError.

    What such a one does may be missing both in a snapshot and in the changes behind the slot's
    position, or of a table that it began to write before the publication had it.
    """
    # One of our own: a snapshot's xmax may lie below the ids of transactions that are running.
    row = source.execute("select pg_current_xact_id()::text").fetchone()
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
            say(f"the copy waits for {_writers(source) or 'transactions'} to end")
            told = 0.0
        time.sleep(0.01)


def _waits(source: Connection) -> SourceError:
    return SourceError(
        f"{_writers(source) or 'a transaction'} did not end within {_WAIT:.0f} s: before it has,"
        " what it writes could be missed",
        hint="let it end, or end it: select pg_terminate_backend(<process>); rollback prepared"
        " '<transaction>'",
    )


def _writers(source: Connection) -> str:
    rows = source.execute(
        "select 'process ' || pid || coalesce(' (' || nullif(application_name, '') || ')', '')"
        " || ', in a transaction since ' || date_trunc('second', xact_start)"
        " from pg_stat_activity where backend_xid is not null and pid <> pg_backend_pid()"
        " union all select 'the prepared transaction ' || gid from pg_prepared_xacts limit 3"
    ).fetchall()
    return "; ".join(text for (text,) in rows)


def end_of_wal(source: Connection) -> int:
    """Return the position that has all that was committed before. Raises SourceError.

    It is on disk there: what is not yet, no slot sends.
    """
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
