"""The first load of a table: its blocks, landed by whoever helps."""

from __future__ import annotations

import os

from exporter.load import ranges
from exporter.load.transfer import Transfer
from exporter.source import Blocks
from exporter.state import fence, take_counts


def land_blocks(transfer: Transfer, blocks: Blocks, crew: ranges.Crew | None) -> None:
    """Land all ranges of the blocks. Raises psycopg.Error, ExporterError."""
    attempt, raw = transfer.attempt, transfer.raw
    crew = crew or ranges.Crew()
    run = os.urandom(8).hex()
    with attempt.destination.transaction():  # has no row yet: need not be on disk
        attempt.destination.execute("set local synchronous_commit = off")
        transfer.store(transfer.plan.begin._replace(run=run), "running")
    snapshot = None
    if crew.shares:  # other sessions see it, for as long as it is open here
        row = attempt.source.execute("select pg_export_snapshot()").fetchone()
        snapshot = row[0] if row else None
    first = ranges.FirstLoad(
        blocks=blocks,
        raw=raw,
        stream=transfer.plan.stream,
        stamp=transfer.stamp_of(attempt.result.totals.batches),
        run=run,
        run_id=attempt.result.run_id or 0,
        snapshot=snapshot,
    )
    attempt.tell_query(first.query(blocks.first), blocks.total)
    tally = ranges.Tally(blocks, attempt.result.totals, attempt.progress)
    crew.land(first, attempt.source, attempt.destination, tally)
    if crew.shares:
        fence.end_sessions(attempt.destination, raw.target)  # of attempts that others overtook
        take_counts(attempt.destination, attempt.result)
