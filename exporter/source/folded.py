"""Changes of a slot, folded by key: of several changes of a row the last one counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import itemgetter

from exporter.errors import SourceError
from exporter.source import pgoutput
from exporter.source.member import Member, refuse_unkeyed, unkeyed
from exporter.source.pgoutput import NULL, ZEROS, Fields, Relation
from exporter.source.versions import Commit

# A staged row is new to raw; raw has it; raw has the rest of it; raw may have the rest; it is gone.
NEW, CHANGED, PATCH, PRESENT, REMOVE = b"nupid"
_OP = 6  # the place of it in a staged row


class Retyped(Exception):  # noqa: N818  no error: the load reads the changes as texts
    """Changes that come in binary are of a column that has another type now."""


class Unsettled(Exception):  # noqa: N818  no error: the load copies the table again
    """A change keeps of its row what a copy of two moments cannot tell."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class Changes:
    """What has become of a table's rows: one row for each key, in COPY's binary format.

    ``new`` has raw's columns of the rows that are new to raw. Another row has before them what is
    to be done, the columns that stay as they are in raw as a text of 0 and 1, and the key under
    which raw has those. No key is in both.
    """

    def __init__(self) -> None:
        self.new: dict[bytes, bytes] = {}
        self.rows: dict[bytes, bytes] = {}
        self.emptied = False  # before these rows
        self.patches = False  # some rows are to be completed from raw

    def empty(self) -> None:
        """Forget what was before a TRUNCATE."""
        self.new.clear()
        self.rows.clear()
        self.emptied, self.patches = True, False

    @property
    def keys(self) -> list[bytes]:
        """The keys of all rows, each its columns' fields."""
        return [*self.rows, *self.new]

    def count(self) -> Counter[int]:
        """Return how many rows there are of each kind."""
        count = Counter(map(itemgetter(_OP), self.rows.values()))
        count[NEW] = len(self.new)
        return count


class FoldedLayout:
    """How the rows of one description become staged rows."""

    OVERHEAD = 100  # Python's own

    def __init__(self, member: Member, relation: Relation) -> None:
        at = {name: place for place, name in enumerate(relation.columns)}
        self.unkeyed = unkeyed(member, relation)
        self.member = member
        self.snapshot = member.snapshot
        self.key_places = [at.get(name, -1) for name in member.keys]
        self.places = [None if name is None else at.get(name, -1) for name in member.columns]
        self.lacks = -1 in self.places  # columns that are newer than these changes
        self.plain = self.places == list(range(len(relation.columns)))
        self._kind = b"t" if member.types is None else b"b"
        self._aligned = max(self.key_places) + 1
        if member.types is not None:
            types = zip(relation.columns, relation.types, strict=True)
            if any(member.types.get(name, kind) != kind for name, kind in types):
                raise Retyped
        shape = len(member.keys), len(self.places)
        self.changed, self.removed = head_of(CHANGED, *shape), head_of(REMOVE, *shape)
        self._head = self.changed[:_OP]
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

    def staged(self, op: int, fields: Sequence[bytes | None], under: bytes) -> bytes:
        """Return a row that is to be completed with what raw has ``under`` a key."""
        kept = "".join("1" if field is None else "0" for field in fields).encode()
        row = b"".join([NULL if field is None else field for field in fields])
        size = len(kept).to_bytes(4, "big")
        return self._head + bytes([op]) + size + kept + under + row

    def removal(self, fields: Fields) -> bytes:
        """Return the row that removes this one."""
        row = [NULL] * len(self.places)
        for staged, place in self._staged_keys.items():
            value = fields[place]
            if value is None or value == NULL:
                refuse_unkeyed(self.member.key, self.member.keys)
            row[staged] = value
        return self.removed + b"".join(row)

    def parsed(self, row: bytes) -> tuple[int, Fields, bytes]:
        """Return what a staged row does, its columns, and the key under which raw has the rest."""
        fields = pgoutput.parts_of(row)
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

    def take(self, changes: Changes, kind: int, message: bytes, commit: Commit) -> None:
        """Fold in what a message tells. Raises SourceError, Unsettled."""
        if self.plain and (row := pgoutput.short(message, self._kind, self._aligned)):
            key = b"".join([ZEROS + row[at][: row[at][0] + 1] for at in self.key_places])
            is_new = key in changes.new if kind == pgoutput.UPDATE else key not in changes.rows
            self._put(changes, key, ZEROS + ZEROS.join(row), is_new=is_new)
        elif kind == pgoutput.INSERT:
            self._insert(changes, pgoutput.inserted(message))
        elif kind == pgoutput.UPDATE:
            self._update(changes, *pgoutput.updated(message), commit.lsn)
        elif kind == pgoutput.DELETE:
            self._remove(changes, pgoutput.deleted(message))
        else:
            changes.empty()

    def _remove(self, changes: Changes, old: Fields) -> None:
        key = self.key(old)
        changes.new.pop(key, None)
        changes.rows[key] = self.removal(old)

    def _insert(self, changes: Changes, row: Fields) -> None:
        key, chosen, rows = self.key(row), self.chosen(row), changes.rows
        if not self.lacks:
            columns = b"".join(chosen)  # type: ignore[arg-type]
            self._put(changes, key, columns, is_new=key not in rows)
            return
        # Copied after this change, raw may have the row with the columns that these changes lack.
        if key in rows or changes.emptied:
            rows[key] = self.changed + b"".join([field or NULL for field in chosen])
        else:
            rows[key] = self.staged(PRESENT, chosen, key)
            changes.patches = True

    def _update(self, changes: Changes, old: Fields | None, row: Fields, lsn: int) -> None:
        key = self.key(row)
        before = key if old is None else self.key(old)
        chosen = self.chosen(row)
        rows, new = changes.rows, changes.new
        op, under = PATCH, before
        if None in chosen and (earlier := self._earlier(changes, before)):
            done, values, was_under = earlier
            if done == REMOVE:
                raise SourceError(f"{self.member.key}: the slot updates a row that it removed")
            chosen = [
                mine if mine is not None else theirs
                for mine, theirs in zip(chosen, values, strict=True)
            ]
            op, under = done, was_under
        if before != key:
            self._remove(changes, old)  # type: ignore[arg-type]
            is_new = key not in rows
        else:
            is_new = key in new
        if None in chosen:
            # Raw may have another row under the key by now.
            if before != key and self.member.doubts(lsn):
                raise Unsettled(self.member.key)
            new.pop(key, None)
            rows[key] = self.staged(op, chosen, under)
            changes.patches = True
        else:
            columns = b"".join(chosen)  # type: ignore[arg-type]
            self._put(changes, key, columns, is_new=is_new)

    def _put(self, changes: Changes, key: bytes, columns: bytes, *, is_new: bool) -> None:
        if is_new:
            changes.new[key] = columns
        else:
            changes.rows[key] = self.changed + columns

    def _earlier(self, changes: Changes, key: bytes) -> tuple[int, Fields, bytes] | None:
        """Return what an earlier change has made of a row. See ``parsed``."""
        if (columns := changes.new.get(key)) is not None:
            return NEW, [*pgoutput.parts_of(columns, 0)], b""
        return self.parsed(row) if (row := changes.rows.get(key)) is not None else None


def head_of(op: int, keys: int, columns: int) -> bytes:
    """Return what stands before the columns of a row of which nothing is kept."""
    head = (2 + keys + columns).to_bytes(2, "big")
    return head + b"\0\0\0\1" + bytes([op]) + NULL + NULL * keys
