"""A line of ``exporter check``'s report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import psycopg

from exporter.errors import ExporterError
from exporter.wire import first_line


class Finding(NamedTuple):
    """One line of the report. ``status`` is ok, warn or fail; ``fix`` what to type if not ok."""

    status: str
    subject: str  # definitions, a database (core, analytics, …), or a definition's key
    check: str
    message: str
    fix: tuple[str, ...] = ()


def tried(subject: str, check: str, found: Iterable[Finding]) -> Iterator[Finding]:
    """Yield what a check finds; if it raises, a failure with the error."""
    try:
        yield from found
    except ExporterError as error:
        yield failure(subject, check, error)
    except psycopg.Error as error:
        yield Finding("fail", subject, check, first_line(error))


def failure(subject: str, check: str, error: ExporterError) -> Finding:
    """Return the finding that an error makes."""
    return Finding("fail", subject, check, error.message, (error.hint,) if error.hint else ())


def subject_of(variable: str) -> str:
    """Return what the report calls the database that a variable names."""
    return variable.removeprefix("DATABASE_URL_").lower()
