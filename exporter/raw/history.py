"""Raw as a history: a row for each version of a row at the source, appended and never changed.

The newest version of a key is the one with the greatest ``_lsn``, and of that the greatest
``_seq``. After a ``delete`` there is no row. A TRUNCATE is a ``delete`` of each row that was there:
who asks for a state need not know of it. A copy that follows on versions gives those rows that
differ from the newest versions, and a ``delete`` for those that are gone.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from exporter.errors import DriftError
from exporter.raw.table import STAMP, RawTable
from exporter.source import Column
from exporter.source.versions import DELETE, LSN, OP, OWN, SEQ
from exporter.wire import Connection

_COMMA = sql.SQL(", ")
_AND = sql.SQL(" and ")


def newest(name: sql.Composable, key: list[sql.Identifier]) -> sql.Composed:
    """Return a subquery for the rows as they are now: the newest versions, without what is gone."""
    return sql.SQL(
        "(select * from (select distinct on ({}) * from {} order by {}) v where v._op <> {})"
    ).format(_COMMA.join(key), name, in_order(key), sql.Literal(DELETE))


def in_order(key: list[sql.Identifier]) -> sql.Composed:
    """Return the order of versions, the newest first: the primary key's, read backwards."""
    return _COMMA.join(
        sql.SQL("{} desc").format(name) for name in (*key, *map(sql.Identifier, (LSN, SEQ)))
    )


def compared(raw: RawTable, staging: sql.Identifier, stamp: str) -> list[sql.Composed]:
    """Return the statements for a copy: ``delete`` what is gone, append what differs."""
    columns = [one for one in raw.columns if one.name not in OWN]
    own: dict[str, sql.Composable] = {
        one.name: sql.SQL(one.expression or "null") for one in raw.columns if one.name in OWN
    }
    # A second copy at one position comes behind the first.
    own[SEQ] = sql.SQL(
        "(select coalesce(max({seq}) + 1, 0) from {raw} where {lsn} = {here})"
    ).format(seq=sql.Identifier(SEQ), raw=raw.name, lsn=sql.Identifier(LSN), here=own[LSN])
    same = _AND.join(sql.SQL("s.{0} = c.{0}").format(name) for name in raw.key)
    current = newest(raw.name, raw.key)
    gone = insert(
        raw,
        [*raw.target.conflict_columns, *own],
        [*(sql.SQL("c.") + name for name in raw.key), *(own | {OP: sql.Literal(DELETE)}).values()],
        stamp,
    ) + sql.SQL(" from {} c where not exists (select from {} s where {})").format(
        current, staging, same
    )
    differs = sql.SQL("row({})::record *<> row({})::record").format(
        _COMMA.join(_values(columns, "s")), _COMMA.join(_values(columns, "c"))
    )
    changed = insert(
        raw,
        [*(one.name for one in columns), *own],
        [*(sql.Identifier("s", one.name) for one in columns), *own.values()],
        stamp,
    ) + sql.SQL(" from {} s left join {} c on {} where c.{} is null or {}").format(
        staging, current, same, raw.key[0], differs
    )
    return [gone, changed]


def refuse_disorder(destination: Connection, raw: RawTable) -> None:
    """Raise DriftError where raw has versions that would stand behind those that follow."""
    here = {one.name: one.expression or "null" for one in raw.columns}[LSN]
    row = destination.execute(
        sql.SQL("select max({lsn})::text, max({lsn}) > {here}, {here}::text from {raw}").format(
            lsn=sql.Identifier(LSN), here=sql.SQL(here), raw=raw.name
        )
    ).fetchone()
    if row and row[1]:
        raise DriftError(
            f"{raw.target.key}: {raw.target} has versions up to {row[0]} of the WAL, and the source"
            f" is at {row[2]}: it is another server, or has lost commits, and what follows would"
            " stand before them",
            hint=f"alter table {raw.target} rename to …: then exporter load {raw.target.key} begins"
            " a new history",
        )


def _values(columns: list[Column], side: str) -> list[sql.Composable]:
    """Return the columns to compare: not those that the source has lost."""
    return [sql.Identifier(side, one.name) for one in columns if one.expression is None]


def insert(
    raw: RawTable, names: list[str], values: Sequence[sql.Composable], stamp: str
) -> sql.Composed:
    """Return the beginning of a statement that appends versions: what the values are of follows."""
    columns: list[sql.Composable] = [sql.Identifier(name) for name in names]
    chosen = list(values)
    if raw.stamped:
        columns.append(sql.Identifier(STAMP))
        chosen.append(sql.SQL("{}::timestamptz").format(sql.Literal(stamp)))
    return sql.SQL("insert into {} ({}){} select {}").format(
        raw.name,
        _COMMA.join(columns),
        sql.SQL(" overriding system value" if raw.fixed else ""),
        _COMMA.join(chosen),
    )
