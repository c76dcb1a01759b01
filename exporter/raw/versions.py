"""Versions of rows into a history: staged as texts, cast by SQL, completed from what is there."""

from __future__ import annotations

import functools

import psycopg
from psycopg import sql

from exporter.errors import DriftError
from exporter.raw.changes import Doubted, Landed, blocks, refuse_unfit, refused, uncopied_error
from exporter.raw.history import in_order, insert, newest
from exporter.raw.landing import BY_INDEX
from exporter.raw.refused import key_text
from exporter.raw.table import RawTable
from exporter.source.versions import AT, DELETE, LSN, OP, OWN, SEQ, XID, Part, Versions
from exporter.wire import Connection, find_operators, pour

_COMMA = sql.SQL(", ")
_AND = sql.SQL(" and ")
_STANDS = (LSN, SEQ, AT, XID)  # where a version stands, as it is staged


class HistoryStaging:
    """A temporary table for the versions of one raw table. Its rows go with each transaction.

    ``trusting``: raw takes every version, so that no savepoint is needed to name one.
    """

    def __init__(
        self, destination: Connection, raw: RawTable, number: int, *, trusting: bool
    ) -> None:
        self._trusting = trusting
        refuse_unfit(raw)
        self._destination = destination
        self._raw = raw
        self._name = sql.Identifier(f"_exporter_changes_{number}")
        self._made = False
        self._columns = [column for column in raw.columns if column.name not in OWN]
        self._types = {column.name: sql.SQL(column.raw_type) for column in raw.columns}
        self._places = {one.name: sql.Identifier(f"_{n}") for n, one in enumerate(self._columns)}
        self._under = [sql.Identifier(f"_under_{n}") for n in range(len(raw.key))]

    def land(self, changes: Versions, stamp: str, *, settling: bool) -> Landed:
        """Append versions in the running transaction. Raises RowError, DriftError, Doubted."""
        del settling  # a history's copy is of one moment: what follows fits it
        landed = Landed()
        if not self._made:
            self._make()
        for part in changes.parts:
            if part.emptied is not None:
                landed.deleted += self._emptied(part.emptied, stamp)
            if part.rows:
                self._fill(part, landed)
                if changes.patches:
                    self._destination.execute(BY_INDEX)
                    self._refuse_unknown()
                landed.written += self._append(stamp)
        landed.written -= changes.removals
        landed.read = sum(len(part.rows) for part in changes.parts) - changes.removals
        landed.deleted += changes.removals
        landed.emptied_by = changes.emptied_by
        return landed

    def _append(self, stamp: str) -> int:
        destination, statement = self._destination, self._appended(stamp)
        if not self._trusting:
            destination.execute("savepoint staged")
        try:
            return destination.execute(statement).rowcount
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if self._trusting:
                raise Doubted from None
            apply = functools.partial(destination.execute, statement)
            key = self._key_text
            raise refused(destination, self._raw, error, self._name, key, apply) from None

    # -- the statements

    @property
    def _key_text(self) -> sql.Composable:
        return key_text({name: self._places[name] for name in self._raw.target.conflict_columns})

    def _make(self) -> None:
        keys = self._raw.target.conflict_columns
        find_operators(self._destination, [c.raw_type for c in self._columns if c.name in keys])
        self._destination.execute(
            sql.SQL("create temp table {} ({}) on commit delete rows").format(
                self._name, _COMMA.join(sql.SQL("{} text").format(one) for one in self._staged)
            )
        )
        self._made = True

    @property
    def _staged(self) -> list[sql.Identifier]:
        own = [sql.Identifier(OP), sql.Identifier("_kept"), *self._under]
        return [*own, *map(sql.Identifier, _STANDS), *self._places.values()]

    def _fill(self, part: Part, landed: Landed) -> None:
        destination = self._destination
        destination.execute(sql.SQL("truncate {}").format(self._name))
        copy = sql.SQL("copy {} ({}) from stdin (format binary)").format(
            self._name, _COMMA.join(self._staged)
        )
        try:
            landed.size += pour(destination, copy, blocks(part.rows))[1]
        except psycopg.DataError as error:
            own, names = len(self._staged) - len(self._columns), [*self._places]
            keys = {key: own + names.index(key) for key in self._raw.target.conflict_columns}
            raise uncopied_error(self._raw, self._columns, error, part.rows, keys) from None

    @property
    def _before(self) -> sql.Composed:
        """The query for the version that has what the staged row ``s`` keeps."""
        under = _AND.join(
            sql.SQL("r.{} = s.{}::{}").format(sql.Identifier(name), staged, self._types[name])
            for name, staged in zip(self._raw.target.conflict_columns, self._under, strict=True)
        )
        return sql.SQL(
            "select * from {} r where s._kept is not null and {} order by {} limit 1"
        ).format(self._raw.name, under, in_order(self._raw.key))

    def _refuse_unknown(self) -> None:
        """Raise DriftError where raw does not have the version that a staged row keeps some of."""
        raw = self._raw
        row = self._destination.execute(
            sql.SQL(
                "select {key} from {staged} s where s._kept is not null"
                " and coalesce((select b._op from ({before}) b), {gone}) = {gone} limit 1"
            ).format(
                key=self._key_text, staged=self._name, before=self._before, gone=sql.Literal(DELETE)
            )
        ).fetchone()
        if row:
            raise DriftError(
                f"{raw.target.key}: the history lacks the version before of row {row[0]}, of which"
                " a part has changed at the source: somebody has removed it",
                hint=f"exporter load {raw.target.key} --full-refresh copies what differs from the"
                " newest versions, and goes on behind it",
            )

    def _appended(self, stamp: str) -> sql.Composed:
        values: list[sql.Composable] = [
            sql.SQL("case when substr(s._kept, {}, 1) = '1' then b.{} else s.{}::{} end").format(
                sql.Literal(number),
                sql.Identifier(name),
                staged,
                self._types[name],
            )
            for number, (name, staged) in enumerate(self._places.items(), 1)
        ]
        values.append(sql.Identifier("s", OP))
        values += [
            sql.SQL("s.{}::{}").format(sql.Identifier(name), self._types[name]) for name in _STANDS
        ]
        names = [*self._places, OP, *_STANDS]
        return insert(self._raw, names, values, stamp) + sql.SQL(
            " from {} s left join lateral ({}) b on true"
        ).format(self._name, self._before)

    def _emptied(self, stands: bytes, stamp: str) -> int:
        """Append a ``delete`` of every row that is there; return how many."""
        place, texts = 0, []
        while place < len(stands):
            end = place + 4 + int.from_bytes(stands[place : place + 4], "big")
            texts.append(stands[place + 4 : end].decode())
            place = end
        values: list[sql.Composable] = [sql.SQL("c.") + name for name in self._raw.key]
        values.append(sql.Literal(DELETE))
        values += [
            sql.SQL("{}::{}").format(sql.Literal(text), self._types[name])
            for name, text in zip(_STANDS, texts, strict=True)
        ]
        names = [*self._raw.target.conflict_columns, OP, *_STANDS]
        statement = insert(self._raw, names, values, stamp) + sql.SQL(" from {} c").format(
            newest(self._raw.name, self._raw.key)
        )
        return self._destination.execute(statement).rowcount
