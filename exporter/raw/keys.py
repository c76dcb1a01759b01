"""Proof that ``conflict_columns`` tell staged rows apart, where the source's catalog has none."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from exporter.errors import SourceError
from exporter.raw.statements import PLACE, STAGING
from exporter.raw.table import STAMP, RawTable
from exporter.source import Column
from exporter.source.shared import UNIQUE
from exporter.wire import Connection

_COMMA = sql.SQL(", ")


def prove(
    destination: Connection, raw: RawTable, order: Sequence[Column], since: str | None
) -> None:
    """Raise SourceError where staged rows have no key, or share one among them.

    ``since`` is the first ``_exported_at`` of this load: a row of raw that has it or a later one
    was landed by an earlier batch, from another row of the source. Rows are named by the key and by
    the columns of ``order``.
    """
    if not raw.key or raw.keyed:
        return
    keys = ", ".join(raw.target.conflict_columns)
    row = _named([*raw.target.conflict_columns, *(column.name for column in order)])
    missing = sql.SQL(" or ").join(sql.SQL("s.{} is null").format(name) for name in raw.key)
    found = destination.execute(
        sql.SQL("select {} from {} s where {} limit 1").format(row, STAGING, missing)
    ).fetchone()
    if found:
        raise SourceError(
            f"{raw.target.key}: a row of the source has NULL in its key: {found[0]}",
            hint=f"exporter.conflict_columns ({keys}) must be columns that are never NULL",
        )
    for statement in _shared(raw, row, since):
        found = destination.execute(statement).fetchone()
        if found:
            raise SourceError(
                f"{raw.target.key}: two rows of the source share conflict_columns ({keys}):"
                f" {found[0]} and {found[1]}",
                hint=UNIQUE,
            )


def keep_newest(destination: Connection, raw: RawTable, order: Sequence[Column]) -> None:
    """Of staged rows that share a key, keep the newest by ``order``; of equals, the last staged."""
    key = _COMMA.join(raw.key)
    shared = sql.SQL("select exists (select from {} group by {} having count(*) > 1)")
    if destination.execute(shared.format(STAGING, key)).fetchone() != (True,):
        return
    newest = [sql.SQL("{} desc nulls last").format(sql.Identifier(one.name)) for one in order]
    destination.execute(
        sql.SQL(
            "delete from {0} s using (select ctid,"
            " row_number() over (partition by {1} order by {2}) as place from {0}) o"
            " where o.ctid = s.ctid and o.place > 1"
        ).format(STAGING, key, _COMMA.join([*newest, sql.SQL("{} desc").format(PLACE)]))
    )


def _shared(raw: RawTable, row: sql.Composable, since: str | None) -> list[sql.Composed]:
    """Return the queries for two rows that share a key: within the batch, and with earlier ones."""
    if raw.unique_at_source:
        return []
    key = _COMMA.join(sql.SQL("s.") + name for name in raw.key)
    queries = [
        sql.SQL(
            "select min({row}), max({row}) from {staging} s group by {key} having count(*) > 1"
            " limit 1"
        ).format(row=row, staging=STAGING, key=key)
    ]
    if since is not None and raw.stamped:
        same = sql.SQL(" and ").join(sql.SQL("s.{0} = d.{0}").format(name) for name in raw.key)
        queries.append(
            sql.SQL(
                "select {row}, 'one of an earlier batch' from {staging} s join {raw} d on {same}"
                " where d.{stamp} >= {since}::timestamptz limit 1"
            ).format(
                row=row,
                staging=STAGING,
                raw=raw.name,
                same=same,
                stamp=sql.Identifier(STAMP),
                since=sql.Literal(since),
            )
        )
    return queries


def _named(names: Sequence[str]) -> sql.Composable:
    """Return the text that names a staged row: ``id=7, at=2026-01-31``."""
    parts = [
        sql.SQL("{} || '=' || coalesce({}::text, 'NULL')").format(
            sql.Literal(name), sql.Identifier("s", name)
        )
        for name in dict.fromkeys(names)
    ]
    return sql.SQL("concat_ws(', ', {})").format(_COMMA.join(parts))
