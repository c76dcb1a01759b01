"""Ctrl-C and SIGTERM end a run in an orderly way: both reach it as a KeyboardInterrupt."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from exporter.errors import StoppedError, TerminatedError


class Sigterm(KeyboardInterrupt):
    """SIGTERM came. A KeyboardInterrupt, since psycopg then cancels the running statement."""


def reason(stop: KeyboardInterrupt, text: str) -> StoppedError:
    """Return the error for a run that was stopped; ``text`` names the run."""
    if isinstance(stop, Sigterm):
        return TerminatedError(f"{text} by SIGTERM")
    return StoppedError(text)


def behind(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interrupt that led to an error, if one did.

    An interrupt at an awkward moment, such as the begin of a transaction, makes the clean-up fail
    with another error.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__context__
    return cause


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise ``Sigterm`` in the main thread on SIGTERM, which else ends the process at once."""

    def stop(*_: object) -> None:
        raise Sigterm

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
