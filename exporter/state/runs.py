"""What a run did, and how it is reported: a line, a JSON object, a row of ``_exporter_runs``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from psycopg import sql

from exporter.errors import ExporterError
from exporter.state.position import RUNS, Position, as_dict
from exporter.wire import Connection

_COUNTS = (
    "rows_read",
    "rows_written",
    "rows_unchanged",
    "rows_deleted",
    "rows_swept",
    "batches",
    "bytes",
)


@dataclass
class Totals:
    """What one run did. ``rows_read`` left the source, ``rows_written`` changed in raw.

    ``rows_deleted`` were gone at the source, and left raw or were marked there. ``rows_swept`` are
    those of ``rows_written`` that the cursor had passed over.
    """

    rows_read: int = 0
    rows_written: int = 0
    rows_deleted: int = 0
    rows_swept: int = 0
    batches: int = 0
    bytes: int = 0

    def add(self, rows: int, written: int, size: int) -> None:
        """Count a batch."""
        self.rows_read += rows
        self.rows_written += written
        self.bytes += size
        self.batches += 1

    @property
    def rows_unchanged(self) -> int:
        """Rows that were read and were in raw already as they are."""
        return self.rows_read - self.rows_written

    def as_dict(self) -> dict[str, int]:
        """Return the counts as ``--json`` and the run's row have them."""
        return {name: getattr(self, name) for name in _COUNTS}


@dataclass
class Result:
    """How a load ended. ``command`` is what the record of runs calls it."""

    key: str
    command: str = "load"
    totals: Totals = field(default_factory=Totals)
    cursor: Position | None = None
    seconds: float = 0.0
    error: ExporterError | None = None
    run_id: int | None = None
    notices: list[str] = field(default_factory=list)  # what a person should look at
    began: float = field(default_factory=time.monotonic)

    @property
    def status(self) -> str:
        """``ok``, ``failed``, ``locked`` by another run, or ``interrupted`` by a signal."""
        return self.error.outcome if self.error else "ok"

    def as_dict(self) -> dict[str, object]:
        """Return what ``--json`` and the log in JSON tell."""
        return {
            "key": self.key,
            "status": self.status,
            **self.totals.as_dict(),
            "cursor": as_dict(self.cursor),
            "seconds": round(self.seconds, 3),
            "error": str(self.error) if self.error else None,
            "notices": list(self.notices),
        }

    def __str__(self) -> str:
        totals = self.totals
        swept = f" ({totals.rows_swept:,} by the sweep)" if totals.rows_swept else ""
        deleted = f" {totals.rows_deleted:,} deleted," if totals.rows_deleted else ""
        return (
            f"{self.key}: {totals.rows_read:,} rows read,"
            f" {totals.rows_written:,} written{swept},{deleted}"
            f" {totals.rows_unchanged:,} unchanged in {self.seconds:.1f} s;"
            f" cursor {self.cursor or 'nothing yet'}"
        )


def record(destination: Connection, result: Result, status: str) -> None:
    """Write the run's row: ``running`` until its last call, which says how the run ended."""
    value, id = result.cursor or (None, None)
    values = {
        "key": result.key,
        "command": result.command,
        "status": status,
        **result.totals.as_dict(),
        "cursor_value": value,
        "cursor_id": id,
        "error": result.error.message if result.error else None,
    }
    names = sql.SQL(", ").join(sql.Identifier(name) for name in values)
    marks = sql.SQL(", ").join([sql.Placeholder()] * len(values))
    ended = sql.SQL("null" if status == "running" else "clock_timestamp()")
    if result.run_id is not None:
        done = destination.execute(
            # By its key, too: a crash that undoes the row may give its id to another definition's.
            sql.SQL("update {} set ({}, finished_at) = ({}, {}) where id = %s and key = %s").format(
                RUNS, names, marks, ended
            ),
            [*values.values(), result.run_id, result.key],
        )
        if done.rowcount:  # not so where the row went with a batch that was rolled back
            return
    row = destination.execute(
        sql.SQL(
            "insert into {} ({}, finished_at, started_at) values"
            " ({}, {}, clock_timestamp() - make_interval(secs => %s)) returning id"
        ).format(RUNS, names, marks, ended),
        [*values.values(), time.monotonic() - result.began],
    ).fetchone()
    assert row is not None
    result.run_id = row[0]


def record_failure(destination: Connection, result: Result) -> None:
    """Write how a run ended that did not end well. Its row has counted what was committed.

    A commit whose answer we did not wait for, or did not get, may count or not: we cannot tell.
    """
    with destination.transaction():  # a range that is being committed elsewhere counts after us
        take_counts(destination, result)
        record(destination, result, result.status)


def take_counts(destination: Connection, result: Result) -> bool:
    """Take over what the run's row has counted, and lock it; False where it is not there."""
    row = destination.execute(
        sql.SQL(
            "select rows_read, rows_written, rows_deleted, rows_swept, batches, bytes,"
            " cursor_value, cursor_id from {} where id = %s and key = %s for update"
        ).format(RUNS),
        (result.run_id, result.key),
    ).fetchone()
    if row is None:
        return False
    *counts, value, id = row
    result.totals = Totals(*counts)
    result.cursor = Position(value, id) if value is not None else None
    return True
