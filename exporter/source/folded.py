"""Changes of a slot, folded by key: of several changes of a row the last one counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import itemgetter

from exporter.errors import SourceError
from exporter.source import pgoutput
from exporter.source.member import Member, refuse_unkeyed, unkeyed
from exporter.source.pgoutput import NULL, Fields, Relation
from exporter.source.versions import Commit

# A staged row is new to raw; raw has it; raw has the rest of it; raw may have the rest; it is gone.
NEW, CHANGED, PATCH, PRESENT, REMOVE = b"nupid"
_OP = 6  # the place of it in a staged row


class Unsettled(Exception):  # noqa: N818  no error: the load copies the table again
    """A change keeps of its row what a copy of two moments cannot tell."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class Changes:
    """What has become of a table's rows: one row to stage for each key, in COPY's binary format.

    A staged row has what is to be done, the columns that stay as they are in raw as a text of 0
    and 1, the key under which raw has those, and raw's columns.
    """

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}
        self.emptied = False  # before these rows
        self.patches = False  # some rows are to be completed from raw

    def empty(self) -> None:
        """Forget what was before a TRUNCATE."""
        self.rows.clear()
        self.emptied, self.patches = True, False

    def count(self) -> Counter[int]:
        """Return how many rows there are of each kind."""
        return Counter(map(itemgetter(_OP), self.rows.values()))


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
        if kind == pgoutput.INSERT:
            self._insert(changes, pgoutput.inserted(message))
        elif kind == pgoutput.UPDATE:
            self._update(changes, *pgoutput.updated(message), commit.lsn)
        elif kind == pgoutput.DELETE:
            old = pgoutput.deleted(message)
            changes.rows[self.key(old)] = self.removal(old)
        else:
            changes.empty()

    def _insert(self, changes: Changes, row: Fields) -> None:
        key, chosen, rows = self.key(row), self.chosen(row), changes.rows
        if not self.lacks:
            head = self.changed if key in rows else self.new
            rows[key] = head + b"".join(chosen)  # type: ignore[arg-type]
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
        rows = changes.rows
        earlier = rows.get(before)
        op, under = PATCH, before
        if None in chosen and earlier is not None:
            done, values, was_under = self.parsed(earlier)
            if done == REMOVE:
                raise SourceError(f"{self.member.key}: the slot updates a row that it removed")
            chosen = [
                mine if mine is not None else theirs
                for mine, theirs in zip(chosen, values, strict=True)
            ]
            op, under = done, was_under
        if before != key:
            rows[before] = self.removal(old)  # type: ignore[arg-type]
            is_new = key not in rows
        else:
            is_new = earlier is not None and earlier[_OP] == NEW
        if None in chosen:
            # Raw may have another row under the key by now.
            if before != key and self.member.doubts(lsn):
                raise Unsettled(self.member.key)
            rows[key] = self.staged(op, chosen, under)
            changes.patches = True
        else:
            head = self.new if is_new else self.changed
            rows[key] = head + b"".join(chosen)  # type: ignore[arg-type]
