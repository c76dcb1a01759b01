"""Runs a row function on the workers of a Dask cluster that a model's `meta.scheduler` names.

The rows pass through this process: a model reads and writes in dbt's own transaction, which no
other session can see.
"""

from __future__ import annotations

import functools
import pickle
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from exporter.load.cluster import AHEAD, connect_to, value_of

Rows = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Workers:
    """The cluster's workers; `module` is the model's, which no worker can import."""

    scheduler: str
    module: types.ModuleType

    def map(
        self, function: Callable[[dict[str, Any]], Any], names: list[str], lists: Iterable[Rows]
    ) -> Iterator[tuple[Rows, list[Any], str | None]]:
        """Yield each list of rows, their results, and why the row after those failed, if it did.

        In order; some lists are in flight. Raises ClusterError.
        """
        with connect_to(self.scheduler) as client:
            sent = _pickled(function, self.module)
            most = AHEAD * sum(client.nthreads().values())
            running: deque[tuple[Rows, Any]] = deque()

            def oldest() -> tuple[Rows, list[Any], str | None]:
                rows, future = running.popleft()
                return rows, *value_of(future, self.module.__name__)

            for rows in lists:
                running.append((rows, client.submit(apply, sent, names, rows, pure=False)))
                if len(running) >= most:
                    yield oldest()
            while running:
                yield oldest()


def _pickled(function: Callable[..., Any], module: types.ModuleType) -> bytes:
    import cloudpickle  # Dask's own; pickle would send the name of the model's module alone

    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(function))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def apply(sent: bytes, names: list[str], rows: Rows) -> tuple[list[Any], str | None]:
    """Run on a worker: return the results up to a row at which the function fails, and why."""
    function = _function(sent)
    done: list[Any] = []
    for row in rows:
        try:
            done.append(function(dict(zip(names, row))))  # noqa: B905  of one length
        except Exception as error:  # noqa: BLE001  the user's own, told with its row
            return done, f"{type(error).__name__}: {error}"
    return done, None


@functools.lru_cache(maxsize=4)
def _function(sent: bytes) -> Any:
    return pickle.loads(sent)  # noqa: S301  from whoever may run code here anyway
