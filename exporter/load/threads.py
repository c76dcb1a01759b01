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
from exporter.source import Range
from exporter.state import Result
from exporter.wire import Connection, Sessions, Stopped, cancel

LOOK = 0.02  # seconds between looks at whether it is a range's turn


class Team:
    """Threads, each with one session on each database at most."""

    shares = True
    ranges_only = False

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: deque[Definition] = deque()
        self._shared: list[_Shared] = []
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
            with Sessions() as sessions:
                while (job := self._next_job()) is not None:
                    if isinstance(job, _Shared):
                        job.help(self, sessions)
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
                result = done.get(timeout=LOOK if self.stop else None)
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
        shared = _Shared(first, tally)
        with self._change:
            self._shared.append(shared)
            self._change.notify_all()
        try:
            shared.work(source, destination)
        finally:
            with self._change:
                self._shared.remove(shared)
            shared.join()

    def _next_job(self) -> Definition | _Shared | None:
        """Wait for a definition, else for a first load that takes help; None when all is done."""
        with self._change:
            while self._unfinished:
                if self._waiting:
                    return self._waiting.popleft()
                for shared in self._shared:
                    if shared.enter():
                        return shared
                self._change.wait()
        return None


class _Shared:
    """The ranges of one first load, handed out in their order."""

    def __init__(self, first: FirstLoad, tally: Tally) -> None:
        self._first = first
        self._tally = tally
        self._parts = deque(first.blocks.ranges())
        self._helpers = 0
        self._alone = False
        self._error: BaseException | None = None
        self._change = threading.Condition()

    def enter(self) -> bool:
        """Whether one more can help; it then has to."""
        with self._change:
            wanted = len(self._parts) > 1 and not self._alone and self._error is None
            self._helpers += wanted
            return wanted

    def help(self, team: Team, sessions: Sessions) -> None:
        """Land ranges on two sessions of one's own."""
        try:
            with (
                sessions.pair() as (destination, source),
                team.watching(destination, source),
                ranges.shared_snapshot(source, self._first),
            ):
                self._land(source, destination)
        except DatabaseError:  # no session, or no snapshot any more: the others go on without
            self._alone = True
        except BaseException as error:  # noqa: BLE001  raised by the load whose ranges they are
            self._fail(error)
        finally:
            with self._change:
                self._helpers -= 1
                self._change.notify_all()

    def work(self, source: Connection, destination: Connection) -> None:
        """Land ranges on the sessions of the load itself. Raises what it met."""
        try:
            self._land(source, destination)
        except BaseException as error:
            self._fail(error)
            raise

    def join(self) -> None:
        """Wait for the helpers; raise what one of them met, if that came first."""
        with self._change:
            while self._helpers:
                self._change.wait()
            if self._error is not None:
                raise self._error

    def _land(self, source: Connection, destination: Connection) -> None:
        for one in ranges.land(
            self._first, source, destination, self._take(), self._tally.passed, self._wait
        ):
            self._tally.landed(one)
            with self._change:
                self._change.notify_all()

    def _take(self) -> Iterator[Range]:
        while True:
            with self._change:
                if not self._parts or self._error is not None:
                    return
                part = self._parts.popleft()
            yield part

    def _wait(self) -> None:
        with self._change:
            if self._error is not None:
                raise Stopped
            self._change.wait(LOOK)

    def _fail(self, error: BaseException) -> None:
        with self._change:
            if self._error is None:
                self._error = error
            self._change.notify_all()
