"""Loads on a Dask cluster: its workers read and write the databases, no row passes through here.

What is small, or no first load, goes to one worker as a whole. A large first load stays here in
name: this process holds its lock and its snapshot, and hands out its ranges. Dask gives a range
whose worker is lost to another one; that it lands once is seen to in ``exporter.state.fence``.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psycopg

from exporter import state
from exporter.config import Definition, Destination
from exporter.errors import ClusterError, DatabaseError, ExporterError, LockedError
from exporter.load import ranges, way
from exporter.load.ranges import Crew, FirstLoad, Landed, NotByRanges, Tally
from exporter.load.threads import Team
from exporter.source import Range
from exporter.state import Result
from exporter.terminal import Console, signals
from exporter.wire import Connection, Sessions, connect

if TYPE_CHECKING:
    from distributed import Client, Future

LARGE = 8192  # blocks: 64 MB of a table are worth sharing
AHEAD = 2  # tasks in flight for each thread of the workers: one is computed, one waits
_AT_ONCE = 32  # definitions, unless -j says otherwise: each takes a thread here
_RETRIES = 3  # of a range whose session broke; a lost worker does not count
_POLL = 0.5  # seconds between looks at whether all has to stop
_KEEPALIVE = 0.5  # seconds between looks at the two sessions that only wait: one may have ended
_SECEDE_AFTER = 10  # waits for a range's turn, before its thread takes another task
_CHECK_EVERY = 50  # waits: the process that has the lock may be gone, and nobody else would say so


class Cluster(Team):
    """Workers elsewhere. ``max_connections`` bounds sessions on each database, ours included."""

    ranges_only = True

    def __init__(
        self, address: str, console: Console, jobs: int | None, max_connections: int | None
    ) -> None:
        self._client = connect_to(address)
        self._console = console
        most = way.at_work(max_connections)
        self._free_sessions = threading.Semaphore(most or 2**31)
        self._bounded = max_connections is not None
        self._alone = self._bounded and most == max_connections
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
                    self._free_sessions,
                    Sessions(alone=self._alone) as sessions,  # not the thread's, which keeps them
                ):
                    return load(definition, self._console, sessions, crew=crew)
            with self._free_sessions:
                return self._elsewhere(definition, load)

        with self._client:
            yield from self.run(definitions, one)

    def land(
        self, first: FirstLoad, source: Connection, destination: Connection, tally: Tally
    ) -> None:
        """Have the ranges landed, so many in flight as twice the workers' threads."""
        parts, key = first.blocks.ranges(), first.raw.target.key
        running: set[Future] = set()
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        source.execute("set local idle_in_transaction_session_timeout = 0")
        used = time.monotonic()
        try:
            while True:
                for part in self._next_parts(parts, running):
                    future = self._client.submit(
                        land_range,
                        first,
                        part,
                        looks=not self._bounded,
                        key=f"{key}-{first.run}-{part.number}",
                        priority=-part.number,  # the others wait for the one that is next
                        retries=_RETRIES,
                        pure=False,
                    )
                    running.add(future)
                    future.add_done_callback(done.put)
                if not running:
                    return
                with contextlib.suppress(queue.Empty):
                    future = done.get(timeout=_POLL)
                    running.remove(future)
                    self._free_sessions.release()
                    landed = value_of(future, key)
                    tally.read(landed.rows, landed.size)
                    tally.landed(landed)
                if self.stop:
                    raise self.stop
                if time.monotonic() > used + _KEEPALIVE:
                    used = time.monotonic()
                    source.execute("select")
                    destination.execute("select")
        finally:
            self._client.cancel(list(running))
            self._free_sessions.release(len(running)) if running else None

    def _next_parts(self, parts: Iterator[Range], running: set[Future]) -> Iterator[Range]:
        """Yield the ranges to be handed out now; wait only for the first one's sessions."""
        while len(running) < AHEAD * self._count_threads():
            if not self._free_sessions.acquire(blocking=not running):
                return
            part = next(parts, None)
            if part is None:
                self._free_sessions.release()
                return
            yield part

    def _count_threads(self) -> int:
        """Return how many ranges the workers can serve at once, now and then counted anew."""
        now = time.monotonic()
        if now > self._counted + 5:
            self._threads, self._counted = sum(self._client.nthreads().values()), now
        return max(self._threads, 1)

    def _elsewhere(self, definition: Definition, load: Callable[..., Result]) -> Result:
        done = threading.Event()
        future = self._client.submit(load_whole, load, definition, alone=self._bounded, pure=False)
        future.add_done_callback(lambda _: done.set())
        while not done.wait(_POLL):
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


def load_whole(load: Callable[..., Result], definition: Definition, *, alone: bool) -> Result:
    """Load a definition. Runs on a worker."""
    with Sessions(alone=alone) as sessions:
        return load(definition, Console(level="error"), sessions)


def land_range(first: FirstLoad, part: Range, *, looks: bool) -> Landed | ExporterError:
    """Land a range, or return why it cannot be landed. Runs on a worker.

    Raises psycopg.Error and DatabaseError, for what another try may mend.
    """
    try:
        with (
            connect("DATABASE_URL_ANALYTICS") as destination,
            connect(first.blocks.table.declared.variable) as source,
            way.watched(first.raw.target.key, source, destination, looks=looks),
            ranges.shared_snapshot(source, first),
        ):
            waits = _waits(destination, first.raw.target)
            (landed,) = ranges.land(
                first, source, destination, iter([part]), lambda *_: None, lambda: next(waits)
            )
            return landed
    except way.MakeWay as why:
        raise DatabaseError(str(why)) from None
    except DatabaseError:
        raise
    except ExporterError as error:
        return error


def _waits(destination: Connection, target: Destination) -> Iterator[None]:
    """Wait in steps while it is another range's turn. Raises LockedError where none will come."""
    from distributed import secede  # noqa: PLC0415  a worker has it already

    for step in itertools.count(1):
        time.sleep(ranges.POLL)
        if step == _SECEDE_AFTER:
            secede()
        if step % _CHECK_EVERY == 0 and state.holder(destination, target) is None:
            raise LockedError(f"{target.key}: the load whose ranges these are has ended")
        yield


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
