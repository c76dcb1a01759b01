"""Whether a pooler gives a session another server process from one transaction to the next."""

from __future__ import annotations

import select
import time
from typing import Any

import psycopg
from psycopg.pq import ExecStatus, abc

_ROUNDS = 3  # a pooler that hands out processes in turn may by chance keep to one
_WAIT = 2.0  # seconds


def is_between(connection: psycopg.Connection[Any], pid: int) -> bool:
    """Whether somebody else than the server process ``pid`` has answered: poolers give own keys."""
    return connection.info.backend_pid != pid


def mode(first: psycopg.Connection[Any], second: psycopg.Connection[Any]) -> str | None:
    """Return ``transaction`` or ``statement`` where the pooler has such a mode, else None.

    Both sessions lead through it, outside of a transaction. In session mode the first keeps its
    process; in the others the second is given it, or the first another one while that is taken.
    """
    pid = _answer(first.pgconn, b"select pg_catalog.pg_backend_pid()")
    for _ in range(_ROUNDS):
        try:
            other = _answer(second.pgconn, b"begin; select pg_catalog.pg_backend_pid()")
            now = _answer(first.pgconn, b"select pg_catalog.pg_backend_pid()")
        except psycopg.Error as error:
            if "transaction blocks not allowed" in str(error):
                return "statement"
            raise
        if other is None:
            # It waits for a process of its own, while the first has answered: in another mode the
            # first's would have been free for it.
            return None
        if other == pid or now != pid:
            return "transaction"
        _answer(second.pgconn, b"commit")
    return None


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
