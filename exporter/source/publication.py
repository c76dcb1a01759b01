"""The publication at the source: which tables' changes are sent, and made so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import psycopg
from psycopg import sql

from exporter.config import SourceTable
from exporter.errors import SourceError
from exporter.wire import Connection, first_line

_COMMA = sql.SQL(", ")


class Publication(NamedTuple):
    """What a publication sends: of each table of ``present`` whether it is all of its changes."""

    whole: bool  # every kind of change, of partitions by their root
    all_tables: bool
    present: dict[tuple[str, str], bool]


def find(source: Connection, name: str) -> Publication | None:
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


def statements(
    name: str, now: Publication | None, tables: Iterable[SourceTable]
) -> tuple[list[sql.Composed], list[str]]:
    """Return the statements that bring the publication to these tables, and which then leave it."""
    wanted = {(one.schema, one.table): one.name for one in tables}
    named = sql.Identifier(name)
    options = sql.SQL(
        "publish_via_partition_root = true, publish = 'insert, update, delete, truncate'"
    )
    if now is None:
        statement = sql.SQL("create publication {} for table {} with ({})")
        return [statement.format(named, _COMMA.join(wanted.values()), options)], []
    found = []
    if not now.whole:
        found.append(sql.SQL("alter publication {} set ({})").format(named, options))
    if now.all_tables:
        return found, []
    # One that sends some rows or columns alone is taken out, and put in again as a whole.
    gone = [one for one, whole in now.present.items() if one not in wanted or not whole]
    added = [table for one, table in wanted.items() if not now.present.get(one)]
    for action, names in (("drop", [sql.Identifier(*one) for one in gone]), ("add", added)):
        if names:
            statement = sql.SQL("alter publication {} {} table {}")
            found.append(statement.format(named, sql.SQL(action), _COMMA.join(names)))
    return found, [f"{schema}.{table}" for schema, table in gone if (schema, table) not in wanted]


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
    tables: Iterable[SourceTable],
    say: Callable[[str], None],
) -> None:
    """Bring the publication, as it is ``now``, to these tables. Raises SourceError."""
    changes, leave = statements(name, now, tables)
    for statement in changes:
        _change(source, statement)
    for table in leave:
        say(f"{table} is not read by its changes any more: it has left {name}")


def _change(source: Connection, statement: sql.Composed) -> None:
    try:
        source.execute(statement)
    except psycopg.errors.InsufficientPrivilege as error:
        raise SourceError(
            f"the publication cannot be changed: {first_line(error)}",
            hint=f"as the owner of the tables: {statement.as_string(source)}",
        ) from None
    except psycopg.errors.ReadOnlySqlTransaction:
        raise SourceError(
            f"{source.variable} leads to a standby, where the publication cannot be changed",
            hint=f"on the primary, as the owner of the tables: {statement.as_string(source)}",
        ) from None
