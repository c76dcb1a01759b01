"""Changes of a slot as versions of rows, each of which is kept: nothing is folded.

A version says where it stands: behind all versions of earlier commits, and among those of its own
transaction by its number.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from exporter.errors import SourceError
from exporter.source import pgoutput
from exporter.source.member import Member, unkeyed, whole_xid
from exporter.source.pgoutput import NULL, Fields, Relation
from exporter.source.table import Column

OP, LSN, SEQ, AT, XID = "_op", "_lsn", "_seq", "_committed_at", "_xid"
OWN = (OP, LSN, SEQ, AT, XID)
ORDER = (LSN, SEQ)  # of the versions of one key
COPY, INSERT, UPDATE, DELETE = "copy", "insert", "update", "delete"
EPOCH = datetime(2000, 1, 1)  # PostgreSQL's own, in UTC
_TYPES = {
    OP: "text",
    LSN: "pg_lsn",
    SEQ: "bigint",
    AT: "timestamp with time zone",
    XID: "bigint",
}
ABOUT = {  # for dbt docs
    OP: "What made this version: `insert`, `update`, `delete`, or `copy`, a copy of the table.",
    LSN: "Where the transaction was committed in the source's WAL.",
    SEQ: "The number of the version among those of its transaction.",
    AT: "When the transaction was committed; of a copy, when it was made.",
    XID: "The transaction's id; of a copy, none.",
}


def own_columns(lsn: str, clock: str) -> tuple[Column, ...]:
    """Return the columns that a history has beside the source's, as its copied rows have them.

    The copy stands at a position behind all versions that raw has, and before all that follow.
    """
    values = {OP: f"'{COPY}'", LSN: f"'{lsn}'", SEQ: "0", AT: f"'{clock}'", XID: "null"}
    return tuple(
        Column(name, kind, kind, kind, False, True, expression=f"{values[name]}::{kind}")
        for name, kind in _TYPES.items()
    )


class Commit:
    """A transaction of the stream. It numbers its versions, across all tables."""

    def __init__(self, message: bytes) -> None:
        self.lsn, self._micros, self.xid = pgoutput.begins(message)
        self._seq = 0
        self._texts: tuple[bytes, bytes] | None = None

    def next(self, near: int) -> bytes:
        """Return the columns LSN to XID of its next version, staged.

        ``near`` is a transaction id, all 64 bits of it, not far from this one.
        """
        if self._texts is None:
            at = EPOCH + timedelta(microseconds=self._micros)
            lsn = f"{self.lsn >> 32:X}/{self.lsn & 0xFFFFFFFF:X}"
            xid = _field(str(whole_xid(self.xid, near)))
            self._texts = _field(lsn), _field(f"{at.isoformat(' ', 'microseconds')}+00") + xid
        self._seq += 1
        return _field(str(self._seq)).join(self._texts)


class Part(NamedTuple):
    """Versions in their order. ``emptied``: what stands before them is a TRUNCATE, as staged."""

    emptied: bytes | None
    rows: list[bytes]


class Versions:
    """What has become of a table's rows: a staged row for each version, in COPY's binary format.

    A staged row has what was done, the columns that are as they were in the version before as a
    text of 0 and 1, the key under which raw has that, where it stands, and raw's columns.
    """

    def __init__(self) -> None:
        self.parts = [Part(None, [])]
        self.patches = False  # some rows are to be completed from raw
        self.removals = 0
        self.emptied_by: int | None = None  # the transaction of the last TRUNCATE
        self.newest: dict[bytes, bytes] = {}  # of the last part, by key

    def add(self, key: bytes, row: bytes) -> None:
        """Append a version."""
        self.parts[-1].rows.append(row)
        self.newest[key] = row


class VersionLayout:
    """How the rows of one description become staged versions."""

    OVERHEAD = 200  # Python's own

    def __init__(self, member: Member, relation: Relation) -> None:
        at = {name: place for place, name in enumerate(relation.columns)}
        assert member.near is not None
        self.member = member
        self.snapshot = member.snapshot
        self._near = member.near
        self.unkeyed = unkeyed(member, relation)
        self._keys = [at.get(name, -1) for name in member.keys]
        # A column that these changes do not have was not there when they were made.
        self._places = [at.get(name, -1) if name else -1 for name in member.columns]
        self._own = 2 + len(self._keys) + len(ORDER) + 2  # staged columns before raw's
        self._head = (self._own + len(self._places)).to_bytes(2, "big")

    def gathered(self) -> Versions:
        """Return what the table's changes are gathered in."""
        return Versions()

    def take(self, versions: Versions, kind: int, message: bytes, commit: Commit) -> None:
        """Append the versions that a message makes. Raises SourceError."""
        if kind == pgoutput.TRUNCATE:
            versions.parts.append(Part(commit.next(self._near), []))
            versions.newest.clear()
            versions.emptied_by = whole_xid(commit.xid, self._near)
        elif kind == pgoutput.INSERT:
            self._add(versions, INSERT, pgoutput.inserted(message), commit)
        elif kind == pgoutput.DELETE:
            self._remove(versions, pgoutput.deleted(message), commit)
        else:
            self._update(versions, *pgoutput.updated(message), commit)

    def _update(self, versions: Versions, old: Fields | None, row: Fields, commit: Commit) -> None:
        before = self._key(row if old is None else old)
        self._add(versions, UPDATE, row, commit, before, old)

    def _add(
        self,
        versions: Versions,
        op: str,
        row: Fields,
        commit: Commit,
        before: bytes | None = None,
        old: Fields | None = None,
    ) -> None:
        """Append a version; what it lacks is in the one that has the key ``before``."""
        key = self._key(row)
        chosen = [NULL if place < 0 else row[place] for place in self._places]
        under = b""
        if None in chosen:
            under = before or key
            if earlier := versions.newest.get(under):
                chosen, under = self._completed(chosen, earlier)
        if old is not None and before is not None and before != key:
            self._remove(versions, old, commit)
        if None in chosen:
            versions.patches = True
        versions.add(key, self._staged(op, chosen, under, commit))

    def _remove(self, versions: Versions, old: Fields, commit: Commit) -> None:
        versions.removals += 1
        chosen: Fields = [NULL if place < 0 else old[place] or NULL for place in self._places]
        versions.add(self._key(old), self._staged(DELETE, chosen, b"", commit))

    def _key(self, fields: Fields) -> bytes:
        return b"".join([fields[place] or NULL for place in self._keys])

    def _staged(self, op: str, chosen: Fields, under: bytes, commit: Commit) -> bytes:
        kept = NULL
        if None in chosen:
            kept = _field("".join("1" if field is None else "0" for field in chosen))
        else:
            under = NULL * len(self._keys)
        row = [NULL if field is None else field for field in chosen]
        own = (self._head, _field(op), kept, under, commit.next(self._near))
        return b"".join((*own, *row))

    def _completed(self, chosen: Fields, earlier: bytes) -> tuple[Fields, bytes]:
        """Return the columns with those of an earlier version; and the key of what they lack."""
        fields = pgoutput.parts_of(earlier)
        if fields[0] == _field(DELETE):
            raise SourceError(f"{self.member.key}: the slot updates a row that it removed")
        kept = fields[1][4:]
        theirs: Fields = [*fields[self._own :]]
        for number, mark in enumerate(kept):
            if mark == ord("1"):
                theirs[number] = None
        mine = [
            their if field is None else field for field, their in zip(chosen, theirs, strict=True)
        ]
        return mine, b"".join(fields[2 : 2 + len(self._keys)])


def _field(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(4, "big") + data
