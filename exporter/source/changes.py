"""Changes of a slot, folded by key into chunks that end at commits.

Of several changes of a row within a chunk the last one counts, but for a table that keeps its
versions. A chunk is bounded in memory: a
source transaction that is larger comes in several, of which only the last one has a position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

from exporter.errors import SourceError
from exporter.source import pgoutput
from exporter.source.member import Member, refuse_unkeyed, unkeyed
from exporter.source.pgoutput import NULL, Fields, Relation
from exporter.source.versions import Commit, VersionLayout, Versions

CHUNK = 4 * 1024 * 1024  # bytes; one lands, one waits, one is gathered
_STEP = 64 * 1024 * 1024  # bytes of WAL after which a position is worth to be stored, without rows
# A staged row is new to raw; raw has it; raw has the rest of it; raw may have the rest; it is gone.
NEW, CHANGED, PATCH, PRESENT, REMOVE = b"nupid"
_OP = 6  # the place of it in a staged row


class Unsettled(Exception):  # noqa: N818  no error: the load copies the table again
    """A change keeps of its row what a copy of two moments cannot tell."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class Grown(Exception):  # noqa: N818  no error: the load looks at the table again
    """The changes have columns that the table did not have when it was looked at."""

    def __init__(self, columns: frozenset[tuple[str, str]]) -> None:
        super().__init__(columns)
        self.columns = columns


class Changes:
    """What has become of a table's rows: one row to stage for each key, in COPY's binary format.

    A staged row has what is to be done, the columns that stay as they are in raw as a text of 0
    and 1, the key under which raw has those, and raw's columns.
    """

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}
        self.emptied = False  # before these rows
        self.patches = False  # some rows are to be completed from raw

    def count(self) -> Counter[int]:
        """Return how many rows there are of each kind."""
        return Counter(map(itemgetter(_OP), self.rows.values()))


class Chunk(NamedTuple):
    """Changes by their definition's key. Without a ``position`` it ends amid a transaction.

    ``commit`` is the last one so far, as ``pgoutput.commit_of`` tells it.
    """

    changes: dict[str, Changes | Versions]
    position: int | None
    last: bool
    commit: bytes | None


class _Layout:
    """How the rows of one description become staged rows."""

    def __init__(self, member: Member, relation: Relation) -> None:
        at = {name: place for place, name in enumerate(relation.columns)}
        self.unkeyed = unkeyed(member, relation)
        self.member = member
        self.oid = member.oid
        self.snapshot = member.snapshot
        self.key_places = [at.get(name, -1) for name in member.keys]
        self.places = [None if name is None else at.get(name, -1) for name in member.columns]
        self.lacks = -1 in self.places  # columns that are newer than these changes
        self.plain = self.places == list(range(len(relation.columns)))
        count = len(member.keys)
        self._head = (2 + count + len(self.places)).to_bytes(2, "big")
        self._no_key = NULL * count
        self.new = self._whole(NEW)
        self.changed = self._whole(CHANGED)
        # where the key's columns are in a staged row
        self._staged_keys = {member.columns.index(name): at.get(name, -1) for name in member.keys}

    def gathered(self) -> Changes:
        """Return what the table's changes are gathered in."""
        return Changes()

    def key(self, fields: Fields) -> bytes:
        """Return what tells the row apart."""
        return b"".join([fields[place] or NULL for place in self.key_places])

    def chosen(self, fields: Fields) -> Fields:
        """Return raw's columns of a row; None for those that are not known here."""
        if self.plain:
            return fields
        return [
            NULL if place is None else None if place < 0 else fields[place] for place in self.places
        ]

    def _whole(self, op: int) -> bytes:
        """Return what stands before all columns of a row."""
        return self._op(op) + NULL + self._no_key

    def _op(self, op: int) -> bytes:
        return self._head + b"\0\0\0\1" + bytes([op])

    def staged(self, op: int, fields: Sequence[bytes | None], under: bytes) -> bytes:
        """Return a row that is to be completed with what raw has ``under`` a key."""
        kept = "".join("1" if field is None else "0" for field in fields).encode()
        row = b"".join([NULL if field is None else field for field in fields])
        size = len(kept).to_bytes(4, "big")
        return self._op(op) + size + kept + under + row

    def removal(self, fields: Fields) -> bytes:
        """Return the row that removes this one."""
        row = [NULL] * len(self.places)
        for staged, place in self._staged_keys.items():
            value = fields[place]
            if value is None or value == NULL:
                refuse_unkeyed(self.member.key, self.member.keys)
            row[staged] = value
        return self._whole(REMOVE) + b"".join(row)

    def parsed(self, row: bytes) -> tuple[int, Fields, bytes]:
        """Return what a staged row does, its columns, and the key under which raw has the rest."""
        fields: list[bytes] = []
        place = 2
        while place < len(row):
            size = row[place : place + 4]
            end = place + 4 + (0 if size == NULL else int.from_bytes(size, "big"))
            fields.append(row[place:end])
            place = end
        count = len(self.key_places)
        op, kept, under, values = (
            row[_OP],
            fields[1][4:],
            fields[2 : 2 + count],
            fields[2 + count :],
        )
        found: Fields = [*values]
        for number, mark in enumerate(kept):
            if mark == ord("1"):
                found[number] = None
        return op, found, b"".join(under)


class Gatherer:
    """Turns a slot's messages into chunks, up to the position ``end``."""

    def __init__(
        self,
        members: Sequence[Member],
        begin: int,
        end: int,
        gone: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        """``gone`` are columns, by the table's key, that the changes may have and no table has."""
        self._gone = gone
        self._members = members  # several may be of one table
        self._end = end
        self._stored = begin
        self._layouts: dict[int, list[_Layout | VersionLayout]] = {}
        self._changes: dict[str, Changes | Versions] = {}
        self._size = 0
        self._transaction: Commit
        self._commit: bytes | None = None

    def chunks(self, messages: Iterator[bytes | int]) -> Iterator[Chunk]:
        """Yield chunks, the last one with a position at or behind the end. Raises SourceError."""
        position, within = self._stored, False
        for message in messages:
            if isinstance(message, int):
                if within:
                    continue
                position = max(position, message)
                if position >= self._end:
                    yield self._cut(position, last=True)
                    return
                if position - self._stored >= _STEP:
                    self._stored = position
                    yield self._cut(position)
                continue
            kind = message[0]
            if kind == pgoutput.BEGIN:
                self._transaction, within = Commit(message), True
            elif kind == pgoutput.COMMIT:
                within, position = False, max(position, pgoutput.committed(message))
                self._commit = pgoutput.commit_of(message)
                if position >= self._end:
                    yield self._cut(position, last=True)
                    return
                if self._size >= CHUNK:
                    self._stored = position
                    yield self._cut(position)
            else:
                self._take(kind, message)
                if self._size >= CHUNK + CHUNK // 4:  # most transactions end before
                    yield self._cut(None)

    def _cut(self, position: int | None, *, last: bool = False) -> Chunk:
        changes, self._changes, self._size = self._changes, {}, 0
        return Chunk(changes, position, last, self._commit)

    def _take(self, kind: int, message: bytes) -> None:
        if kind == pgoutput.RELATION:
            found = pgoutput.relation(message)
            self._layouts[found.oid] = [
                self._layout(member, found) for member in self._members if member.oid == found.oid
            ]
        elif kind == pgoutput.TRUNCATE:
            for oid in pgoutput.truncated(message):
                for layout in self._layouts.get(oid, ()):
                    self._land(layout, kind, message)
        elif kind in (pgoutput.INSERT, pgoutput.UPDATE, pgoutput.DELETE):
            for layout in self._layouts[pgoutput.oid_of(message)]:
                self._land(layout, kind, message)

    def _layout(self, member: Member, found: Relation) -> _Layout | VersionLayout:
        names = frozenset((member.key, name) for name in {*found.columns} - member.known)
        if names - self._gone:
            raise Grown(names)
        return _Layout(member, found) if member.near is None else VersionLayout(member, found)

    def _land(self, layout: _Layout | VersionLayout, kind: int, message: bytes) -> None:
        if layout.snapshot is not None and layout.snapshot.shows(self._transaction.xid):
            return
        if layout.unkeyed and kind != pgoutput.TRUNCATE:
            refuse_unkeyed(layout.member.key, layout.unkeyed)
        changes = self._changes.get(layout.member.key)
        if changes is None:
            changes = self._changes[layout.member.key] = layout.gathered()
        self._size += len(message) + 100  # Python's own
        if isinstance(layout, VersionLayout):
            assert isinstance(changes, Versions)
            self._size += 100
            layout.take(changes, kind, message, self._transaction)
            return
        assert isinstance(changes, Changes)
        if kind == pgoutput.INSERT:
            self._insert(layout, changes, pgoutput.inserted(message))
        elif kind == pgoutput.UPDATE:
            self._update(layout, changes, *pgoutput.updated(message))
        elif kind == pgoutput.DELETE:
            old = pgoutput.deleted(message)
            changes.rows[layout.key(old)] = layout.removal(old)
        else:
            self._changes[layout.member.key] = emptied = Changes()
            emptied.emptied = True

    def _insert(self, layout: _Layout, changes: Changes, row: Fields) -> None:
        key, chosen, rows = layout.key(row), layout.chosen(row), changes.rows
        if not layout.lacks:
            head = layout.changed if key in rows else layout.new
            rows[key] = head + b"".join(chosen)  # type: ignore[arg-type]
            return
        # Copied after this change, raw may have the row with the columns that these changes lack.
        if key in rows or changes.emptied:
            rows[key] = layout.changed + b"".join([field or NULL for field in chosen])
        else:
            rows[key] = layout.staged(PRESENT, chosen, key)
            changes.patches = True

    def _update(self, layout: _Layout, changes: Changes, old: Fields | None, row: Fields) -> None:
        if old is not None:  # a key that is stored apart comes with the old row alone
            for place in layout.key_places:
                row[place] = old[place] if row[place] is None else row[place]
        key = layout.key(row)
        before = key if old is None else layout.key(old)
        chosen = layout.chosen(row)
        rows = changes.rows
        earlier = rows.get(before)
        op, under = PATCH, before
        if None in chosen and earlier is not None:
            done, values, was_under = layout.parsed(earlier)
            if done == REMOVE:
                raise SourceError(f"{layout.member.key}: the slot updates a row that it removed")
            chosen = [
                mine if mine is not None else theirs
                for mine, theirs in zip(chosen, values, strict=True)
            ]
            op, under = done, was_under
        if before != key:
            rows[before] = layout.removal(old)  # type: ignore[arg-type]
            is_new = key not in rows
        else:
            is_new = earlier is not None and earlier[_OP] == NEW
        if None in chosen:
            if before != key and layout.member.resumed:  # raw may have another row under it by now
                raise Unsettled(layout.member.key)
            rows[key] = layout.staged(op, chosen, under)
            changes.patches = True
        else:
            head = layout.new if is_new else layout.changed
            rows[key] = head + b"".join(chosen)  # type: ignore[arg-type]
