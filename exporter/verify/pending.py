"""Rows of raw whose changes the slot still holds: the next load lands them."""

from __future__ import annotations

import contextlib

from psycopg import sql

from exporter.raw.sides import COMMA, FALSE, TRUE, Comparison, key_names
from exporter.source import CopyReader, slots
from exporter.source.changes import Gatherer, Grown
from exporter.source.folded import Changes
from exporter.source.member import Member
from exporter.state import State
from exporter.state import slots as remembered
from exporter.state.slots import Slot
from exporter.wire import Block, connect, pour, replication
from exporter.wire.replication import lsn_number

_PENDING = sql.Identifier("_exporter_pending")
_BEGIN, _END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"


def pending(both: Comparison, reader: CopyReader, stored: State) -> sql.Composable:
    """Return the condition for rows of raw that changes wait for, behind the stored position.

    The slot is read, and nothing of it confirmed. Works in the running transactions of both, with a
    temporary table of keys at the destination. Raises psycopg.Error, DatabaseError and SourceError
    where the slot cannot be read.
    """
    destination, keys = both.raw.session, both.target.conflict_columns
    slot = remembered.of(destination, reader.found) if remembered.exist(destination) else None
    if slot is None or slot.lsn is None or stored.slot is None or stored.slot.until is None:
        return FALSE
    names = key_names(both.raw.keys)
    destination.execute(
        sql.SQL("create temp table {} ({}) on commit drop").format(
            _PENDING, COMMA.join(sql.SQL("{} text").format(name) for name in names)
        )
    )
    member = reader.member(stored, [reader.table.column(name) for name in keys])
    member = member._replace(near=None)  # of a history, too, the last version is looked at
    gone: frozenset[tuple[str, str]] = frozenset()
    while True:
        try:
            if not _keep_keys(both, slot, member, gone):
                return TRUE
            break
        except Grown as grown:  # columns that the table has lost since
            gone |= grown.columns
    return sql.SQL("({}) in (select {} from {})").format(
        COMMA.join(one.stored for one in both.raw.keys),
        COMMA.join(
            sql.SQL("{}::{}").format(name, sql.SQL(one.type))
            for name, one in zip(names, both.raw.keys, strict=True)
        ),
        _PENDING,
    )


def _keep_keys(
    both: Comparison, slot: Slot, member: Member, gone: frozenset[tuple[str, str]]
) -> bool:
    """Keep the keys of which there are changes; false where the table was emptied."""
    copy = sql.SQL("copy {} from stdin (format binary)").format(_PENDING)
    count = len(both.raw.keys).to_bytes(2, "big")
    with contextlib.closing(connect(both.source.session.variable, replication=True)) as session:
        begin, end = lsn_number(slot.lsn or "0/0"), slots.end_of_wal(session)
        gatherer = Gatherer([member], begin, end, gone)
        stream = replication.Slot(session, slot.name, slot.name, begin)
        following = replication.Following(stream, gatherer.chunks)
        try:
            for chunk in following:
                for changes in chunk.changes.values():
                    assert isinstance(changes, Changes)
                    if changes.emptied:
                        return False
                    found = changes.keys
                    data = b"".join([_BEGIN, *(count + key for key in found), _END])
                    pour(both.raw.session, copy, [Block(data, len(found), b"")])
            return True
        finally:
            following.stop(session)
