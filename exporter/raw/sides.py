"""The source's rows and raw's as two sides of a comparison: what identifies a row, its hashes.

Both hash the text of what raw has, or would have, under the settings that all sessions here share:
the same value gives the same hash on every server, whatever its version, collations and encoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from psycopg import sql

from exporter.config import Destination
from exporter.errors import DriftError
from exporter.raw import history
from exporter.raw.drift import rounds
from exporter.raw.table import DELETED, STAMP
from exporter.source import Column, Horizon, Table
from exporter.source.lookup import relation_columns
from exporter.wire import Connection, find_operators

BUCKETS = 65_536
TRUE: sql.Composable = sql.SQL("true")
FALSE = sql.SQL("false")
COMMA = sql.SQL(", ")


class Value(NamedTuple):
    """A column of one side: ``stored``, as an index has it; ``value``, as raw has it."""

    name: str
    stored: sql.Composable
    type: str
    value: sql.Composable
    text: sql.Composable


class Side(NamedTuple):
    """The rows of one server. ``keys`` identify a row, ``columns`` have to be the same in it."""

    session: Connection
    table: sql.Composable
    keys: tuple[Value, ...]
    columns: tuple[Value, ...]
    convert: bool  # the servers' encodings differ
    where: sql.Composable

    @property
    def bucket(self) -> sql.Composable:
        """The number of a row's bucket."""
        return sql.SQL("(({}) & {})::int").format(
            _hash((one.text for one in self.keys), self.convert), sql.Literal(BUCKETS - 1)
        )

    def rows(
        self,
        where: sql.Composable = TRUE,
        *,
        in_flight: sql.Composable = FALSE,
        each: bool = False,
    ) -> sql.Composable:
        """Return the query for rows: key, bucket, hash, in flight; with ``each``, a hash a column.

        ``in_flight`` is the condition for rows that the next load is going to bring to the other
        side.
        """
        hashes = [_hash([one.text], self.convert) for one in self.columns] if each else []
        return sql.SQL(
            "select {keys}, {bucket} as bucket, {hash} as hash,"
            " coalesce({in_flight}, false) as in_flight, array[{hashes}]::bigint[] as hashes"
            " from {table} where {always} and {where}"
        ).format(
            keys=COMMA.join(
                sql.SQL("{} as {}").format(one.value, name)
                for one, name in zip(self.keys, key_names(self.keys), strict=True)
            ),
            bucket=self.bucket,
            hash=_hash((one.text for one in self.columns), self.convert),
            in_flight=in_flight,
            hashes=COMMA.join(hashes),
            table=self.table,
            always=self.where,
            where=where,
        )


class Comparison(NamedTuple):
    """The two sides. ``missing`` are columns that raw does not have yet."""

    target: Destination
    table: Table
    source: Side
    raw: Side
    missing: tuple[str, ...]
    stamped: bool  # raw has `_exported_at`

    def unreplicated(self, horizon: Horizon | None) -> sql.Composable:
        """Return the condition for rows of raw that a source on a standby may not have yet.

        It shows what its primary had a while ago, and another server may have been read before.
        """
        if horizon is None or not horizon.standby or not self.stamped:
            return FALSE
        return sql.SQL("{} > {}::timestamptz - interval '5 minutes'").format(
            sql.Identifier(STAMP), sql.Literal(horizon.oldest_open)
        )


def key_names(keys: Sequence[Value]) -> list[sql.Identifier]:
    """Return what the key's columns are called in the queries and temporary tables here."""
    return [sql.Identifier(f"k{number}") for number in range(len(keys))]


def comparison(
    source: Connection,
    destination: Connection,
    target: Destination,
    table: Table,
    *,
    keys_only: bool = False,
) -> Comparison:
    """Return what is to be compared: the columns that land, as raw has them. Raises DriftError."""
    declared = table.declared
    existing = relation_columns(destination, target.schema, target.table)
    load = f"exporter load {target.key}"
    if existing is None:
        raise DriftError(f"{target.key}: there is no table {target} yet", hint=load)
    pairs = {
        column.name: _pair(source, column, existing[column.name])
        for column in table.landed
        if column.name in existing
    }
    for connection, place in ((source, 0), (destination, 1)):
        find_operators(
            connection, [pairs[n][place].type for n in target.conflict_columns if n in pairs]
        )
    for name in target.conflict_columns:
        if name not in pairs:
            raise DriftError(
                f"{target.key}: {target} has no column {name}, which is one of conflict_columns",
                hint=load,
            )
    named = target.conflict_columns or tuple(name for name in declared.order if name in pairs)
    read = raw = TRUE
    if declared.skipped:
        read = sql.SQL("{} is not null").format(sql.Identifier(declared.skipped))
    if target.deletes == "mark" and DELETED in existing:
        raw = sql.SQL("{} is null").format(sql.Identifier(DELETED))
    rows: sql.Composable = target.name
    if target.is_history:
        newest = history.newest(target.name, [sql.Identifier(name) for name in named])
        rows = newest + sql.SQL(" n")
    encodings = {one.info.parameter_status("server_encoding") for one in (source, destination)}
    convert = len(encodings) > 1

    def side(place: int, session: Connection, name: sql.Composable, where: sql.Composable) -> Side:
        columns = tuple(pair[place] for pair in pairs.values())
        keys = tuple(pairs[one][place] for one in named) or (_hash_as_key(columns, convert),)
        return Side(session, name, keys, keys if keys_only else columns, convert, where)

    return Comparison(
        target,
        table,
        side(0, source, declared.name, read),
        side(1, destination, rows, raw),
        tuple(column.name for column in table.landed if column.name not in existing),
        STAMP in existing,
    )


def _pair(source: Connection, column: Column, existing: str) -> tuple[Value, Value]:
    """Return a column as the source and as raw have it."""
    name = sql.Identifier(column.name)
    stored = column.selected if column.expression is not None else name
    value = column.selected
    as_text = "{}::text"
    if rounds(existing, column.raw_type):  # refused where it does not fit: the source's own value
        in_raw = sql.SQL("{}::{}").format(name, sql.SQL(column.raw_type))
        # 19.9900 is the same value as 19.99.
        text = sql.SQL("trim_scale({})::text" if "numeric" in column.raw_type else "{}::text")
        return (
            Value(column.name, stored, column.type, value, text.format(value)),
            Value(column.name, name, existing, in_raw, text.format(in_raw)),
        )
    if existing != column.raw_type:  # a table that migrations own
        # concat() writes what COPY does: `t` where the cast to text says `true`.
        as_text = "case when {0} is not null then concat({0}) end"
        value = sql.SQL(f"({as_text})").format(value)
        builtin = source.execute(
            "select to_regtype(regexp_replace(%s, '\\([^)]*\\)', ''))::oid < 10000", (existing,)
        ).fetchone()
        if builtin and builtin[0]:
            value = sql.SQL("{}::{}").format(value, sql.SQL(existing))
    text = sql.SQL(as_text)
    return (
        Value(column.name, stored, column.type, value, text.format(value)),
        Value(column.name, name, existing, name, text.format(name)),
    )


def _hash_as_key(columns: Sequence[Value], convert: bool) -> Value:
    """Return what identifies a row of an append-only log whose cursor does not land."""
    hashed = sql.SQL("({})").format(_hash((one.text for one in columns), convert))
    return Value("hash", hashed, "bigint", hashed, sql.SQL("{}::text").format(hashed))


def _hash(texts: Iterable[sql.Composable], convert: bool) -> sql.Composable:
    """Hash texts with their places; NULL is a value. Cheaper than to write the row as text."""
    form = 'coalesce(hashtextextended({} collate "C", {}), 0)'
    if convert:
        form = form.replace("{}", "encode(convert_to({}, 'UTF8'), 'escape')", 1)
    return sql.SQL(" # ").join(
        sql.SQL(form).format(one, sql.Literal(place)) for place, one in enumerate(texts, 1)
    )
