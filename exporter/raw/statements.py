"""The statements by which rows land in raw. Nothing here talks to a server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from psycopg import sql

from exporter.raw import history
from exporter.raw.table import DELETED, STAMP, RawTable
from exporter.source import BEYOND, Column, Lands

STAGING = sql.Identifier("_exporter_staging")
PLACE = sql.Identifier("_exporter_place")  # of a row among those that were staged with it
_COMMA = sql.SQL(", ")


def copy_statement(raw: RawTable) -> sql.Composed:
    """Return the statement for rows that come in binary, with their stamp, into raw itself."""
    return sql.SQL("copy {} ({}) from stdin (format binary)").format(
        raw.name, _COMMA.join([*raw.names, sql.Identifier(STAMP)])
    )


def landing(
    raw: RawTable, lands: Lands, stamp: str, order: Sequence[Column], *, late: bool = True
) -> list[sql.Composed]:
    """Return the statements for staged rows: of a whole table, the first one removes what is gone.

    ``late``: of rows that say whether they lie beyond the stored position, some may not.
    """
    if raw.target.is_history:
        return _history(raw, lands, stamp)
    if lands is Lands.WHOLE:
        return [_remove_absent(raw, stamp), _apply(raw, stamp)]
    if lands is Lands.BEYOND and raw.keyed and not raw.on_citus:
        return [_replace(raw, stamp, order), *([_apply(raw, stamp, late=True)] if late else [])]
    return [_apply(raw, stamp)]


def _history(raw: RawTable, lands: Lands, stamp: str) -> list[sql.Composed]:
    if lands is Lands.WHOLE:
        return history.compared(raw, STAGING, stamp)
    return [_insert(raw, stamp) + sql.SQL("{} s").format(STAGING)]


def _remove_absent(raw: RawTable, stamp: str) -> sql.Composed:
    """Return the statement for rows of raw that are not staged."""
    if not raw.key:
        return sql.SQL("delete from {}").format(raw.name)
    if raw.on_citus:
        key = _COMMA.join(raw.key)
        absent = sql.SQL("({}) not in (select {} from {})").format(key, key, STAGING)
    else:
        same = _same_key(raw, "s", "r")
        absent = sql.SQL("not exists (select from {} s where {})").format(STAGING, same)
    return mark_or_delete(raw, absent, stamp)


def mark_or_delete(raw: RawTable, gone: sql.Composable, stamp: str) -> sql.Composed:
    """Return the statement for rows ``r`` that are gone at the source, by a condition.

    They are marked, so that models see it, or removed. A row that is marked already stays as it is.
    """
    if raw.target.deletes != "mark":
        return sql.SQL("delete from {} r where {}").format(raw.name, gone)
    names = [sql.Identifier(name) for name in (DELETED, *([STAMP] if raw.stamped else []))]
    return sql.SQL("update {} r set {} where {} and r.{} is null").format(
        raw.name,
        _COMMA.join(
            sql.SQL("{} = {}::timestamptz").format(name, sql.Literal(stamp)) for name in names
        ),
        gone,
        names[0],
    )


def _same_key(raw: RawTable, left: str, right: str) -> sql.Composable:
    return sql.SQL(" and ").join(
        sql.SQL("{}.{} = {}.{}").format(sql.SQL(left), key, sql.SQL(right), key) for key in raw.key
    )


def _insert(raw: RawTable, stamp: str) -> sql.Composed:
    return sql.SQL("insert into {} as d ({}){} select {}{} from ").format(
        raw.name,
        _COMMA.join(_target(raw)),
        sql.SQL(" overriding system value" if raw.fixed else ""),
        _COMMA.join(_values(raw, "s")),
        sql.SQL(", {}::timestamptz").format(sql.Literal(stamp)) if raw.stamped else sql.SQL(""),
    )


def _values(raw: RawTable, side: str) -> list[sql.Composable]:
    """Return the columns of a row, those that are narrower in raw as raw has them."""
    return [
        sql.SQL("{}.{}::{}").format(
            sql.SQL(side), sql.Identifier(column.name), sql.SQL(raw.narrow[column.name])
        )
        if column.name in raw.narrow
        else sql.SQL(f"{side}.") + sql.Identifier(column.name)
        for column in raw.columns
    ]


def _written(raw: RawTable) -> list[sql.Identifier]:
    """Return the columns that an update sets."""
    # What is staged is there at the source: its mark, which no staged row has, goes.
    names = [*_target(raw), sql.Identifier(DELETED)] if raw.marked else _target(raw)
    return [name for name in names if name not in [sql.Identifier(one) for one in raw.fixed]]


def _update(raw: RawTable) -> sql.Composed:
    target = _written(raw)
    return sql.SQL(" on conflict ({}) do update set ({}) = row({})").format(
        _COMMA.join(raw.key),
        _COMMA.join(target),
        _COMMA.join(sql.SQL("excluded.") + name for name in target),
    )


def _target(raw: RawTable) -> list[sql.Identifier]:
    return [*raw.names, sql.Identifier(STAMP)] if raw.stamped else raw.names


def _differs(raw: RawTable, new: str, old: str) -> sql.Composed:
    """Return the condition for two rows that differ. ``*<>`` compares images: any type has them."""
    rows = [
        sql.SQL("row({})::record").format(_COMMA.join(_values(raw, side))) for side in (new, old)
    ]
    # Citus takes a comparison of rows apart; two rows that differ are not spelled alike, either.
    form = "({0})::text is distinct from ({1})::text" if raw.on_citus else "{0} *<> {1}"
    differs = sql.SQL(form).format(*rows)
    if not raw.marked:
        return differs
    return sql.SQL("({} or {}.{} is not null)").format(
        differs, sql.SQL(old), sql.Identifier(DELETED)
    )


def _differs_soon(raw: RawTable, first: Iterable[Column], new: str, old: str) -> sql.Composable:
    """Return the condition of ``_differs``, with the columns before it that are likely to differ.

    Their types' own comparison, which costs less, must find no two values of one image distinct.
    """
    differ = [
        sql.SQL("{0}.{2} is distinct from {1}.{2}").format(
            sql.SQL(new), sql.SQL(old), sql.Identifier(column.name)
        )
        for column in first
    ]
    return sql.SQL("({})").format(sql.SQL(" or ").join([*differ, _differs(raw, new, old)]))


def _replace(raw: RawTable, stamp: str, order: Sequence[Column]) -> sql.Composed:
    """Return the statement for rows beyond the stored position: one look-up each."""
    # Most of these rows have another cursor value.
    cursor = [column for column in order[:1] if raw.exact and column in raw.columns]
    differs = _differs_soon(raw, cursor, "excluded", "d")
    return (
        _insert(raw, stamp)
        + sql.SQL("{} s where s.{}").format(STAGING, sql.Identifier(BEYOND.name))
        + _update(raw)
        + sql.SQL(" where {}").format(differs)
    )


def changed(raw: RawTable, stamp: str, rows: sql.Composable) -> sql.Composed:
    """Return the statement for ``rows``, a table called ``s``, of which few are as raw has them."""
    return (
        _insert(raw, stamp)
        + rows
        + _update(raw)
        + sql.SQL(" where {}").format(_differs(raw, "excluded", "d"))
    )


def inserted(raw: RawTable, stamp: str, rows: sql.Composable) -> sql.Composed:
    """Return the statement for ``rows``, a table called ``s``, that raw does not have."""
    return _insert(raw, stamp) + rows


def updated(raw: RawTable, stamp: str, rows: sql.Composable) -> sql.Composed:
    """Return the statement for ``rows``, a table called ``s``, of those that raw has, unmarked.

    It costs two thirds of ``changed``: no row is locked before, or looked for to be inserted.
    """
    now = sql.SQL("{}::timestamptz").format(sql.Literal(stamp))
    names = [name for name in _written(raw) if name not in raw.key] or raw.key
    moments = [one for one in raw.columns if raw.exact and one.raw_type.startswith("timestamp")]
    differs = _differs_soon(raw, moments, "s", "d")
    values = [now if name == sql.Identifier(STAMP) else sql.SQL("s.") + name for name in names]
    return (
        sql.SQL("update {} d set ({}) = row({}) from ").format(
            raw.name, _COMMA.join(names), _COMMA.join(values)
        )
        + rows
        + sql.SQL(" where {} and {}").format(_same_key(raw, "s", "d"), differs)
    )


def _apply(raw: RawTable, stamp: str, *, late: bool = False) -> sql.Composed:
    """Return the statement for staged rows of which most may be in raw already.

    ``late``: only those that are not beyond the stored position.
    """
    insert = _insert(raw, stamp)
    if not raw.key:
        return insert + sql.SQL("{} s").format(STAGING)
    stored_rows: sql.Composable = raw.name
    if raw.on_citus:  # only the rows that are asked for come to the node that has the staged ones
        key = _COMMA.join(raw.key)
        stored_rows = sql.SQL("(select * from {} where ({}) in (select {} from {}))").format(
            raw.name, key, key, STAGING
        )
    # ON CONFLICT DO UPDATE … WHERE locks, and so writes, every row that it then leaves alone: the
    # join keeps unchanged rows away from it.
    return (
        insert
        + sql.SQL(
            "{staging} s left join {raw} o on {same} where {late}(o.{first} is null or {differs})"
        ).format(
            staging=STAGING,
            raw=stored_rows,
            same=_same_key(raw, "s", "o"),
            late=sql.SQL("s.{} is not true and ").format(sql.Identifier(BEYOND.name))
            if late
            else sql.SQL(""),
            first=raw.key[0],
            differs=_differs(raw, "s", "o"),
        )
        + _update(raw)
    )
