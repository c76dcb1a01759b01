"""Ctrl-C and SIGTERM end a run in order, and soon: both reach it as a KeyboardInterrupt."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from exporter.errors import StoppedError, TerminatedError

_IN_ORDER = 2.5  # seconds for what can be ended in order
_AT_ALL = 4.7  # seconds after which the process ends as it is
_LOOK = 0.1  # seconds between looks at whether the run is to end


class Sigterm(KeyboardInterrupt):
    """SIGTERM came. A KeyboardInterrupt, since psycopg then cancels the running statement."""


class _Run:
    """What goes on. No Event: a second signal would wait for a lock that the first one holds."""

    interrupt: KeyboardInterrupt | None = None  # the first one


_run = _Run()


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


def stopping() -> KeyboardInterrupt | None:
    """Return the interrupt that ends the run: what is begun now must not take long."""
    return _run.interrupt


def pause(seconds: float) -> None:
    """Sleep. Raises the interrupt that ends the run, in whatever thread."""
    until = time.monotonic() + seconds
    while _run.interrupt is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK))
    if _run.interrupt is not None:
        raise _run.interrupt


@contextlib.contextmanager
def interruptible(give_up: Callable[[], None]) -> Iterator[None]:
    """Raise ``Sigterm`` where SIGTERM would end the process on the spot, and have both end soon.

    A server that is silent, or a network that swallows what is sent, must not keep the process:
    ``give_up`` is called in a thread where the run has not ended in order. A little later the
    process ends without it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = threading.Event()

    def stop(number: int, _: object) -> None:
        interrupt = Sigterm() if number == signal.SIGTERM else KeyboardInterrupt()
        if _run.interrupt is None:
            _run.interrupt = interrupt
            watch = threading.Thread(target=_watch, args=(128 + number, ended, give_up))
            watch.daemon = True
            watch.start()
        raise interrupt

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for a job in the background
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ended.set()
        _run.interrupt = None


def _watch(status: int, ended: threading.Event, give_up: Callable[[], None]) -> None:
    if not ended.wait(_IN_ORDER):
        give_up()
    if not ended.wait(_AT_ALL - _IN_ORDER):
        _end(status)


def _end(status: int) -> None:
    print("exporter: interrupted; a server does not answer", file=sys.stderr, flush=True)
    os._exit(status)
