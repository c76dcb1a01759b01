"""Ctrl-C and SIGTERM end a run in order, and soon: both reach it as a KeyboardInterrupt."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from exporter.errors import StoppedError, TerminatedError

_IN_ORDER = 2.5  # seconds for what can be ended in order
_AT_ALL = 4.7  # seconds after which the process ends as it is
_stopping = threading.Event()


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


def stopping() -> bool:
    """Tell whether the run has been interrupted: what is begun now must not take long."""
    return _stopping.is_set()


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
    came: queue.SimpleQueue[int] = queue.SimpleQueue()  # the one whose put() a handler may call
    # Begun here: where the handler interrupts a thread's start, the next one would never return.
    threading.Thread(target=_watch, args=(came, give_up), daemon=True).start()

    def stop(number: int, _: object) -> None:
        if not _stopping.is_set():
            _stopping.set()
            came.put(number)
        raise Sigterm if number == signal.SIGTERM else KeyboardInterrupt

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for a job in the background
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        came.put(0)
        _stopping.clear()


def _watch(came: queue.SimpleQueue[int], give_up: Callable[[], None]) -> None:
    """Wait for a signal, then for the end of the run, 0, and not longer than it may take."""
    number = came.get()
    for seconds, action in (
        (_IN_ORDER, give_up),
        (_AT_ALL - _IN_ORDER, lambda: _end(128 + number)),
    ):
        if number == 0:
            return
        with contextlib.suppress(queue.Empty):
            came.get(timeout=seconds)
            return
        action()


def _end(status: int) -> None:
    print("exporter: interrupted; a server does not answer", file=sys.stderr, flush=True)
    os._exit(status)
