"""Loads on a Dask cluster: its workers read and write the databases, no row passes through here.

What is small, or no first load, goes to one worker as a whole. A large first load stays here in
name: this process holds its lock and its snapshot, and hands out its ranges. Dask gives a range
whose worker is lost to another one; that it lands once is seen to in ``exporter.fence``.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psycopg

from exporter import state
from exporter.config import Definition, Destination
from exporter.errors import ClusterError, DatabaseError, ExporterError
from exporter.load import ranges
from exporter.load.ranges import Crew, FirstLoad, Landed, NotByRanges, Tally
from exporter.load.threads import Team
from exporter.source import Range
from exporter.state import Result, fence
from exporter.terminal import Console, signals
from exporter.wire import Connection, Sessions, connect

if TYPE_CHECKING:
    from distributed import Client, Future

LARGE = 8192  # blocks: 64 MB of a table are worth sharing
AHEAD = 2  # tasks in flight for each thread of the workers: one is computed, one waits
_AT_ONCE = 32  # definitions, unless -j says otherwise: each takes a thread here
_RETRIES = 3  # of a range whose session broke; a lost worker does not count
_LOOK = 0.5  # seconds between looks at whether all has to stop
_ALIVE = 20.0  # seconds between signs of life on the two sessions that only wait
_STEP = 0.02  # seconds between looks at whether it is a range's turn
_SECEDE = 0.2  # seconds that a range waits for its turn before its thread takes another task


class Cluster(Team):
    """Workers elsewhere. ``most`` bounds the sessions on each database, ours included."""

    ranges_only = True

    def __init__(self, address: str, console: Console, jobs: int | None, most: int | None) -> None:
        self._client = connect_to(address)
        self._console = console
        self._free = threading.Semaphore(most or 2**31)
        self._one_first_load = threading.Lock()  # each takes all the workers there are
        self._threads, self._counted = 1, 0.0
        super().__init__(jobs or min(self._count_threads(), _AT_ONCE))

    def load_all(
        self, definitions: list[Definition], load: Callable[..., Result], shared: set[str]
    ) -> Iterator[Result]:
        """Load the definitions, those with the ``shared`` keys by ranges; yield their results.

        ``load`` has yet to get a definition, a console and sessions, and travels to the workers.
        """

        def one(definition: Definition, _: Sessions, crew: Crew) -> Result:
            if definition.key in shared:
                with (
                    contextlib.suppress(NotByRanges),
                    self._one_first_load,
                    self._free,
                    Sessions() as sessions,  # not the thread's: those that it keeps are not counted
                ):
                    return load(definition, self._console, sessions, crew=crew)
            with self._free:
                return self._elsewhere(definition, load)

        with self._client:
            yield from self.run(definitions, one)

    def land(
        self, first: FirstLoad, source: Connection, destination: Connection, tally: Tally
    ) -> None:
        """Have the ranges landed, so many in flight as twice the workers' threads."""
        parts = first.blocks.ranges()
        running: set[Future] = set()
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        source.execute("set local idle_in_transaction_session_timeout = 0")
        heard = time.monotonic()
        try:
            while True:
                for part in self._next_parts(parts, running):
                    future = self._submit(first, part)
                    running.add(future)
                    future.add_done_callback(done.put)
                if not running:
                    return
                with contextlib.suppress(queue.Empty):
                    future = done.get(timeout=_LOOK)
                    running.remove(future)
                    self._free.release()
                    tally.landed(value_of(future, first.key), elsewhere=True)
                if self.stop:
                    raise self.stop
                if time.monotonic() > heard + _ALIVE:
                    heard = time.monotonic()
                    source.execute("select")
                    destination.execute("select")
        finally:
            self._client.cancel(list(running))
            self._free.release(len(running)) if running else None

    def _next_parts(self, parts: Iterator[Range], running: set[Future]) -> Iterator[Range]:
        """Yield the ranges to be handed out now; wait only for the first one's sessions."""
        while len(running) < AHEAD * self._count_threads():
            if not self._free.acquire(blocking=not running):
                return
            part = next(parts, None)
            if part is None:
                self._free.release()
                return
            yield part

    def _submit(self, first: FirstLoad, part: Range) -> Future:
        return self._client.submit(
            land_range,
            first,
            part,
            key=f"{first.key}-{first.run}-{part.number}",
            priority=-part.number,  # the others wait for the one that is next
            retries=_RETRIES,
            pure=False,
        )

    def _count_threads(self) -> int:
        """Return how many ranges the workers can serve at once, now and then counted anew."""
        now = time.monotonic()
        if now > self._counted + 5:
            self._threads, self._counted = sum(self._client.nthreads().values()), now
        return max(self._threads, 1)

    def _elsewhere(self, definition: Definition, load: Callable[..., Result]) -> Result:
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        future = self._client.submit(load_whole, load, definition, pure=False)
        future.add_done_callback(done.put)
        while True:
            with contextlib.suppress(queue.Empty):
                done.get(timeout=_LOOK)
                break
            if self.stop:  # a worker that has begun goes on to the end of this load
                future.cancel()
                why = signals.reason(self.stop, f"{definition.key}: interrupted")
                return Result(definition.key, error=why)
        try:
            result: Result = value_of(future, definition.key)
        except ExporterError as error:
            return Result(definition.key, error=error)
        for notice in result.notices:
            self._console.say(notice, "warning", key=definition.key, event="notice")
        return result


def shared_keys(definitions: list[Definition], blocks: dict[str, int]) -> set[str]:
    """Return the definitions whose first load is under way or to be made, and is a large one.

    Raises DatabaseError.
    """
    with connect("DATABASE_URL_ANALYTICS") as destination:
        state.create_tables(destination)
        return {
            one.key
            for one in definitions
            if blocks[one.key] >= LARGE and state.read(destination, one.destination).cursor is None
        }


def load_whole(load: Callable[..., Result], definition: Definition) -> Result:
    """Load a definition. Runs on a worker."""
    with Sessions() as sessions:
        return load(definition, Console(level="error"), sessions)


def land_range(first: FirstLoad, part: Range) -> Landed | ExporterError:
    """Land a range, or return why it cannot be landed. Runs on a worker.

    Raises psycopg.Error and DatabaseError, for what another try may mend.
    """
    try:
        with (
            connect("DATABASE_URL_ANALYTICS") as destination,
            connect("DATABASE_URL_CORE") as source,
            ranges.shared_snapshot(source, first),
        ):
            wait = _Waiting(destination, first.raw.target)
            (landed,) = ranges.land(first, source, destination, iter([part]), lambda _: None, wait)
            return landed
    except DatabaseError:
        raise
    except ExporterError as error:
        return error


class _Waiting:
    """What a range does, called again and again, while it is another one's turn."""

    def __init__(self, destination: Connection, target: Destination) -> None:
        self._destination = destination
        self._target = target
        self._since: float | None = None
        self._checked = 0.0

    def __call__(self) -> None:
        from distributed import secede  # noqa: PLC0415

        now = time.monotonic()
        if self._since is None:
            self._since = self._checked = now
        elif self._since and now > self._since + _SECEDE:
            self._since = 0
            secede()
        if now > self._checked + 1:  # nobody else would end this, were that process gone
            fence.check_holder(self._destination, self._target)
            self._checked = now
        time.sleep(_STEP)


def connect_to(address: str) -> Client:
    """Return a client of a scheduler that has workers. Raises ClusterError."""
    try:
        from distributed import Client  # noqa: PLC0415  only with --scheduler
    except ImportError:
        raise ClusterError(
            "Dask is not installed: pip install 'dbt-exporter[distributed]'"
        ) from None

    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {address}: {type(error).__name__}",
            hint="dask scheduler starts one, and tells its address",
        ) from None
    if not client.nthreads():
        client.close()
        raise ClusterError(
            f"no worker has joined the Dask scheduler at {address}",
            hint=f"DATABASE_URL_CORE=… DATABASE_URL_ANALYTICS=… dask worker {address}",
        )
    return client


def value_of(future: Future, key: str) -> Any:
    """Return what a task has come to. Raises ExporterError, psycopg.Error."""
    from distributed.scheduler import KilledWorker  # noqa: PLC0415

    try:
        value = future.result()
    except (ExporterError, psycopg.Error):
        raise
    except KilledWorker:
        raise ClusterError(
            f"{key}: workers died of it, one after the other",
            hint="their own logs say why; is there enough memory?",
        ) from None
    except Exception as error:  # noqa: BLE001  Dask raises what a worker met, whatever it is
        raise ClusterError(
            f"{key}: the cluster failed: {type(error).__name__} {error}",
            hint="workers need dbt-exporter in the version used here, and the scheduler must stay",
        ) from None
    if isinstance(value, ExporterError):
        raise value
    return value
