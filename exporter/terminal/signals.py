"""Ctrl-C and SIGTERM end a run in order: both reach it as a KeyboardInterrupt."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from exporter.errors import StoppedError, TerminatedError


class Sigterm(KeyboardInterrupt):
    """SIGTERM came. Of Ctrl-C's kind, for which psycopg cancels what the server is doing."""


def reason(stop: KeyboardInterrupt, text: str) -> StoppedError:
    """Return the error for a run that was stopped; its text begins with what was."""
    if isinstance(stop, Sigterm):
        return TerminatedError(f"{text} by SIGTERM")
    return StoppedError(text)


def behind(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interrupt that led to an error, if one did.

    At an awkward moment, such as the begin of a transaction, it makes the clean-up fail.
    """
    one: BaseException | None = error
    while one is not None and not isinstance(one, KeyboardInterrupt):
        one = one.__context__
    return one


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise ``Sigterm`` in the main thread where SIGTERM would end the process on the spot."""

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
