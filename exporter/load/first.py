"""The first load of a table, in one heap, into raw: planned by blocks, begun or gone on with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from exporter.load import ranges
from exporter.load.transfer import select
from exporter.raw import table as raw_table
from exporter.source import window
from exporter.state import fence
from exporter.state.position import State
from exporter.state.runs import take_counts
from exporter.wire.connection import Connection

if TYPE_CHECKING:
    from exporter.load.one import Load


def begun(load: Load) -> tuple[bool, bool]:
    """Tell whether raw is empty, and else whether a first load of this very table has begun it."""
    empty = raw_table.is_empty(load.destination, load.transfer.raw)
    same = not empty and load.stored.file == load.table.file and load.snapshot.xid_usable
    return empty, same


def plan_first(load: Load, *, empty: bool, same: bool) -> ranges.FirstLoad:
    """Decide which blocks are read, and which way their rows take."""
    raw = load.transfer.raw
    exact = raw.exact and raw.stamped and all(column.binary for column in raw.columns)
    return ranges.FirstLoad(
        definition=load.definition,
        raw=raw,
        direct=exact and (empty or same),
        begin=(load.stored.next_block or 0) if same else 0,
        end=load.table.blocks,
        step=ranges.blocks_of_a_range(load.definition, load.table),
        stamp=load.transfer.stamp_of(load.result.totals.batches),
        run=os.urandom(8).hex(),
        run_id=0,
        # A row of these blocks that is as it was in the first snapshot is not in raw; an older
        # version of one that has changed since may be.
        changed_since=load.view.xmin_since if same else None,
        snapshot=None,
        paths=(load.source.path, load.destination.path),
    )


def land_first(load: Load) -> State:
    """Land all rows; return how far they reach.

    One that goes on copies the rest, and looks at what has changed since it was begun.
    """
    table, stored, transfer, raw = load.table, load.stored, load.transfer, load.transfer.raw
    crew = load.crew or ranges.ALONE
    empty, same = begun(load)
    first = plan_first(load, empty=empty, same=same)
    if not first.direct:  # staged rows are upserted on the key
        raw_table.ensure_key(load.destination, raw)
    load.tell_path("first load", first.way)
    current = State(
        snapshot_xmin=stored.snapshot_xmin if same else load.snapshot.xmin,
        source=load.horizon.identity,
        horizon=load.horizon.oldest_open,
        # Started over, a load that is killed again has rows of any block: it cannot go on.
        file=table.file if empty or same else None,
        next_block=first.begin,
        run=first.run,
        exported_at=stored.exported_at,
    )
    with load.destination.transaction():  # has no row yet: need not be on disk
        load.destination.execute("set local synchronous_commit = off")
        transfer.store(current, "running")
    first = first._replace(
        run_id=load.result.run_id or 0,
        snapshot=_exported(load.source) if crew.shares else None,
    )
    transfer.tell(first.first_query, first.total)
    tally = ranges.Tally(first, table.rows, load.result, load.progress)
    crew.land(first, load.source, load.destination, tally)
    if crew.shares:
        fence.end_sessions(load.destination, load.definition)  # of attempts that others overtook
        take_counts(load.destination, load.result)
    raw_table.ensure_key(load.destination, raw)
    current = current._replace(next_block=first.last)
    if same and load.view.xmin_since:
        changed = select(raw, window.changed_since(load.view.xmin_since))
        transfer.land(changed, lambda _: current)
    return current._replace(file=None, next_block=None, run=None, cursor=load.top())


def _exported(source: Connection) -> str:
    """Let other sessions see this snapshot, for as long as it is open."""
    row = source.execute("select pg_export_snapshot()").fetchone()
    return str(row[0]) if row else ""
