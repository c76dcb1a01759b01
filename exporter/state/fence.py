"""Who may commit a range of a first load: only the range that is next, of the run that is current.

Ranges may be read and copied side by side, on any machine. They end in their order: a range's
transaction moves ``next_block`` from its first block to its last, and only the range whose turn it
is can do that, once. So what has landed is always the front of the table and one number tells it,
stamps never go backwards, and an attempt that somebody else has finished, or whose run is over,
lands nothing. Its session may still hold locks, or may never go on (a paused machine): whoever
takes over ends it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from psycopg import sql

from exporter.config import Destination
from exporter.errors import DatabaseError, LockedError
from exporter.state import position
from exporter.state.position import RUNS, STATE
from exporter.wire import Connection

Part = tuple[int, int, int]  # a range: its number, its first block, the block after its last one
_PATIENCE = 20.0  # seconds for sessions to end


def close(destination: Connection, target: Destination) -> None:
    """Keep the ranges of every earlier run from landing. The caller holds the definition's lock.

    Waits for a range that is just being committed; then what is stored is final.
    """
    destination.execute(
        sql.SQL("update {} set run = null where relation = %s").format(STATE), (str(target),)
    )
    end_sessions(destination, target)


def end_sessions(destination: Connection, target: Destination, part: int | None = None) -> None:
    """End the sessions that hold a range, or any of the definition. Raises DatabaseError."""
    statement = (
        "select count(pg_terminate_backend(pid)) from pg_locks where locktype = 'advisory'"
        " and objsubid = 2 and granted and pid <> pg_backend_pid() and classid = %s::oid"
        " and database = (select oid from pg_database where datname = current_database())"
        " and objid = coalesce(%s::int::oid, objid)"
    )
    lock = (position.lock_number(target) >> 32, part)
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        found = destination.execute(statement, lock).fetchone()
        if not found or not found[0]:
            return
        time.sleep(0.05)
    raise DatabaseError(
        f"{target.key}: sessions of an earlier run do not end",
        hint="select * from pg_stat_activity where application_name = 'dbt-exporter'",
    )


def hold(destination: Connection, target: Destination, run: str, part: Part) -> bool:
    """Take a range for this transaction, False if it has landed before.

    The session of an earlier attempt at it is ended. Raises LockedError where the run is over.
    """
    number, _, end = part
    lock = (position.lock_number(target) >> 32, number)
    row = destination.execute("select pg_try_advisory_xact_lock(%s::int, %s::int)", lock).fetchone()
    if not row or not row[0]:
        end_sessions(destination, target, number)
        destination.execute("select pg_advisory_xact_lock(%s::int, %s::int)", lock)
    return _is_left(destination, target, run, end)


def advance(
    destination: Connection,
    target: Destination,
    run: str,
    part: Part,
    stamp: str,
    counts: tuple[int, int, int, int],  # the run's id, rows read, rows written, bytes
    wait: Callable[[], None],
) -> bool:
    """Record a range in the transaction that lands it; False if that has been done before.

    Calls ``wait`` between looks at whether it is this range's turn. Raises LockedError where the
    run is over.
    """
    run_id, rows, written, size = counts
    _, first, end = part
    statement = sql.SQL(
        "with moved as (update {} set next_block = %s, exported_at = %s, updated_at = now()"
        " where relation = %s and run = %s and next_block = %s returning 1),"
        " counted as (update {} set rows_read = rows_read + %s, rows_written = rows_written + %s,"
        " rows_unchanged = rows_unchanged + %s, bytes = bytes + %s, batches = batches + 1"
        " where id = %s and exists (select from moved))"
        " select count(*) from moved"
    ).format(STATE, RUNS)
    moves = (end, stamp, str(target), run, first)
    counted = (rows, written, rows - written, size, run_id)
    while True:
        moved = destination.execute(statement, (*moves, *counted)).fetchone()
        if moved and moved[0]:
            return True
        if not _is_left(destination, target, run, end):
            return False
        wait()


def _is_left(destination: Connection, target: Destination, run: str, end: int) -> bool:
    """Whether a range has yet to land. Raises LockedError."""
    now = position.read(destination, target)
    if now.run != run:
        raise LockedError(f"{target.key}: another run has taken this load over")
    return (now.next_block or 0) < end
