"""Again on new connections, after a failure that may pass: a bounded number of times."""

from __future__ import annotations

from collections.abc import Callable

import psycopg

from exporter.errors import DatabaseError, LockedError
from exporter.terminal import signals

RETRIES = 6  # the waits between them add up to 16 s
# SQLSTATEs, or their beginnings, of what may pass. The others of PostgreSQL's own classes for it
# last: a full disk, `temp_file_limit`, too many columns, a database that was dropped.
_PASSES = (
    "08",  # the connection
    "40001",  # serialization_failure
    "40003",  # statement_completion_unknown
    "40P01",  # deadlock_detected
    "53000",  # insufficient_resources
    "53200",  # out_of_memory
    "53300",  # too_many_connections
    "55006",  # object_in_use
    "55P03",  # lock_not_available
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now
    "57P05",  # idle_session_timeout
    "58000",  # system_error
    "58030",  # io_error
    "HV00N",  # fdw_unable_to_establish_connection
)


def with_retries(attempt: Callable[[], None], again: Callable[[str], None]) -> None:
    """Call ``attempt``, and again after what may pass; tell ``again`` the reason of the first.

    Raises what the last attempt raised. A DatabaseError of the first one, a server that was never
    there, is raised at once. After a Ctrl-C or a SIGTERM there is no other try, but the interrupt.
    """
    try:
        attempt()
        return
    except psycopg.Error as error:
        if not _is_transient(error):
            raise
        stop = signals.stopping()
        if stop:  # which has ended the sessions
            raise stop from None
        again(first_line(error))
    from tenacity import (  # noqa: PLC0415  only where something failed
        Retrying,
        retry_if_exception,
        stop_after_attempt,
        wait_exponential,
    )

    Retrying(
        # The server may not have noticed yet that our last session, and its lock, is gone.
        retry=retry_if_exception(lambda e: isinstance(e, LockedError) or _is_transient(e)),
        stop=stop_after_attempt(RETRIES),
        wait=wait_exponential(multiplier=0.25, max=10),
        sleep=signals.pause,
        reraise=True,
    )(attempt)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, psycopg.Error) and error.sqlstate:
        return error.sqlstate.startswith(_PASSES)
    # Without a word of the server: the connection is lost.
    return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError, DatabaseError))


def first_line(error: psycopg.Error) -> str:
    """Return the message of a server, without the details that quote a row."""
    return (error.diag.message_primary or str(error) or type(error).__name__).splitlines()[0]
