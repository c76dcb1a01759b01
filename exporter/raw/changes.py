"""Changes of rows into the raw table, each row once: by way of staging, or new rows by COPY."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice

import psycopg
from psycopg import sql

from exporter import state
from exporter.errors import DriftError, RowError
from exporter.raw import statements
from exporter.raw.landing import BY_INDEX
from exporter.raw.refused import find_refused, key_text, told, uncopied
from exporter.raw.table import DELETED, STAMP, RawTable
from exporter.source import Column
from exporter.source.folded import CHANGED, NEW, REMOVE, Changes, head_of
from exporter.source.versions import EPOCH
from exporter.wire import Block, Connection, find_operators, pour

_COMMA = sql.SQL(", ")
_AND = sql.SQL(" and ")
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"
_BLOCK = 500  # rows; all that are staged at once are a chunk


class Landed:
    """How many rows of raw were written, and how many removed or marked."""

    def __init__(self) -> None:
        self.read = self.written = self.deleted = self.size = 0
        self.emptied_by: int | None = None  # the transaction of a TRUNCATE, of a history


class Doubted(Exception):  # noqa: N818  no error: the load lands the changes with more care
    """Raw does not take changes as they are: somebody has written there, or it refuses a row."""


class ChangesStaging:
    """A temporary table for the changes of one raw table. Its rows go with each transaction.

    ``trusting``: a row that is new at the source is new to raw, which costs less to insert; and
    none is refused, so that no savepoint is needed to name it. ``binary``, which goes with it:
    values come in the binary form of raw's types, so that new rows can go into raw itself.
    """

    def __init__(
        self, destination: Connection, raw: RawTable, number: int, *, trusting: bool, binary: bool
    ) -> None:
        self._destination = destination
        self._raw = raw
        self._name = sql.Identifier(f"_exporter_changes_{number}")
        self._made = False
        self._trusting = trusting
        self._binary = binary
        self._apart = trusting and not raw.marked  # a marked row may be there again
        at = {column.name: place for place, column in enumerate(raw.columns)}
        self._keys = [(name, at[name]) for name in raw.target.conflict_columns]
        refuse_unfit(raw)

    def land(self, changes: Changes, stamp: str, *, settling: bool) -> Landed:
        """Land changes in the running transaction. Raises RowError, DriftError, Doubted.

        ``settling``: changes may be older than parts of the copy, which may lack their rows.
        """
        landed = Landed()
        destination = self._destination
        if not self._made:
            self._make()
        destination.execute(sql.SQL("truncate {}").format(self._name))
        if changes.emptied:
            landed.deleted += destination.execute(self._emptied(stamp)).rowcount
        count, apart = changes.count(), self._apart and not settling
        straight = apart and self._binary and self._raw.stamped
        try:
            landed.size = self._stage(changes, new=not straight)
            destination.execute(BY_INDEX if self._trusting else f"{BY_INDEX}; savepoint staged")
            if changes.patches:
                count[CHANGED] += self._complete(settling=settling)
            if count[REMOVE]:
                landed.deleted += destination.execute(self._removed(stamp)).rowcount
            if not apart:
                landed.written = self._execute(statements.changed, stamp, NEW, CHANGED)
            else:
                landed.written = self._update(count[CHANGED], stamp)
                if straight:
                    rows, size = self._copy(changes.new, stamp)
                    landed.written += rows
                    landed.size += size
                elif changes.new:
                    landed.written += self._execute(statements.inserted, stamp, NEW)
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if self._trusting:
                raise Doubted from None
            apply = functools.partial(self._try, stamp, settling=settling)
            raise refused(
                destination, self._raw, error, self._name, self._key_text, apply
            ) from None
        landed.read = len(changes.rows) + len(changes.new) - count[REMOVE]
        return landed

    def _stage(self, changes: Changes, *, new: bool) -> int:
        """Fill the temporary table, with the rows that are ``new`` or not; return the bytes."""
        head = head_of(NEW, len(self._keys), len(self._raw.columns))

        def staged() -> Iterator[bytes]:
            yield from changes.rows.values()
            if new:
                yield from map(head.__add__, changes.new.values())

        if not any(staged()):
            return 0
        copy = sql.SQL("copy {} ({}) from stdin (format binary)").format(
            self._name, _COMMA.join([*self._own, *self._columns])
        )
        try:
            return pour(self._destination, copy, blocks(staged()))[1]
        except psycopg.DataError as error:
            if self._binary:
                raise
            own = len(self._own)
            keys = {name: own + place for name, place in self._keys}
            raise uncopied_error(self._raw, self._raw.columns, error, staged(), keys) from None

    def _copy(self, new: Mapping[bytes, bytes], stamp: str) -> tuple[int, int]:
        """Copy new rows into raw itself; return how many, and the bytes."""
        if not new:
            return 0, 0
        micros = (state.moment(stamp) - EPOCH) // timedelta(microseconds=1)
        tail = b"\0\0\0\x08" + micros.to_bytes(8, "big")
        head = (len(self._raw.columns) + 1).to_bytes(2, "big")
        copy = statements.copy_statement(self._raw)
        return pour(self._destination, copy, blocks(new.values(), head, tail))

    def _try(self, stamp: str, *, settling: bool) -> None:
        """Land what is staged, to see whether it is refused."""
        self._complete(settling=settling)
        self._destination.execute(self._removed(stamp))
        self._execute(statements.changed, stamp, NEW, CHANGED)

    def _update(self, count: int, stamp: str) -> int:
        """Update the rows that raw has, of which so many are staged; return how many it did."""
        if not count:
            return 0
        written = self._execute(statements.updated, stamp, CHANGED)
        if written < count:  # some are as raw has them, or raw lacks some
            written += self._execute(statements.changed, stamp, CHANGED)
        return written

    # -- the statements

    @property
    def _own(self) -> list[sql.Identifier]:
        under = [sql.Identifier(f"_under_{place}") for place in range(len(self._keys))]
        return [sql.Identifier("_op"), sql.Identifier("_kept"), *under]

    @property
    def _columns(self) -> list[sql.Identifier]:
        return [sql.Identifier(f"_{place}") for place in range(len(self._raw.columns))]

    def _make(self) -> None:
        raw = self._raw
        kinds = [column.raw_type for column in raw.columns if column.name in dict(self._keys)]
        find_operators(self._destination, kinds)
        types = ["text" if not self._binary else column.raw_type for column in raw.columns]
        own = ["text", "text", *(types[place] for _, place in self._keys)]
        columns = [
            sql.SQL("{} {}").format(name, sql.SQL(kind))
            for name, kind in zip([*self._own, *self._columns], [*own, *types], strict=True)
        ]
        self._destination.execute(
            sql.SQL("create temp table {} ({}) on commit delete rows").format(
                self._name, _COMMA.join(columns)
            )
        )
        self._made = True

    def _typed(self, place: int) -> sql.Composable:
        """Return a staged value in its type."""
        kind = self._raw.columns[place].raw_type
        return sql.SQL("s.{}::{}").format(sql.Identifier(f"_{place}"), sql.SQL(kind))

    def _same_key(self, row: str) -> sql.Composable:
        return _AND.join(
            sql.SQL("{}.{} = {}").format(sql.SQL(row), sql.Identifier(name), self._typed(place))
            for name, place in self._keys
        )

    @property
    def _key_text(self) -> sql.Composable:
        """A staged row's key, for people."""
        return key_text({name: sql.Identifier(f"_{place}") for name, place in self._keys})

    def _emptied(self, stamp: str) -> sql.Composed:
        return statements.mark_or_delete(self._raw, sql.SQL("true"), stamp)

    def _removed(self, stamp: str) -> sql.Composed:
        raw = self._raw
        removed = sql.SQL("s._op = 'd' and {}").format(self._same_key("r"))
        if raw.target.deletes != "mark":
            return sql.SQL("delete from {} r using {} s where {}").format(
                raw.name, self._name, removed
            )
        marks = [DELETED, *([STAMP] if raw.stamped else [])]
        return sql.SQL("update {} r set {} from {} s where {} and r.{} is null").format(
            raw.name,
            _COMMA.join(
                sql.SQL("{} = {}::timestamptz").format(sql.Identifier(name), sql.Literal(stamp))
                for name in marks
            ),
            self._name,
            removed,
            sql.Identifier(DELETED),
        )

    def _execute(
        self,
        statement: Callable[[RawTable, str, sql.Composable], sql.Composed],
        stamp: str,
        *kinds: int,
    ) -> int:
        """Land the rows of these kinds by a statement; return how many were written."""
        typed = [
            sql.SQL("{} as {}").format(self._typed(place), sql.Identifier(column.name))
            for place, column in enumerate(self._raw.columns)
        ]
        # In the key's order: neighbours are found in the pages of the row before, and a cast that
        # stands below a sort is computed once.
        rows = sql.SQL("(select {} from {} s where s._op in ({}) order by {}) s").format(
            _COMMA.join(typed),
            self._name,
            _COMMA.join(sql.Literal(chr(kind)) for kind in kinds),
            _COMMA.join(self._typed(place) for _, place in self._keys),
        )
        return self._destination.execute(statement(self._raw, stamp, rows)).rowcount

    def _complete(self, *, settling: bool) -> int:
        """Take from raw what staged rows keep of it; return how many rows are complete now.

        Raises DriftError where raw has no such row.
        """
        raw = self._raw
        taken = [
            sql.SQL(
                "{0} = case when substr(s._kept, {1}, 1) = '1' then r.{2}::{3} else s.{0} end"
            ).format(
                sql.Identifier(f"_{place}"),
                sql.Literal(place + 1),
                sql.Identifier(column.name),
                sql.SQL(column.raw_type if self._binary else "text"),
            )
            for place, column in enumerate(raw.columns)
        ]
        under = _AND.join(
            sql.SQL("r.{} = s.{}::{}").format(
                sql.Identifier(name),
                sql.Identifier(f"_under_{number}"),
                sql.SQL(raw.columns[place].raw_type),
            )
            for number, (name, place) in enumerate(self._keys)
        )
        execute = self._destination.execute
        count = execute(
            sql.SQL(
                "update {} s set _op = 'u', {} from {} r where s._op in ('p', 'i') and {}"
            ).format(self._name, _COMMA.join(taken), raw.name, under)
        ).rowcount
        # The rest of the columns is newer than the row.
        rest = sql.SQL("update {} set _op = 'u' where _op = 'i'").format(self._name)
        count += execute(rest).rowcount
        if settling:  # the copy was made later, when the row was gone: its removal follows
            execute(sql.SQL("delete from {} where _op = 'p'").format(self._name))
            return count
        row = execute(
            sql.SQL("select {} from {} s where _op = 'p' limit 1").format(
                self._key_text, self._name
            )
        ).fetchone()
        if row:
            raise DriftError(
                f"{raw.target.key}: raw lacks row {row[0]}, of which a part has changed at the"
                " source: somebody has removed it there",
                hint=f"exporter load {raw.target.key} --full-refresh",
            )
        return count


def refuse_unfit(raw: RawTable) -> None:
    """Raise DriftError for a raw table that cannot take changes."""
    narrow = ", ".join(raw.narrow)
    if narrow or raw.on_citus:
        why = f"its {narrow} is narrower than the source's" if narrow else "it is on Citus"
        raise DriftError(
            f"{raw.target.key}: {raw.target} cannot take changes: {why}",
            hint="widen it; or exporter.source.read: scan",
        )


def refused(
    destination: Connection,
    raw: RawTable,
    error: psycopg.Error,
    staging: sql.Identifier,
    key: sql.Composable,
    apply: Callable[[], object],
) -> RowError:
    """Return the error for a change that the destination does not take, found by its key.

    The changes are as they were at the savepoint ``staged``; ``apply`` lands them.
    """
    destination.execute("rollback to staged")
    row = find_refused(destination, staging, key, apply)
    return _error(raw, error, row, error.diag.column_name)


def uncopied_error(
    raw: RawTable,
    columns: Sequence[Column],
    error: psycopg.Error,
    staged: Iterable[bytes],
    keys: Mapping[str, int],
) -> RowError:
    """Return the error for a change that could not be staged. See ``uncopied``."""
    row, place = uncopied(error, staged, keys)
    return _error(raw, error, row, None if place is None else columns[place].name)


def _error(raw: RawTable, error: psycopg.Error, row: str, column: str | None) -> RowError:
    what = f", column {column}" if column else ""
    correct = f"correct {raw.target} at the destination"
    if isinstance(error, psycopg.errors.UntranslatableCharacter):
        correct = "use a destination database whose encoding is UTF8"
    return RowError(
        f"{raw.target.key}: the change of row {row}{what} is refused: {told(error)}",
        hint=f"{correct}, then run exporter load {raw.target.key} again: it goes on before this"
        " change",
    )


def blocks(rows: Iterable[bytes], head: bytes = b"", tail: bytes = b"") -> Iterator[Block]:
    """Yield rows, each between ``head`` and ``tail``, in COPY's binary format."""
    yield Block(_HEADER, 0, b"")
    rows, between = iter(rows), tail + head
    while some := [*islice(rows, _BLOCK)]:
        yield Block(head + between.join(some) + tail, 0, b"")
    yield Block(_TRAILER, 0, b"")
