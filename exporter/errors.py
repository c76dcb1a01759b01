"""Every error that a user can meet.

::

    ExporterError               exit status 1
    ├── UsageError              exit status 2: nothing was touched
    │   ├── ProjectError        no dbt project here, or none of its files declares a table
    │   ├── DefinitionError     a wrong definition: file, line, key, the right spelling
    │   └── SettingError        a missing or malformed URL, .env file or dbt profile
    ├── LockedError             exit status 3: another run holds the definition's lock
    ├── DatabaseError           a server cannot be reached, or refuses
    ├── ClusterError            the Dask cluster cannot be reached, or lost what it was given
    ├── SourceError             the source table is not what the definition says
    ├── DriftError              the raw table and the source no longer fit
    ├── RowError                a row that the destination refuses
    ├── StoppedError            exit status 130: Ctrl-C
    │   └── TerminatedError     exit status 143: SIGTERM
    └── ServerError             the embedded server of the demo and the tests

An error says what happened, where, and (``hint``) what to do next. It never contains a password
or the content of a row beyond its key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_STATUSES = {
    0: "it ended well",
    1: "something failed; of several loads, the others still ran",
    2: "wrong usage or a wrong definition; nothing was touched",
    3: "another run holds the definition's lock",
    130: "Ctrl-C; what has landed stays",
    143: "SIGTERM; what has landed stays",
}


def exit_status(statuses: Sequence[int]) -> int:
    """Return the exit status of a command from the statuses of its errors, one a definition."""
    for status in statuses:
        if status > 128:  # stopped by a signal
            return status
    return statuses[0] if len(set(statuses)) == 1 else int(bool(statuses))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return advice on an unknown name: the nearest known one, else a list of the known ones."""
    names = list(known)
    by_folded = {name.lower(): name for name in names}
    found = difflib.get_close_matches(name.lower(), by_folded, 1, 0.5)
    if found:
        return f"did you mean {by_folded[found[0]]}?"
    return "known: " + ", ".join(names[:20]) if names else "there is none"


class ExporterError(Exception):
    """What went wrong; ``hint`` says what to do next."""

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


class UsageError(ExporterError):
    """The call or the declaration is wrong; nothing was touched."""

    exit_status = 2


class ProjectError(UsageError):
    """There is no dbt project here, or nothing in it is declared for the exporter."""


class DefinitionError(UsageError):
    """A definition is wrong. The message names the file, the line and the key."""


class SettingError(UsageError):
    """A URL, a ``.env`` file or a dbt profile is missing or malformed."""


class LockedError(ExporterError):
    """Another run holds the lock of this definition."""

    exit_status = 3


class DatabaseError(ExporterError):
    """A server cannot be reached, or refused a statement."""


class ClusterError(ExporterError):
    """The Dask cluster cannot be reached, or lost what it was given."""


class SourceError(ExporterError):
    """The source table is not what the definition says it is."""


class DriftError(ExporterError):
    """The raw table and its source no longer fit together."""


class RowError(ExporterError):
    """The destination refused a row. The message names batch, key and column, never the content."""


class StoppedError(ExporterError):
    """Ctrl-C. The batch that was under way is rolled back, those before it stay."""

    exit_status = 130


class TerminatedError(StoppedError):
    """SIGTERM, from an orchestrator or a shutdown; as with Ctrl-C."""

    exit_status = 143


class ServerError(ExporterError):
    """The embedded server cannot run here."""
