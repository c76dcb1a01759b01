"""The columns of dicts: found, typed and encoded, some rows at a time.

A column's type is what is declared for it, else that of the column which has its name and whose
values look like it, else that of its values: so even the last row may still give it, or widen it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from operator import itemgetter
from typing import Any

from exporter.values import natives, text, types
from exporter.values.natives import UnfitError


class ResultError(Exception):
    """Rows that cannot become a table; str() says why, and what to write instead."""


@dataclass(frozen=True)
class Known:
    """The PostgreSQL types that are known before the rows, by column.

    `declared` in YAML, `origin` of the columns that were read, `own` of the model's table where
    it is incremental, `exact` of a frame.
    """

    declared: dict[str, str]
    origin: dict[str, str]
    own: dict[str, str] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)


@dataclass
class Column:
    """One column of the rows. `kind` is its type, `staged` that in a staging table.

    An `inferred` kind comes from values, and may become wider.
    """

    name: str
    kind: str | None
    staged: str = "text"
    inferred: bool = False
    encoder: Mapping[Any, Any] = field(default_factory=lambda: text.TEXT)


@dataclass(frozen=True)
class Rows:
    """Some rows, of which so many were `read` before; `key` names them in error messages."""

    rows: list[Any]
    read: int
    key: Sequence[str]

    def name(self, place: int) -> str:
        """Return `row 17, id = 4` for the row at a place."""
        row = self.rows[place]
        named = "".join(f", {name} = {row[name]!r}" for name in self.key if name in row)
        return f"row {self.read + place + 1}{named}"


def column(name: str, known: Known) -> Column:
    """Return a column of which no value has been seen."""
    fixed = known.declared.get(name) or known.exact.get(name)
    if fixed is None:
        return Column(name, None)
    # A frame's column of jsonb holds JSON as text already.
    encoder = text.TEXT if name in known.exact else text.encoders(fixed)
    return Column(name, fixed, fixed, encoder=encoder)


def take(
    rows: Rows, columns: list[Column], known: Known, *, grows: bool = False
) -> list[tuple[Any, ...]]:
    """Return the values of each column, whose types they give or widen. Raises ResultError.

    The first rows fill `columns`; later ones have no others, unless the table `grows` by them.
    """
    found = _natives(columns, _values(rows, columns, known, grows=grows or not columns), rows)
    for one, present in zip(columns, found):  # noqa: B905  of one length
        _infer_type(one, present, known, fresh=not rows.read)
    return found


def encoded(columns: Sequence[Column], found: list[tuple[Any, ...]], rows: Rows) -> bytes:
    """Return rows as COPY's text, without the last line's end. Raises ResultError."""
    texts = [_encoded(one, present, rows) for one, present in zip(columns, found)]  # noqa: B905
    return "\n".join(map("\t".join, zip(*texts))).encode()  # noqa: B905


def _values(
    rows: Rows, columns: list[Column], known: Known, *, grows: bool
) -> list[tuple[Any, ...]]:
    """Return the rows' values in the order of `columns`, and complete these."""
    batch = rows.rows
    for kind in set(map(type, batch)):
        if not issubclass(kind, Mapping):
            number = next(n for n, row in enumerate(batch) if type(row) is kind) + rows.read + 1
            raise ResultError(f"row {number} is a {kind.__name__}: a row is a dict")
    if grows:
        names = {one.name for one in columns}
        for name in dict.fromkeys(name for row in batch for name in row if name not in names):
            if not isinstance(name, str):
                raise ResultError(
                    f"a row has a key of type {type(name).__name__}: the name of a column is a str"
                )
            columns.append(column(name, known))
    names_of = [one.name for one in columns]
    size = len(names_of)
    if not size:
        raise ResultError("the rows have no column")
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
                    f"row {rows.read + len(found) + 1} has a column {unknown[0]!r} that the first"
                    f" {rows.read:,} rows do not have: give every row the same columns"
                ) from None
            found.append(tuple(row.get(name) for name in names_of))
    return found


def _natives(
    columns: list[Column], values: list[tuple[Any, ...]], rows: Rows
) -> list[tuple[Any, ...]]:
    """Return each column's values, those of numpy as Python's. Raises ResultError."""
    found = list(zip(*values))  # noqa: B905  of one length
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
                    f"column {columns[number].name!r} has {error}: {rows.name(place)}"
                ) from None
        found[number] = tuple(plain)
    return found


def _infer_type(one: Column, values: tuple[Any, ...], known: Known, *, fresh: bool) -> None:
    """Infer a column's type from its first value, then a wider one."""
    if one.kind is not None and not one.inferred:
        return
    present = [value for value in values if value is not None]
    if not present:
        return
    origin = known.origin.get(one.name)
    if one.kind is None and origin and types.fits(present[0], origin):
        one.kind, one.encoder = origin, text.encoders(origin)
        if fresh:
            one.staged = origin
        return
    for kind in _types(present, one.name):
        wider = types.common_type(one.kind, kind)
        if wider is None:
            raise ResultError(
                f"column {one.name!r} has values of type {one.kind} and of type {kind}:"
                " make them one, or write its data_type in the YAML"
            )
        one.kind, one.inferred = wider, True
        one.encoder = text.encoders(wider)


def _types(present: list[Any], name: str) -> set[str]:
    found = set()
    try:
        for kind in set(map(type, present)):
            if issubclass(kind, (int, datetime, Enum)):  # the type depends on the value
                found |= {types.type_of(value) for value in present if type(value) is kind}
            else:
                found.add(types.type_of(next(v for v in present if type(v) is kind)))
    except UnfitError as error:
        raise ResultError(
            f"column {name!r} has {error}: no type of PostgreSQL is known for it; "
            "convert it, or write its data_type in the YAML"
        ) from None
    return found


def _encoded(one: Column, present: tuple[Any, ...], rows: Rows) -> Sequence[str]:
    """Return the values of a column as COPY's text. Raises ResultError."""
    kinds = set(map(type, present))
    encoder = one.encoder
    try:
        if kinds <= {str, type(None)} and encoder is text.TEXT:
            return text.texts(present)
        if encoder is text.JSON:
            return text.texts(text.json_texts(present))
        if len(kinds) == 1:
            return list(map(encoder[kinds.pop()], present))
        return [encoder[type(value)](value) for value in present]
    except UnfitError:
        for place, value in enumerate(present):
            try:
                encoder[type(value)](value)
            except UnfitError as error:
                raise ResultError(
                    f"column {one.name!r} cannot hold {error}: {rows.name(place)}"
                ) from None
        raise
