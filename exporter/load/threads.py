"""Definitions side by side in threads, and a large first load shared by those without work.

Threads serve, since almost all of a load's time is spent in the two servers and in libpq.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from exporter.config import Definition
from exporter.errors import DatabaseError
from exporter.load import ranges
from exporter.load.ranges import Crew, FirstLoad, Tally
from exporter.load.way import watched
from exporter.source import Range
from exporter.state import Result
from exporter.wire import Connection, Sessions, Stopped, cancel


class Team(Crew):
    """Threads, each with one session on each database at most."""

    shares = True

    def __init__(self, size: int, *, alone: bool = False) -> None:
        self._size = size
        self._alone = alone  # nobody else may have a session
        self._waiting: deque[Definition] = deque()
        self._shared: list[_SharedLoad] = []
        self._unfinished = 0
        self._sessions: set[Connection] = set()
        self.stop: KeyboardInterrupt | None = None
        self._change = threading.Condition()

    def run(
        self,
        definitions: Iterable[Definition],
        load: Callable[[Definition, Sessions, Crew], Result],
    ) -> Iterator[Result]:
        """Load the definitions, begun in this order; yield results as they come.

        A KeyboardInterrupt stops the loads that have begun, each in order; the others never begin.
        """
        self._waiting.extend(definitions)
        self._unfinished = count = len(self._waiting)
        done: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()

        def work() -> None:
            with Sessions(alone=self._alone) as sessions:
                while (job := self._next_job()) is not None:
                    if isinstance(job, _SharedLoad):
                        self._help(job, sessions)
                        continue
                    try:
                        done.put(load(job, sessions, self))
                    except BaseException as error:  # noqa: BLE001  raised again below
                        done.put(error)
                    with self._change:
                        self._unfinished -= 1
                        self._change.notify_all()

        for _ in range(self._size):
            threading.Thread(target=work, daemon=True).start()
        while count:
            try:
                result = done.get(timeout=ranges.POLL if self.stop else None)
            except KeyboardInterrupt as stop:
                count -= self._halt(stop)
                continue
            except queue.Empty:
                self._cancel()
                continue
            if isinstance(result, BaseException):
                raise result
            count -= 1
            yield result

    @contextlib.contextmanager
    def watching(self, *sessions: Connection) -> Iterator[None]:
        """Cancel what the sessions do when all has to stop; then raise the KeyboardInterrupt."""
        with self._change:
            self._sessions.update(sessions)
        try:
            if self.stop:
                raise self.stop
            yield
        except Exception:
            if self.stop:
                raise self.stop from None
            raise
        finally:
            with self._change:
                self._sessions.difference_update(sessions)

    def _halt(self, stop: KeyboardInterrupt) -> int:
        """Return how many definitions will never begin. A second interrupt is not waited for."""
        if self.stop:
            raise stop
        with self._change:
            self.stop = stop
            never = len(self._waiting)
            self._waiting.clear()
            self._unfinished -= never
            self._change.notify_all()
        self._cancel()
        return never

    def _cancel(self) -> None:
        with self._change:
            sessions = list(self._sessions)
        for session in sessions:
            cancel(session)

    def land(
        self, first: FirstLoad, source: Connection, destination: Connection, tally: Tally
    ) -> None:
        """Land the ranges of a first load together with the threads that have no work."""
        shared = _SharedLoad(first, tally, self._change)
        with self._change:
            self._shared.append(shared)
            self._change.notify_all()
        try:
            shared.land(source, destination)
        finally:
            with self._change:
                self._shared.remove(shared)
                self._change.wait_for(lambda: not shared.helpers)
            if shared.error is not None:  # a helper's, if that came first
                raise shared.error

    def _next_job(self) -> Definition | _SharedLoad | None:
        """Wait for a definition, else for a first load that takes help; None when all is done."""
        with self._change:
            while self._unfinished:
                if self._waiting:
                    return self._waiting.popleft()
                for shared in self._shared:
                    if shared.takes_help():
                        shared.helpers += 1
                        return shared
                self._change.wait()
        return None

    def _help(self, shared: _SharedLoad, sessions: Sessions) -> None:
        """Land ranges of another thread's first load, on this thread's two sessions."""
        try:
            with (
                sessions.pair(shared.first.blocks.table.declared.variable) as (destination, source),
                self.watching(destination, source),
                watched(shared.first.raw.target.key, source, destination, looks=not self._alone),
                ranges.shared_snapshot(source, shared.first),
            ):
                shared.land(source, destination)
        except DatabaseError:  # no session, or no snapshot any more: the others go on without
            shared.refuses_help = True
        except BaseException as error:  # noqa: BLE001  raised by the load whose ranges they are
            shared.fail(error)
        finally:
            with self._change:
                shared.helpers -= 1
                self._change.notify_all()


class _SharedLoad:
    """The ranges of one first load, handed out in their order."""

    def __init__(self, first: FirstLoad, tally: Tally, change: threading.Condition) -> None:
        self.first = first
        self.helpers = 0
        self.refuses_help = False  # nobody else gets sessions, or its snapshot
        self.error: BaseException | None = None
        self._tally = tally
        self._left = deque(first.blocks.ranges())
        self._change = change

    def takes_help(self) -> bool:
        """Whether there is work for one more thread."""
        return len(self._left) > 1 and not self.refuses_help and self.error is None

    def land(self, source: Connection, destination: Connection) -> None:
        """Land ranges on these sessions as long as there are any. Raises what it met."""
        count, wait = self._tally.read, self._wait
        try:
            for landed in ranges.land(self.first, source, destination, self._taken(), count, wait):
                self._tally.landed(landed)
                with self._change:
                    self._change.notify_all()
        except BaseException as error:
            self.fail(error)  # a range that was taken will not land: nobody may wait for it
            raise

    def fail(self, error: BaseException) -> None:
        """Stop all who land ranges."""
        with self._change:
            self.error = self.error or error
            self._change.notify_all()

    def _taken(self) -> Iterator[Range]:
        while True:
            with self._change:
                if not self._left or self.error is not None:
                    return
                part = self._left.popleft()
            yield part

    def _wait(self) -> None:
        with self._change:
            if self.error is not None:
                raise Stopped
            self._change.wait(ranges.POLL)
