"""Again on new connections, after a failure that may pass: a bounded number of times."""

from __future__ import annotations

from collections.abc import Callable

import psycopg

from exporter.errors import DatabaseError, LockedError

RETRIES = 6  # the waits between them add up to 16 s
_TRANSIENT = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
)
_LASTING = (
    psycopg.errors.DiskFull,
    psycopg.errors.QueryCanceled,
    psycopg.errors.ProgramLimitExceeded,
)


def with_retries(attempt: Callable[[], None], again: Callable[[str], None]) -> None:
    """Call ``attempt``, and again after what may pass; tell ``again`` the reason of the first.

    Raises what the last attempt raised. A DatabaseError of the first one, a server that was never
    there, is raised at once.
    """
    try:
        attempt()
        return
    except psycopg.Error as error:
        if not _is_transient(error):
            raise
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
        reraise=True,
    )(attempt)


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, (*_TRANSIENT, DatabaseError)) and not isinstance(error, _LASTING)


def first_line(error: psycopg.Error) -> str:
    """Return the message of a server, without the details that quote a row."""
    return (error.diag.message_primary or str(error) or type(error).__name__).splitlines()[0]
