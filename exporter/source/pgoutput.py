"""The messages of PostgreSQL's plugin ``pgoutput``, protocol 1, taken apart.

A field stays what it was on the wire, its length and its text, or its binary form: in COPY's binary
format it looks the same. So nothing is escaped or parsed here, and SQL casts a text.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

BEGIN, COMMIT, RELATION, INSERT, UPDATE, DELETE, TRUNCATE = b"BCRIUDT"
NULL = b"\xff\xff\xff\xff"
ZEROS = b"\0\0\0"
Fields = list[bytes | None]  # None: a value that is stored apart, and has not changed

_NEW, _NULL, _UNCHANGED = b"Nnu"
_field = Struct(">BI").unpack_from
_begin = Struct(">QqI").unpack_from
_commit = Struct(">BQQ").unpack_from
_VALUES = 8  # bytes before a new row's
_IS_IDENTITY = 1
_OF_COLUMN = 8  # bytes: the type and its modifier


class Relation(NamedTuple):
    """A table as the changes that follow have it."""

    oid: int
    schema: str
    name: str
    identity: str  # pg_class.relreplident
    columns: tuple[str, ...]
    types: tuple[int, ...]
    told: frozenset[str]  # columns that an old row has; none of a table without an identity


def begins(message: bytes) -> tuple[int, int, int]:
    """Return the commit's place in the WAL, its time in µs since 2000, 32 bits of the id."""
    lsn, at, xid = _begin(message, 1)
    return int(lsn), int(at), int(xid)


def committed(message: bytes) -> int:
    """Return the position behind the commit."""
    return int(_commit(message, 1)[2])


def commit_of(message: bytes) -> bytes:
    """Return what tells a commit apart: the position behind it, and its time."""
    return message[10:26]


def oid_of(message: bytes) -> bytes:
    """Return the table of an insert, update, delete or description."""
    return message[1:5]


def relation(message: bytes) -> Relation:
    """Return the description of a table."""
    schema, end = _text(message, 5)
    name, end = _text(message, end)
    identity = chr(message[end])
    count = int.from_bytes(message[end + 1 : end + 3], "big")
    place, columns, types, told = end + 3, [], [], []
    for _ in range(count):
        flags = message[place]
        column, place = _text(message, place + 1)
        columns.append(column)
        types.append(int.from_bytes(message[place : place + 4], "big"))
        told += [column] if flags & _IS_IDENTITY else []
        place += _OF_COLUMN
    # pg_catalog's name is sent as an empty one
    schema = schema or "pg_catalog"
    oid = int.from_bytes(oid_of(message), "big")
    return Relation(oid, schema, name, identity, tuple(columns), tuple(types), frozenset(told))


def _text(message: bytes, place: int) -> tuple[str, int]:
    end = message.index(b"\0", place)
    return message[place:end].decode(), end + 1


def truncated(message: bytes) -> list[bytes]:
    """Return the tables that were emptied."""
    return [message[place : place + 4] for place in range(6, len(message), 4)]


def inserted(message: bytes) -> Fields:
    """Return the new row."""
    return _fields(message, 6)[0]


def deleted(message: bytes) -> Fields:
    """Return the old row, or its identity with NULL for the other columns."""
    return _fields(message, 6)[0]


def updated(message: bytes) -> tuple[Fields | None, Fields]:
    """Return the old row, or its identity where that has changed; and the new row."""
    if message[5] == _NEW:
        return None, _fields(message, 6)[0]
    old, place = _fields(message, 6)
    new = _fields(message, place + 1)[0]
    if None in new:
        # The old row has what did not change where it is told: that is never NULL. Whether it is
        # whole, a partition decides for itself, and the description of its table does not tell.
        pairs = zip(new, old, strict=True)
        new = [theirs if mine is None and theirs != NULL else mine for mine, theirs in pairs]
    return old, new


def short(message: bytes, kind: bytes, aligned: int) -> list[bytes] | None:
    """Return a new row whose values are all of this kind, and short; None for another one.

    The parts are its values, each without the three zero bytes that its length begins with, and
    with the NULLs that follow; of the first columns, ``aligned`` of them, none but the last may
    have a NULL behind it. One call splits the message where ``kind`` and those bytes stand, which
    costs half of taking its fields one by one; that each part is as long as its first byte says
    proves that they stood nowhere else.
    """
    parts = message.split(kind + ZEROS)
    head = parts.pop(0)
    if len(head) != _VALUES or head[5] != _NEW:
        return None
    count = len(parts)
    for place, part in enumerate(parts, 1):
        if len(part) - part[0] != 1:
            nulls = len(part) - part[0] - 1
            if nulls < 0 or place < aligned or part[-nulls:] != b"n" * nulls:
                return None
            parts[place - 1] = part[:-nulls] + NULL * nulls
            count += nulls
    return parts if count == head[6] << 8 | head[7] else None


def parts_of(staged: bytes, place: int = 2) -> list[bytes]:
    """Return the fields of a row in COPY's binary format, each with its length before it.

    The first one is at ``place``: behind their number.
    """
    parts: list[bytes] = []
    while place < len(staged):
        size = staged[place : place + 4]
        end = place + 4 + (0 if size == NULL else int.from_bytes(size, "big"))
        parts.append(staged[place:end])
        place = end
    return parts


def _fields(message: bytes, place: int) -> tuple[Fields, int]:
    fields: Fields = []
    append = fields.append
    count = message[place] << 8 | message[place + 1]
    place += 2
    message += NULL  # so that a kind can be read with the length that follows most
    for _ in range(count):
        kind, size = _field(message, place)
        if kind == _NULL:
            append(NULL)
            place += 1
        elif kind == _UNCHANGED:
            append(None)
            place += 1
        else:
            end = place + 5 + size
            append(message[place + 1 : end])
            place = end
    return fields, place
