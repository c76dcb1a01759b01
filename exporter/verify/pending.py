"""Rows of raw whose changes the slot still holds: the next load lands them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from psycopg import sql

from exporter.config import Definition
from exporter.raw.sides import COMMA, FALSE, TRUE, Comparison, key_names
from exporter.source import Table, slots
from exporter.source.changes import Gatherer, Grown
from exporter.source.copied import CopyReader
from exporter.state import State
from exporter.state import slots as remembered
from exporter.wire import Block, Connection, connect, pour, replication
from exporter.wire.replication import lsn_number

_PENDING = sql.Identifier("_exporter_pending")
_BEGIN, _END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"


def pending(
    definition: Definition, both: Comparison, reader: CopyReader, stored: State
) -> sql.Composable:
    """Return the condition for rows of raw that changes wait for, since the position ``stored``.

    The slot is read, and nothing of it confirmed. Works in the running transactions of both, the
    destination's with a temporary table. Raises psycopg.Error and DatabaseError where the slot
    cannot be read.
    """
    source, destination = both.source.session, both.raw.session
    known = remembered.exist(destination) and remembered.of(destination, reader.found)
    if not known or known.lsn is None or stored.slot is None or stored.slot.until is None:
        return FALSE
    keys = definition.destination.conflict_columns
    end = slots.end_of_wal(source)
    names = COMMA.join(key_names(both.raw.keys))
    columns = COMMA.join(sql.SQL("{} text").format(one) for one in key_names(both.raw.keys))
    make = sql.SQL("create temp table {} ({}) on commit drop").format(_PENDING, columns)
    destination.execute(make)
    copy = sql.SQL("copy {} ({}) from stdin (format binary)").format(_PENDING, names)
    member = reader.member(stored, [reader.table.column(name) for name in keys])
    gone: frozenset[tuple[str, str]] = frozenset()
    while True:
        gatherer = Gatherer([member], lsn_number(known.lsn), end, gone)
        try:
            found = _keys(definition, gatherer, known.name, lsn_number(known.lsn))
            break
        except Grown as grown:
            gone |= grown.columns
    if found is None:
        return TRUE
    count = len(keys).to_bytes(2, "big")
    blocks = [_BEGIN, *(count + key for key in found), _END]
    pour(destination, copy, iter([Block(b"".join(blocks), len(found), b"")]))
    return sql.SQL("({}) in (select {} from {})").format(
        COMMA.join(one.stored for one in both.raw.keys),
        COMMA.join(
            sql.SQL("{}::{}").format(name, sql.SQL(one.type))
            for name, one in zip(key_names(both.raw.keys), both.raw.keys, strict=True)
        ),
        _PENDING,
    )
