"""Copies rows of Python into a temporary table, batch by batch, in constant memory.

A column's type comes from the model's YAML, else from the column of the same name that was read,
else from its values. In the last case the column is staged as text, and the query that is returned
casts it: so even the last row may still give the type, or widen it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any

import psycopg2

from exporter.python_models.relation import Session
from exporter.python_models.values import BATCH, quoted
from exporter.values.columns import Column, Known, ResultError, Rows, column, encoded, take

TABLE = "__dbt_python_rows"


def stage(session: Session, rows: Iterable[Any], known: Known, key: list[str]) -> str:
    """Put rows (dicts) into a temporary table; return the query that reads them.

    Raises ResultError; for a value that a column cannot hold, it names the column, and the number
    and the `key` of its row.
    """
    session.execute(f"drop table if exists pg_temp.{TABLE}")
    columns: list[Column] = []
    copying = _Copying(session)
    read = 0
    try:
        for batch in _batches(rows):
            described = Rows(batch, read, key)
            found = take(described, columns, known)
            if not read:
                _create(session, columns)
            copying.begin(columns, found, described)
            read += len(batch)
    finally:
        copying.end()  # whatever happened: if a COPY failed, its error is the one to raise
    if not read:
        known_names = known.exact or known.own or known.declared
        if not known_names:
            raise ResultError(
                "the model returned no row, so its columns are unknown: name them, each with its"
                " data_type, in the model's YAML"
            )
        columns = [column(name, known) for name in known_names]
    for one in columns:
        one.kind = one.kind or _known_type(one.name, known)
    if not read:
        _create(session, columns)
    return f"select {', '.join(map(_selected, columns))} from pg_temp.{TABLE}"


def _batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    kept = (row for row in rows if row is not None)  # None: a row function left the row out
    while batch := list(islice(kept, BATCH)):
        yield batch


def _known_type(name: str, known: Known) -> str:
    found = known.origin.get(name) or known.own.get(name)
    if found is None:
        raise ResultError(
            f"column {name!r} is null in every row, so nothing tells its type: write it in the"
            f" model's YAML\n  columns:\n    - name: {name}\n      data_type: text"
        )
    return found


def _selected(one: Column) -> str:
    """Return a column in the query that returns the result."""
    name = quoted(one.name)
    return name if one.staged == one.kind else f"{name}::{one.kind} as {name}"


def _create(session: Session, columns: Sequence[Column]) -> None:
    if not columns:
        raise ResultError("the model's rows have no column")
    defined = ", ".join(f"{quoted(one.name)} {one.staged}" for one in columns)
    session.execute(f"create temporary table {TABLE} ({defined}) on commit drop")


class _Copying:
    """One COPY at a time; the server works on it while the next batch is encoded."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._begun: tuple[Future[None], Rows] | None = None

    def begin(self, columns: list[Column], found: list[tuple[Any, ...]], rows: Rows) -> None:
        data = encoded(columns, found, rows)
        self.end()
        names = ", ".join(quoted(one.name) for one in columns)
        copied = self._session.copy(f"copy pg_temp.{TABLE} ({names}) from stdin", data)
        self._begun = copied, rows

    def end(self) -> None:
        """Wait for the last COPY. Raises ResultError with the row that PostgreSQL refused."""
        if self._begun is not None:
            copied, rows = self._begun
            try:
                copied.result()
            except psycopg2.Error as error:
                raise ResultError(_refused(error, rows)) from None


_LINE = re.compile(r"line (\d+)(?:, column (.+?)(?::|$))?")


def _refused(error: psycopg2.Error, rows: Rows) -> str:
    """Return PostgreSQL's message without the value that it quotes, and with the row's key."""
    what = re.sub(r':? ".*"', "", error.diag.message_primary or str(error), flags=re.DOTALL)
    where = _LINE.search(error.diag.context or "")
    if where is None:
        return what
    column = f"column {where[2]!r}: " if where[2] else ""
    return f"{column}{what}: {rows.name(int(where[1]) - 1)}"
