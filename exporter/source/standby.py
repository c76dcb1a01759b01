"""A standby as source: how far it has replayed what its primary has written."""

from __future__ import annotations

import time

from exporter.wire import Connection
from exporter.wire.replication import lsn_number

_REPLAY = 1.0  # seconds for a standby to replay what it has got


def is_standby(source: Connection) -> bool:
    """Tell whether the server follows another one."""
    return source.execute("select pg_is_in_recovery()").fetchone() == (True,)


def replayed(source: Connection) -> int:
    """Return the position that a standby has replayed. One record behind it may be seen already."""
    row = source.execute("select pg_last_wal_replay_lsn()::text").fetchone()
    assert row is not None
    return lsn_number(row[0])


def is_paused(source: Connection) -> bool:
    """Tell whether the server is a standby that replays nothing for the time being."""
    row = source.execute(
        "select case when pg_is_in_recovery() then pg_is_wal_replay_paused() else false end"
    ).fetchone()
    return row == (True,)


def end_of_wal(source: Connection) -> int:
    """Return the position that a standby has replayed, if it can be with what it has got so far.

    A commit is seen before its position is: a table that is copied may have what its slot does not
    send yet, unless nothing is on its way.
    """
    row = source.execute("select coalesce(pg_last_wal_receive_lsn(), '0/0')::text").fetchone()
    assert row is not None
    got, until = lsn_number(row[0]), time.monotonic() + _REPLAY
    while (now := replayed(source)) < got and time.monotonic() < until:
        time.sleep(0.005)
    return now
