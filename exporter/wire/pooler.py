"""Whether a pooler gives a session another server process from one transaction to the next."""

from __future__ import annotations

import select
import time
from typing import Any

import psycopg
from psycopg.pq import ExecStatus, abc

_ROUNDS = 3  # a pooler that hands out processes in turn may by chance keep to one
_WAIT = 2.0  # seconds
_PID = b"select pg_catalog.pg_backend_pid()"


def is_between(connection: psycopg.Connection[Any], pid: int) -> bool:
    """Whether somebody else than the server process ``pid`` has answered: poolers give own keys."""
    return connection.info.backend_pid != pid


def gives_away(first: psycopg.Connection[Any], second: psycopg.Connection[Any]) -> bool:
    """Whether the pooler lends a process for a transaction or a statement. Raises psycopg.Error.

    Both sessions lead through it, outside of a transaction. In session mode the first keeps its
    process; in the others the second is given it, or the first another one while that is taken.
    """
    mine = _answer(first.pgconn, _PID)
    for _ in range(_ROUNDS):
        try:
            other = _answer(second.pgconn, b"begin; " + _PID)
        except psycopg.Error as error:
            if "transaction blocks not allowed" in str(error):  # in statement mode
                return True
            raise
        now = _answer(first.pgconn, _PID)
        if other is None and now == mine:
            # All processes are taken, and the first has kept its own: else it would have been
            # given to the second, which was waiting.
            return False
        if other == mine or now != mine:
            return True
        _answer(second.pgconn, b"commit")
    return False


def _answer(pgconn: abc.PGconn, statement: bytes) -> bytes | None:
    """Return the last value that statements give, None where they wait. Raises psycopg.Error."""
    pgconn.send_query(statement)
    until = time.monotonic() + _WAIT
    value = None
    while True:
        pgconn.flush()
        while pgconn.is_busy():
            left = until - time.monotonic()
            if left <= 0:
                return None
            select.select([pgconn.socket], [], [], left)
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            return value
        if result.status == ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result)
        if result.ntuples:
            value = result.get_value(0, 0)
