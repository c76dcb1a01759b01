"""Copies rows of Python into a temporary table, batch by batch, in constant memory.

A column's type comes from the model's YAML, else from the column of the same name that was read,
else from its values. In the last case the column is staged as text, and the query that is returned
casts it: so even the last row may still give the type, or widen it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from itertools import islice
from operator import itemgetter
from typing import Any

import psycopg2

from exporter.python_models import natives, values
from exporter.python_models.natives import UnfitError
from exporter.python_models.relation import Session
from exporter.python_models.values import BATCH, ResultError, quoted

TABLE = "__dbt_python_rows"


@dataclass(frozen=True)
class Known:
    """The PostgreSQL types that are known before the rows, by column.

    `declared` in YAML, `origin` of the columns that were read, `own` of the model's table where
    it is incremental, `exact` of a frame.
    """

    declared: dict[str, str]
    origin: dict[str, str]
    own: dict[str, str]
    exact: dict[str, str] = field(default_factory=dict)


@dataclass
class Column:
    """One column of the result. `kind` is its type, `staged` that in the temporary table.

    An `inferred` kind comes from values, and may become wider.
    """

    name: str
    kind: str | None
    staged: str = "text"
    inferred: bool = False
    encoder: Mapping[Any, Any] = field(default_factory=lambda: values.TEXT)

    @property
    def quoted(self) -> str:
        """The name as an identifier of SQL, in quotes."""
        return quoted(self.name)

    @property
    def selected(self) -> str:
        """The column in the query that returns the result."""
        if self.staged == self.kind:
            return self.quoted
        return f"{self.quoted}::{self.kind} as {self.quoted}"


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
            described = _Rows(batch, read, key)
            found = _natives(columns, _values(batch, columns, known, read), described)
            _infer_types(columns, found, known, read)
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
        columns = [_column(name, known) for name in known_names]
    for column in columns:
        column.kind = column.kind or _known_type(column.name, known)
    if not read:
        _create(session, columns)
    return f"select {', '.join(c.selected for c in columns)} from pg_temp.{TABLE}"


def _batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    kept = (row for row in rows if row is not None)  # None: a row function left the row out
    while batch := list(islice(kept, BATCH)):
        yield batch


def _values(
    batch: list[Any], columns: list[Column], known: Known, read: int
) -> list[tuple[Any, ...]]:
    """Return the rows' values in the order of `columns`, which the first batch fills."""
    for kind in set(map(type, batch)):
        if not issubclass(kind, Mapping):
            number = next(n for n, row in enumerate(batch) if type(row) is kind) + read + 1
            raise ResultError(f"row {number} is a {kind.__name__}: a row is a dict, or None")
    if not columns:
        names = dict.fromkeys(name for row in batch for name in row)
        columns.extend(_column(str(name), known) for name in names)
    names_of = [column.name for column in columns]
    size = len(names_of)
    get = itemgetter(*names_of) if size > 1 else lambda row: (row[names_of[0]],)
    found = []
    for row in batch:
        try:
            if len(row) > size:
                raise KeyError
            found.append(get(row))
        except KeyError:
            unknown = [name for name in row if name not in names_of]
            if unknown:
                raise ResultError(
                    f"row {read + len(found) + 1} has a column {unknown[0]!r} that the first"
                    f" {BATCH:,} rows do not have: give every row the same columns"
                ) from None
            found.append(tuple(row.get(name) for name in names_of))
    return found


def _natives(
    columns: list[Column], rows: list[tuple[Any, ...]], described: _Rows
) -> list[tuple[Any, ...]]:
    """Return each column's values, those of numpy as Python's. Raises ResultError."""
    found = list(zip(*rows))  # noqa: B905  of one length
    if "numpy" not in sys.modules:
        return found
    for number, present in enumerate(found):
        if not any(map(natives.of_numpy, set(map(type, present)))):
            continue
        plain = []
        for place, value in enumerate(present):
            try:
                plain.append(natives.native(value))
            except UnfitError as error:
                raise ResultError(
                    f"column {columns[number].name!r} has {error}: {described.name(place)}"
                ) from None
        found[number] = tuple(plain)
    return found


def _column(name: str, known: Known) -> Column:
    fixed = known.declared.get(name) or known.exact.get(name)
    if fixed is None:
        return Column(name, None)
    # A frame's column of jsonb holds JSON as text already.
    encoder = values.TEXT if name in known.exact else values.encoders(fixed)
    return Column(name, fixed, fixed, encoder=encoder)


def _known_type(name: str, known: Known) -> str:
    found = known.origin.get(name) or known.own.get(name)
    if found is None:
        raise ResultError(
            f"column {name!r} is null in every row, so nothing tells its type: write it in the"
            f" model's YAML\n  columns:\n    - name: {name}\n      data_type: text"
        )
    return found


def _infer_types(
    columns: list[Column], found: list[tuple[Any, ...]], known: Known, read: int
) -> None:
    """Infer types from values: from a column's first one, then wider ones."""
    for column, column_values in zip(columns, found):  # noqa: B905  of one length
        if column.kind is not None and not column.inferred:
            continue
        present = [value for value in column_values if value is not None]
        if not present:
            continue
        origin = known.origin.get(column.name)
        if column.kind is None and origin and values.fits(present[0], origin):
            column.kind, column.encoder = origin, values.encoders(origin)
            if not read:
                column.staged = origin
            continue
        for kind in _types(present, column.name):
            wider = values.common_type(column.kind, kind)
            if wider is None:
                raise ResultError(
                    f"column {column.name!r} has values of type {column.kind} and of type {kind}:"
                    " make them one, or write its data_type in the model's YAML"
                )
            column.kind, column.inferred = wider, True
            column.encoder = values.encoders(wider)


def _types(present: list[Any], name: str) -> set[str]:
    found = set()
    try:
        for kind in set(map(type, present)):
            if issubclass(kind, (int, datetime, Enum)):  # the type depends on the value
                found |= {values.type_of(value) for value in present if type(value) is kind}
            else:
                found.add(values.type_of(next(v for v in present if type(v) is kind)))
    except UnfitError as error:
        raise ResultError(
            f"column {name!r} has {error}: no type of PostgreSQL is known for it; "
            "convert it, or write its data_type in the model's YAML"
        ) from None
    return found


def _create(session: Session, columns: Sequence[Column]) -> None:
    if not columns:
        raise ResultError("the model's rows have no column")
    defined = ", ".join(f"{column.quoted} {column.staged}" for column in columns)
    session.execute(f"create temporary table {TABLE} ({defined}) on commit drop")


# --- encode and copy ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch, for error messages."""

    rows: list[Any]
    read: int
    key: list[str]

    def name(self, place: int) -> str:
        """Return `row 17, id = 4` for the row at a place of the batch."""
        row = self.rows[place]
        named = "".join(f", {name} = {row[name]!r}" for name in self.key if name in row)
        return f"row {self.read + place + 1}{named}"


class _Copying:
    """One COPY at a time; the server works on it while the next batch is encoded."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._begun: tuple[Future[None], _Rows] | None = None

    def begin(self, columns: list[Column], found: list[tuple[Any, ...]], rows: _Rows) -> None:
        texts = [
            _encoded(column, column_values, rows)
            for column, column_values in zip(columns, found)  # noqa: B905  of one length
        ]
        data = "\n".join(map("\t".join, zip(*texts))).encode()  # noqa: B905
        self.end()
        names = ", ".join(column.quoted for column in columns)
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


def _encoded(column: Column, present: tuple[Any, ...], rows: _Rows) -> Sequence[str]:
    """Return the values of a column as COPY's text. Raises ResultError."""
    kinds = set(map(type, present))
    encoder = column.encoder
    try:
        if kinds <= {str, type(None)} and encoder is values.TEXT:
            return values.texts(present)
        if encoder is values.JSON:
            return values.texts(values.json_texts(present))
        if len(kinds) == 1:
            return list(map(encoder[kinds.pop()], present))
        return [encoder[type(value)](value) for value in present]
    except UnfitError:
        for place, value in enumerate(present):
            try:
                encoder[type(value)](value)
            except UnfitError as error:
                raise ResultError(
                    f"column {column.name!r} cannot hold {error}: {rows.name(place)}"
                ) from None
        raise


_LINE = re.compile(r"line (\d+)(?:, column (.+?)(?::|$))?")


def _refused(error: psycopg2.Error, rows: _Rows) -> str:
    """Return PostgreSQL's message without the value that it quotes, and with the row's key."""
    what = re.sub(r':? ".*"', "", error.diag.message_primary or str(error), flags=re.DOTALL)
    where = _LINE.search(error.diag.context or "")
    if where is None:
        return what
    column = f"column {where[2]!r}: " if where[2] else ""
    return f"{column}{what}: {rows.name(int(where[1]) - 1)}"
