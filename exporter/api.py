"""Loads from Python, for orchestrators: what ``exporter load`` does, with results, not text.

The name ``exporter.load`` itself is taken, by the room that does the work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from exporter.commands.load import with_batch_size
from exporter.commands.shared import Call
from exporter.errors import StoppedError, UsageError
from exporter.load import MOST_DELETES
from exporter.load import one as loads
from exporter.source import NEW, Wanted
from exporter.state import Result
from exporter.terminal import Console
from exporter.wire import Sessions

__all__ = ["Result", "load"]

_one_at_a_time = threading.Lock()


def load(
    keys: Sequence[str] = (), *, project_dir: str | Path = ".", full_refresh: bool = False
) -> list[Result]:
    """Land what is new of the definitions that the keys, patterns and tags name; without any, all.

    Returns a result for each definition that was begun. What a result can carry is not raised: see
    its ``error``. Raises UsageError, ProjectError, DefinitionError and SettingError before anything
    is touched.

    A project's environment holds for its call alone; so in one process one call waits for another.
    """
    if isinstance(keys, str):
        raise TypeError(f'keys is a list of keys: ["{keys}"]')
    wanted = Wanted(True, None, MOST_DELETES) if full_refresh else NEW
    results = []
    console = Console()
    with _one_at_a_time, _own_environment():
        try:
            chosen = with_batch_size(Call(Path(project_dir), None, console).definitions((*keys,)))
            for definition in chosen:
                if definition.source.read == "changes":
                    raise UsageError(
                        f"{definition.where}: {definition.key} is read by its changes, which only"
                        " the command does",
                        hint=f"exporter load {definition.key}",
                    )
            with Sessions() as sessions:
                for definition in chosen:
                    result = loads.load(definition, console, sessions, wanted=wanted)
                    console.ended(result, as_json=False)
                    results.append(result)
                    if isinstance(result.error, StoppedError):
                        break
        finally:
            console.close()
    return results


@contextmanager
def _own_environment() -> Iterator[None]:
    """Forget afterwards what the project's .env file and profile have set: another has its own."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
