"""A table as the changes of a slot need it, and what of them its copy shows already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from exporter.errors import SourceError
from exporter.source.pgoutput import Relation


class Snapshot(NamedTuple):
    """What was visible when a table was copied, as ``pg_current_snapshot()`` tells it."""

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def of_text(cls, text: str) -> Snapshot:
        """Return the snapshot that PostgreSQL spells so."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, filter(None, running.split(",")))))

    def shows(self, xid: int) -> bool:
        """Tell whether a top-level transaction, of which 32 bits are known, is visible."""
        whole = whole_xid(xid, self.xmax)
        return whole < self.xmax and whole not in self.running


class Member(NamedTuple):
    """A table whose changes land. ``columns`` are raw's; None stands for one the source lost.

    ``known`` are all columns that the source has now. Changes that the ``snapshot`` shows are in
    raw already; ``resumed``: parts of the copy are of a later one. Of a table that keeps its
    versions, ``near`` is a transaction id of now.
    """

    key: str
    oid: int
    columns: tuple[str | None, ...]
    keys: tuple[str, ...]
    known: frozenset[str]
    snapshot: Snapshot | None = None
    resumed: bool = False
    near: int | None = None


def unkeyed(member: Member, relation: Relation) -> list[str]:
    """Return the columns of the key by which changes of this description do not tell their rows."""
    told = relation.told or relation.columns  # a table without an identity has but new rows
    return [name for name in member.keys if name not in relation.columns or name not in told]


def refuse_unkeyed(key: str, names: Sequence[str]) -> NoReturn:
    """Raise SourceError: which rows the changes are of cannot be told."""
    raise SourceError(
        f"{key}: the changes lack {', '.join(names)}, a column of the key: the replica identity, or"
        " the column, was another one when they were made",
        hint=f"exporter load {key} --full-refresh",
    )


def whole_xid(xid: int, near: int) -> int:
    """Return the transaction id of which 32 bits are known, and another one is near."""
    return near + (xid - near + 2**31) % 2**32 - 2**31
