"""What became of the source's columns since the last load, and what that means for raw."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from psycopg import sql

from exporter.config import Destination
from exporter.errors import DriftError
from exporter.source import Column

_ORDER = (("smallint", "integer", "bigint", "numeric"), ("real", "double precision"))
_DIGITS = {"smallint": 5, "integer": 10, "bigint": 19}
_SIZED = {"numeric", "character varying", "bit varying", "interval"}
_SIZED |= {
    f"{kind} {zone} time zone" for kind in ("time", "timestamp") for zone in ("with", "without")
}


class Change(NamedTuple):
    """A statement that brings a column of raw nearer to its source, and what to tell of it."""

    statement: sql.Composed
    said: str
    column: str
    rewrites: bool = False


class Drift(NamedTuple):
    """``changes`` are for raw; ``gone`` the columns that the source lost and raw keeps, as NULL.

    ``remembered`` is what the next load compares with: column → type, None for one that is gone.
    """

    changes: tuple[Change, ...]
    gone: tuple[Column, ...]
    told: tuple[str, ...]
    remembered: dict[str, str | None]


def plan(
    target: Destination,
    columns: Sequence[Column],
    at_source: Sequence[str],
    existing: dict[str, str],
    remembered: dict[str, str | None] | None,
    *,
    may_rewrite: Callable[[], bool] = lambda: False,
) -> Drift:
    """Decide what is to be done for raw to take these columns.

    ``existing`` are raw's columns with their types. Where nothing is remembered the table is not
    ours, and its types are used as they are. ``may_rewrite`` tells whether raw is small enough for
    PostgreSQL to write it anew. Raises DriftError for what is not safe to do, and
    with ``schema: freeze`` for whatever has changed; the hint is the statement that would.
    """
    known = remembered or {}
    changes = []
    for column in columns:
        present = existing.get(column.name)
        before = known.get(column.name)
        if present is None:
            changes.append(_add(target, column))
        elif before is not None and before != column.base and not holds(present, column.raw_type):
            changes.append(_widen(target, column, present, str(before), may_rewrite))
    names = {column.name for column in columns}
    gone, told = [], []
    for name, before in known.items():
        if name in names or name in at_source or name not in existing:
            continue
        kept = existing[name]
        gone.append(Column(name, kept, kept, kept, False, False, expression="null"))
        if before is not None:
            told.append(_dropped(target, name))
    return Drift(
        tuple(changes),
        tuple(gone),
        tuple(told),
        {c.name: c.base for c in columns} | dict.fromkeys(c.name for c in gone),
    )


def _add(target: Destination, column: Column) -> Change:
    statement = _alter(target, "add column {name} {type}", column.name, column.raw_type)
    refuse_if_frozen(target, f"{target} has no column {column.name}", statement)
    said = (
        f"new column {column.name} {column.raw_type}: rows that landed before have NULL in it;"
        f" exporter load {target.key} --full-refresh fills them"
    )
    return Change(statement, said, column.name)


def _widen(
    target: Destination,
    column: Column,
    present: str,
    before: str,
    may_rewrite: Callable[[], bool],
) -> Change:
    kind = column.raw_type
    what = (
        f"column {column.name} was {before} at the source and is {column.base} now,"
        f" {target} has {present}"
    )
    action = "alter column {name} type {type}"
    rewrites = not widens(present, kind)
    using = " using {name}::{type}" if rewrites else ""
    statement = _alter(target, action + using, column.name, kind)
    if rewrites and not (keeps_values(present, kind) and may_rewrite()):
        raise DriftError(f"{target.key}: {what}", hint=statement.as_string(None))
    refuse_if_frozen(target, what, statement)
    said = f"column {column.name} widened from {present} to {kind}"
    return Change(statement, said, column.name, rewrites)


def _dropped(target: Destination, name: str) -> str:
    what = f"the source has no column {name} any more"
    refuse_if_frozen(target, what, _alter(target, "drop column {name}", name))
    return f"{what}: raw keeps it, and has NULL in it from now on"


def refuse_if_frozen(target: Destination, what: str, statement: sql.Composed) -> None:
    """Raise DriftError where ``schema: freeze`` leaves a change to the person who reads it."""
    if target.evolution == "freeze":
        raise DriftError(
            f"{target.key}: {what}, and exporter.schema is freeze", hint=statement.as_string(None)
        )


def _alter(target: Destination, action: str, column: str, kind: str = "") -> sql.Composed:
    return sql.SQL("alter table {} ").format(target.name) + sql.SQL(action).format(
        name=sql.Identifier(column), type=sql.SQL(kind)
    )


def holds(raw: str, source: str) -> bool:
    """Whether every value of the source's type has a place in raw's, as it is."""
    for order in _ORDER:
        if raw in order and source in order:
            return order.index(source) <= order.index(raw)
    return raw == source or widens(source, raw)


def keeps_values(old: str, new: str) -> bool:
    """Whether every value of a type is the same in another, though the table is written anew."""
    (kind, size), (new_kind, new_size) = _parsed(old), _parsed(new)
    if kind == new_kind == "numeric" and size and new_size:
        return size[1] <= new_size[1] and size[0] - size[1] <= new_size[0] - new_size[1]
    if new_kind == "numeric" and new_size:  # of an integer: as many digits before the point
        return _DIGITS.get(kind, 1000) <= new_size[0] - new_size[1]
    return holds(new, old)


def widens(old: str, new: str) -> bool:
    """Whether PostgreSQL changes the type without writing the table anew, and nothing is lost."""
    (kind, size), (new_kind, new_size) = _parsed(old), _parsed(new)
    if kind != new_kind:
        texts = {"text", "character varying"}
        return {kind, new_kind} == texts and new_size is None
    if kind not in _SIZED or size == new_size:
        return size == new_size
    if new_size is None or size is None:
        return new_size is None
    return size[0] <= new_size[0] and size[1:] == new_size[1:]


def _parsed(kind: str) -> tuple[str, tuple[int, ...] | None]:
    """`numeric(10,2)` → `numeric`, (10, 2); `timestamp(3) with time zone` likewise."""
    found = re.search(r"\(([\d,-]+)\)", kind)
    if found is None:
        return kind, None
    size = tuple(int(part) for part in found[1].split(","))
    return kind[: found.start()] + kind[found.end() :], size
