"""Ctrl-C and SIGTERM end a run in order, and soon: both reach it as a KeyboardInterrupt.

A run has five seconds from the first of them. In ``GRACE`` the servers are asked to cancel what
they do. Then ``at_stop`` is called: whoever still waits for a peer is to get an error. At ``END``
it is called again, and the main thread is interrupted once more where something is left.
"""

from __future__ import annotations

import _thread
import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator

from exporter.errors import StoppedError, TerminatedError

GRACE = 2.5  # seconds after the first signal
END = 4.5
_CANCEL = 1.0  # seconds for one request to cancel: several are sent, one after the other


class Sigterm(KeyboardInterrupt):
    """SIGTERM came. Of Ctrl-C's kind, for which psycopg cancels what the server is doing."""


class _Stop:
    """The first signal of this run."""

    interrupt: KeyboardInterrupt | None = None
    began = 0.0


_stop = _Stop()
_actions: list[Callable[[], bool]] = []


def at_stop(action: Callable[[], bool]) -> None:
    """Register what makes every wait for a peer end; it returns whether there was one."""
    _actions.append(action)


def stopping() -> KeyboardInterrupt | None:
    """Return the interrupt that is ending this run, None while it goes on."""
    return _stop.interrupt


def within(seconds: float) -> float:
    """Return how long a request to cancel may take, above 0, of the seconds that it would."""
    if _stop.interrupt is None:
        return seconds
    left = _stop.began + GRACE - time.monotonic()
    return max(0.05, min(seconds, _CANCEL, left))


def pause(seconds: float) -> None:
    """Sleep. Raises the interrupt that is ending this run, also in a thread."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and _stop.interrupt is None:
        time.sleep(min(left, 0.1))
    if _stop.interrupt is not None:
        raise _stop.interrupt


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
    """Raise ``Sigterm`` in the main thread where SIGTERM would end the process on the spot.

    From then on, and from Ctrl-C on, the run has its five seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: queue.SimpleQueue[signal.Signals | None] = (
        queue.SimpleQueue()
    )  # its put() may be interrupted by itself

    def stop(number: int, _: object) -> None:
        interrupt = Sigterm() if number == signal.SIGTERM else KeyboardInterrupt()
        if _stop.interrupt is None:
            _stop.began = time.monotonic()
            _stop.interrupt = interrupt
            came.put(signal.Signals(number))
        raise interrupt

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    # Begun here: a thread that is started while the main one starts another waits for ever.
    threading.Thread(target=_watch, args=(came,), daemon=True).start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        came.put(None)
        _stop.interrupt = None


def _watch(came: queue.SimpleQueue[signal.Signals | None]) -> None:
    number = came.get()
    for moment in (GRACE, END):
        if number is None:
            return
        with contextlib.suppress(queue.Empty):
            came.get(timeout=max(0.0, _stop.began + moment - time.monotonic()))
            return  # the run has ended
        left = [action() for action in _actions]
    if number is not None and any(left):
        _thread.interrupt_main(number)
