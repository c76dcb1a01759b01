"""Whether a load would work: checks of both servers, the rights on them, and each table.

The sessions are read-only: nothing is changed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from exporter import state
from exporter.config import Definition, project, source_variables
from exporter.config.choice import choose
from exporter.config.environment import require
from exporter.errors import DriftError
from exporter.load import dry_run, slot_dry_run
from exporter.load.transfer import Attempt
from exporter.monitoring import capture, grants
from exporter.monitoring.finding import Finding, subject_of, tried
from exporter.raw import fit
from exporter.source import NEW, Table, describe, find_table, keyed, megabytes, slots
from exporter.source.catalog import refuse_hidden
from exporter.source.copied import refuse_unfit
from exporter.source.lookup import indexes, quoted
from exporter.wire import Connection, connect

_CORE, _ANALYTICS = "DATABASE_URL_CORE", "DATABASE_URL_ANALYTICS"
_OLDEST = 130000  # the oldest version of PostgreSQL that the tests run on
_APART = 5.0  # seconds; clocks that NTP sets are never this far apart


def findings(root: Path, keys: tuple[str, ...]) -> Iterator[Finding]:
    """Yield the finding of each check. Raises UsageError for a key that no definition has."""
    declared: list[Definition] = []
    yield from tried("definitions", "definitions", _definitions(root, declared))
    definitions = choose(declared, keys) if declared else []
    with contextlib.ExitStack() as stack:
        sessions: dict[str, Connection] = {}
        sources = source_variables(definitions) or ([] if definitions else [_CORE])
        for variable in (*sources, _ANALYTICS):
            subject = subject_of(variable)
            yield from tried(subject, "connection", _connect(root, variable, stack, sessions))
        analytics = sessions.get(_ANALYTICS)
        for variable in sources:
            source, subject = sessions.get(variable), subject_of(variable)
            if source and analytics:
                yield from tried(subject, "clock", _clocks(source, analytics))
            if source:
                yield from tried(subject, "transactions", _transactions(source))
        if analytics:
            captured = capture.of_sources(declared, sessions, analytics)
            yield from tried("analytics", "slots", captured)
            yield from tried("analytics", "rights", _rights(analytics, definitions))
        for definition in definitions:
            if source := sessions.get(definition.source.variable):
                found = of_source(source, analytics, definition)
                yield from tried(definition.key, "source", found)
            if definition.source.rows:
                yield from tried(definition.key, "source", _of_function(analytics, definition))
            if analytics:
                yield from tried(definition.key, "lock", _lock(analytics, definition))


def least_grants(definitions: list[Definition]) -> Iterator[str]:
    """Yield a script for each server that gives a role what a load needs, and no more."""
    for variable in source_variables(definitions):
        with connect(variable) as session:
            yield f"-- on the database of {variable}"
            its = [it for it in definitions if it.source.variable == variable]
            yield from grants.least_on_source(session, its)
    with connect(_ANALYTICS) as session:
        yield f"-- on the database of {_ANALYTICS}"
        yield from grants.least_on_destination(session, definitions)


def _definitions(root: Path, found: list[Definition]) -> Iterator[Finding]:
    found += project.definitions(root)
    tables = "1 table" if len(found) == 1 else f"{len(found)} tables"
    yield Finding("ok", "definitions", "definitions", f"{tables} declared")


# -- the servers


def _connect(
    root: Path, variable: str, stack: contextlib.ExitStack, sessions: dict[str, Connection]
) -> Iterator[Finding]:
    subject = subject_of(variable)
    require(root, variable)
    session = stack.enter_context(connect(variable))
    row = session.execute(
        "select current_setting('server_version'), current_setting('server_version_num')::int,"
        " current_database(), current_user, pg_is_in_recovery(),"
        " current_setting('default_transaction_read_only') = 'on',"
        " coalesce(host(inet_client_addr()), 'local') in ('local', '127.0.0.1', '::1'),"
        " s.ssl, s.version, s.cipher"
        " from (select) one left join pg_stat_ssl s on s.pid = pg_backend_pid()"
    ).fetchone()
    assert row is not None
    version, number, database, role, standby, read_only, local, ssl, protocol, cipher = row
    session.execute("set default_transaction_read_only = on")
    sessions[variable] = session
    message = f"PostgreSQL {version.split()[0]}, database {database}, as {role}"
    if number >= _OLDEST:
        yield Finding("ok", subject, "connection", message)
    else:
        yield Finding("warn", subject, "connection", f"{message}; tested from PostgreSQL 13 on")
    if ssl:
        yield Finding("ok", subject, "tls", f"{protocol}, {cipher}")
    elif local:
        yield Finding("ok", subject, "tls", "none, on this machine's own connection")
    else:
        message = "none: rows and password cross the network in the clear"
        fix = f"add ?sslmode=require to {variable}"
        yield Finding("warn", subject, "tls", message, (fix,))
    if variable == _ANALYTICS and (standby or read_only):
        why = "a standby" if standby else "read-only (default_transaction_read_only)"
        yield Finding("fail", subject, "writable", f"is {why}: nothing can be landed in it")


def _clocks(core: Connection, analytics: Connection) -> Iterator[Finding]:
    yield _clock(subject_of(core.variable), _ahead(core) - _ahead(analytics))


def _clock(subject: str, apart: float) -> Finding:
    message = f"{abs(apart):.3f} s {'ahead of' if apart > 0 else 'behind'} that of analytics"
    if abs(apart) < _APART:
        return Finding("ok", subject, "clock", message)
    message += ": the times that exporter status shows are wrong by as much"
    return Finding("warn", subject, "clock", message, ("let NTP set the clocks of both servers",))


def _ahead(session: Connection) -> float:
    """Return by how many seconds a server's clock is ahead, from the quickest of three answers."""
    answers = []
    for _ in range(3):
        begin = time.time()
        row = session.execute("select extract(epoch from clock_timestamp())::float8").fetchone()
        end = time.time()
        assert row is not None
        answers.append((end - begin, row[0] - (begin + end) / 2))
    return float(min(answers)[1])


def _transactions(core: Connection) -> Iterator[Finding]:
    subject = subject_of(core.variable)
    row = core.execute(
        "select pg_has_role('pg_read_all_stats', 'usage'), quote_ident(current_user),"
        " pg_is_in_recovery(),"
        " extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp())::float8,"
        " (select count(*) from pg_prepared_xacts where database = current_database())"
    ).fetchone()
    assert row is not None
    seen, role, standby, behind, prepared = row
    if standby:
        message = (
            "a standby: the primary's open transactions cannot be seen, and only the lookback"
            " covers the rows that they commit late"
        )
        message += f"; the last transaction replayed is {behind:.0f} s old" if behind else ""
        yield Finding("warn", subject, "standby", message)
    if seen:
        yield Finding("ok", subject, "transactions", "those of other roles can be seen")
    else:
        message = (
            "those of other roles are hidden: only the lookback covers rows that they commit late"
        )
        fix = f"GRANT pg_read_all_stats TO {role};"
        yield Finding("warn", subject, "transactions", message, (fix,))
    if prepared:
        message = f"{prepared} prepared transactions hold the watermark back until they end"
        fix = "select gid, prepared, owner from pg_prepared_xacts;"
        yield Finding("warn", subject, "prepared", message, (fix,))


def _rights(analytics: Connection, definitions: list[Definition]) -> Iterator[Finding]:
    missing = tuple(grants.missing_on_destination(analytics, definitions))
    if missing:
        yield Finding("fail", "analytics", "rights", "some are missing", missing)
    else:
        yield Finding("ok", "analytics", "rights", "enough to land rows")


# -- a definition


def of_source(
    core: Connection, analytics: Connection | None, definition: Definition
) -> Iterator[Finding]:
    """Yield the findings about a definition's source; with ``analytics``, about a load as well."""
    key = definition.key
    name = quoted(core, definition.source.schema, definition.source.table)
    missing = tuple(grants.missing_on_source(core, definition))
    if missing:
        yield Finding("fail", key, "rights", f"{name} cannot be read", missing)
        return
    table = find_table(core, definition.source, analytics)
    how = describe(definition, table)
    rows = f", about {table.rows:,.0f} rows" if table.rows >= 0 and table.kind in ("r", "p") else ""
    yield Finding("ok", key, "source", f"{name} can be read {how}{rows}")
    definition = keyed(definition, table)
    if definition.source.read == "changes":
        refuse_unfit(core, definition, table)
        yield from capture.identity(core, definition, table)
    if not table.hides_rows:  # that one has a statement
        yield from tried(key, "rights", _columns(core, key, table, name))
    else:
        message = f"row security hides rows of {name} from this role"
        _, role = grants.database_and_role(core)
        yield Finding("fail", key, "policies", message, (f"ALTER ROLE {role} BYPASSRLS;",))
    yield from _keys(core, definition, table, name)
    yield from tried(key, "index", _index(core, definition, table, name))
    captures = definition.source.read == "changes"
    unfit = captures and any(slots.unfit(core))  # told of the server
    if analytics and not unfit and not table.hides_rows:
        yield from tried(key, "load", _load(core, analytics, definition))


def _of_function(analytics: Connection | None, definition: Definition) -> Iterator[Finding]:
    message = f"rows of {definition.source.rows}, which a load alone imports and calls"
    yield Finding("ok", definition.key, "source", message)
    if analytics:
        yield from tried(definition.key, "load", _load(None, analytics, definition))


def _columns(core: Connection, key: str, table: Table, name: str) -> Iterator[Finding]:
    refuse_hidden(table)
    hidden = [one for one in ("xmin", "ctid") if one in table.unreadable]
    if hidden and table.kind in ("r", "p", "m"):
        columns, (_, role) = ", ".join(hidden), grants.database_and_role(core)
        yield Finding(
            "warn",
            key,
            "rights",
            f"{columns} of {name} cannot be read: loads read more of what raw has already",
            (f"GRANT SELECT ({columns}) ON {name} TO {role};",),
        )


def _keys(core: Connection, definition: Definition, table: Table, name: str) -> Iterator[Finding]:
    conflict = frozenset(definition.destination.conflict_columns)
    nullable = [c.name for c in table.columns if c.name in conflict and not c.not_null]
    if not conflict or (any(key <= conflict for key in table.unique_keys) and not nullable):
        return
    columns = ", ".join(quoted(core, one) for one in definition.destination.conflict_columns)
    yield Finding(
        "warn",
        definition.key,
        "keys",
        f"no constraint says that ({columns}) is unique and not null in {name}: a load refuses rows"
        " for which it is not",
        (f"CREATE UNIQUE INDEX CONCURRENTLY ON {name} ({columns});",) if table.kind == "r" else (),
    )


def _index(core: Connection, definition: Definition, table: Table, name: str) -> Iterator[Finding]:
    key, order = definition.key, definition.source.order
    if definition.source.read in ("scan", "changes"):
        return
    if not order:
        if table.size > definition.source.scan_below:
            message = f"no cursor: every load reads {megabytes(table.size)}"
            advice = "exporter.source.cursor: a column that grows with every change, with an index"
            yield Finding("warn", key, "index", message, (advice,))
        return
    columns = ", ".join(quoted(core, column) for column in order)
    if table.kind not in ("r", "p", "m"):
        yield Finding("ok", key, "index", f"on ({columns}) depends on what {name} reads")
        return
    fitting = [i.columns for i in indexes(core, table.oid) if i.columns[:1] == order[:1]]
    if fitting:
        best = max(fitting, key=lambda names: names[: len(order)] == order)[: len(order)]
        yield Finding("ok", key, "index", f"({', '.join(quoted(core, name) for name in best)})")
        return
    statements = [f"CREATE INDEX CONCURRENTLY ON {name} ({columns});"]
    if table.kind == "p":  # not possible "concurrently": its index adopts those of its partitions
        parts = core.execute(
            "select n.nspname, c.relname from pg_partition_tree(%s::oid) p"
            " join pg_class c on c.oid = p.relid join pg_namespace n on n.oid = c.relnamespace"
            " where p.isleaf and c.relkind = 'r' order by 1, 2",
            (table.oid,),
        ).fetchall()
        names = [quoted(core, *part) for part in parts]
        statements = [f"CREATE INDEX CONCURRENTLY ON {part} ({columns});" for part in names]
        statements.append(f"CREATE INDEX ON {name} ({columns});")
    message = f"none on ({columns}): every load reads the whole table"
    yield Finding("warn", key, "index", message, tuple(statements))


def _load(
    core: Connection | None, analytics: Connection, definition: Definition
) -> Iterator[Finding]:
    """Take the steps of a load up to its first row; raise what it would raise."""
    key, told = definition.key, list[str]()

    def say(text: str, level: str = "warning", *_: object, **__: object) -> None:
        if level == "warning":
            told.append(text)

    attempt = Attempt(definition, core, analytics, state.Result(key), say, lambda *_: None)
    reader, stored = None, None
    if core and definition.source.read == "changes":
        slot = slot_dry_run.outlook_of(core, analytics, [definition])
        reader, stored = slot_dry_run.stand_ins(attempt, slot)
    try:
        with dry_run.foreseen(attempt, NEW, reader, stored) as outlook:
            yield from _fits(analytics, outlook, told)
    except DriftError as error:
        yield Finding("fail", key, "drift", error.message, (error.hint,) if error.hint else ())
    finally:
        if core:
            core.rollback()


def _fits(analytics: Connection, outlook: dry_run.Outlook, told: list[str]) -> Iterator[Finding]:
    planned, definition = outlook.planned, outlook.definition
    key, raw, rows = definition.key, str(definition.destination), planned.raw
    changes = [change.statement for change in planned.changes]
    changes += [outlook.key] if outlook.key and not planned.creation else []
    told += [
        f"column {name} is {kind} in raw and wider at the source: what does not fit is refused"
        for name, kind in rows.narrow.items()
    ]
    told += [
        f"raw has another unique index, {one.name}: a row that breaks it is refused"
        for one in fit.unique_indexes(analytics, rows.name)
        if one.columns != sorted(rows.identity)
    ]
    if outlook.table.elsewhere and outlook.plan.unseen:
        yield Finding("warn", key, "transactions", outlook.plan.unseen)
    if changes and not grants.owns(analytics, definition):
        statements = tuple(f"{one.as_string(analytics)};" for one in changes)
        messages = [f"only the owner of {raw} can change its columns and keys", *told]
        yield Finding("fail", key, "drift", "; ".join(messages), statements)
    elif told:
        yield Finding("warn", key, "drift", "; ".join(told))
    elif planned.creation or not rows.columns:
        yield Finding("ok", key, "drift", f"{raw} is made by the first load")
    else:
        yield Finding("ok", key, "drift", f"{raw} has the source's columns")


def _lock(analytics: Connection, definition: Definition) -> Iterator[Finding]:
    holder = state.holder(analytics, definition.destination)
    if holder:
        yield Finding("warn", definition.key, "lock", f"held: {holder}")
    else:
        yield Finding("ok", definition.key, "lock", "free")
