"""The sweep: block after block, what the cursor has passed over.

A cursor is a promise of the application. Where it is broken, by an import, a clock, a late
pipeline, the row lies behind the position, and no read by the cursor finds it. But PostgreSQL keeps
with each row version the transaction that wrote it: so each load looks at some blocks of the table
for rows of new transactions, and a round of all blocks comes to its end within a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from datetime import timedelta

from psycopg import sql

from exporter.source.blocks import select, select_blocks
from exporter.source.snapshot import Horizon, Snapshot
from exporter.source.table import Column, Table
from exporter.state import Round, moment

_LONG_AGO = "1970-01-01 00:00:00+00"
_LEAST = 4096  # blocks, 32 MB: less is not worth a statement
_MOST = 131_072  # blocks, 1 GB


def over(snapshot: Snapshot, horizon: Horizon, xmin: str | None = None) -> Round:
    """Return a round that has just ended: all that is older than ``xmin`` has landed."""
    return Round(None, xmin or snapshot.xmin, horizon.clock, horizon.clock, 0, "", over=True)


def everything() -> Round:
    """Return a round after which one is due at once, which compares all rows."""
    return Round(None, "0", _LONG_AGO, _LONG_AGO, 0, "", over=True)


def due(
    last: Round,
    table: Table,
    snapshot: Snapshot,
    horizon: Horizon,
    within: timedelta | None,
) -> tuple[Round, int] | None:
    """Return the round that this load goes on with and the block up to which; None where none is.

    ``within`` is the time that a round may take; None begins one and ends it in this load. So does
    a server that cannot read a part of a table.

    A sequential read goes through a small ring of buffers, a range of blocks through all of them.
    So a range is at most a quarter of them, the size from which PostgreSQL itself takes the ring:
    pages that are used more than once stay.
    """
    began, seen, now = map(moment, (last.began, last.seen, horizon.clock))
    if last.over or within is None:
        if within is not None and began <= now < began + within:
            return None
        since = last.xmin if last.over else last.since
        last = Round(since, snapshot.xmin, horizon.clock, horizon.clock, 0, table.file)
    else:  # from the beginning where its blocks are not what they were
        last = last._replace(place=table.moved(last.file, last.place) or 0)
    last = last._replace(seen=horizon.clock, file=table.file)
    passed = max(now - seen, timedelta(0)) / within if within else 1.0
    share = max(int(2 * table.blocks * passed), _LEAST)  # loads may come less often later
    if within is None or not table.in_blocks or share >= table.blocks <= _MOST:
        return last._replace(place=0), table.blocks
    return last, min(last.place + min(share, _MOST, table.buffers // 4), table.blocks)


def ended(current: Round, end: int, table: Table) -> Round:
    """Return the round when its blocks have been read up to ``end``."""
    return current._replace(place=end, over=end >= table.blocks)


def parts(
    current: Round, end: int, table: Table, snapshot: Snapshot
) -> Iterator[Callable[[tuple[Column, ...]], sql.Composable]]:
    """Yield what gives a query for columns, of rows from the round's place to the block ``end``.

    Each is of one heap, or of all of them.
    """
    changed, beyond = snapshot.newer(current.since), sql.SQL("false")
    if current.place == 0 and end == table.blocks:
        yield lambda columns: select(table, columns, changed, beyond)
        return
    for place, heap in table.placed:
        first, last = max(place, current.place), min(place + heap.blocks, end)
        if first < last:
            yield functools.partial(_blocks, table, first, last, changed)


def _blocks(
    table: Table, first: int, last: int, where: sql.Composable, columns: tuple[Column, ...]
) -> sql.Composable:
    return select_blocks(table, columns, first, last, where, sql.SQL("false"))
