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
    settled: set[type] = field(default_factory=lambda: {type(None)})  # say nothing new of its type


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


_VARIED = (int, datetime, Enum)  # whose PostgreSQL type depends on the value


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

    The first rows fill `columns`; later ones have no others, unless the table `grows` by them: then
    nothing is staged yet, and whatever comes may give a column a wider type than it had before.
    """
    found = _natives(columns, _values(rows, columns, known, grows=grows or not columns), rows)
    for one, values in zip(columns, found):  # noqa: B905  of one length
        if one.kind is None or one.inferred or (grows and one.name not in known.declared):
            new = set(map(type, values)) - one.settled
            if not new:
                continue
            one.settled |= {kind for kind in new if kind is bool or not issubclass(kind, _VARIED)}
            present = [value for value in values if value is not None]
            if present and not _has_origin(
                one, present, known, firm=not grows, first=not rows.read
            ):
                _infer_type(one, present)
    return found


def encoded(columns: Sequence[Column], found: list[tuple[Any, ...]], rows: Rows) -> bytes:
    """Return rows as COPY's text, without the last line's end. Raises ResultError."""
    texts = [_encoded(one, present, rows) for one, present in zip(columns, found)]  # noqa: B905
    try:
        return "\n".join(map("\t".join, zip(*texts))).encode()  # noqa: B905
    except UnicodeEncodeError:
        for one, present in zip(columns, texts):  # noqa: B905
            for place, value in enumerate(present):
                if not value.isascii() and value.encode(errors="ignore").decode() != value:
                    raise ResultError(
                        f"column {one.name!r} cannot hold half of a character (a surrogate):"
                        f" {rows.name(place)}"
                    ) from None
        raise


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


def _has_origin(one: Column, present: list[Any], known: Known, *, firm: bool, first: bool) -> bool:
    """Whether a column has the type of the one of its name: if its first value looks like it.

    Where that is not `firm`, all values have to, the later ones, too.
    """
    origin = known.origin.get(one.name)
    if origin is None or one.inferred:
        return False
    if all(types.fits(value, origin) for value in ([present[0]] if firm else _samples(present))):
        one.kind, one.encoder = origin, text.encoders(origin)
        if first:
            one.staged = origin
        return True
    if not firm:
        one.kind = types.plain(origin)
    return False


def _infer_type(one: Column, present: list[Any]) -> None:
    """Infer a column's type from its first values, then a wider one."""
    try:
        kinds = set(map(types.type_of, _samples(present)))
    except UnfitError as error:
        raise ResultError(
            f"column {one.name!r} has {error}: no type of PostgreSQL is known for it; "
            "convert it, or write its data_type in the YAML"
        ) from None
    for kind in kinds:
        wider = types.common_type(one.kind, kind)
        if wider is None:
            raise ResultError(
                f"column {one.name!r} has values of type {one.kind} and of type {kind}:"
                " make them one, or write its data_type in the YAML"
            )
        one.kind, one.inferred = wider, True
        one.encoder = text.encoders(wider)


def _samples(present: list[Any]) -> list[Any]:
    """Return values of which one at least has each type that these have."""
    found = []
    for kind in set(map(type, present)):
        of_kind: list[Any] = [value for value in present if type(value) is kind]
        if kind is int:  # the type depends on the value
            of_kind = [min(of_kind), max(of_kind)]
        elif issubclass(kind, datetime):
            of_kind = [*{value.tzinfo is None: value for value in of_kind}.values()]
        elif not issubclass(kind, _VARIED):
            del of_kind[1:]
        found += of_kind
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
