"""A table as the changes of a slot need it, and what of them its copy shows already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from exporter.errors import SourceError
from exporter.source.pgoutput import Relation
from exporter.wire.replication import lsn_number, lsn_text

_HEADER = 40  # bytes: a record may begin so far behind the one before, at a page of the WAL


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

    def shows(self, xid: int, lsn: int) -> bool:
        """Tell whether a top-level transaction, of which 32 bits are known, is visible."""
        whole = whole_xid(xid, self.xmax)
        return whole < self.xmax and whole not in self.running

    def doubts(self, lsn: int) -> bool:
        """Tell whether it may be visible though it is not shown: that is never so."""
        del lsn
        return False


class Replayed(NamedTuple):
    """What was visible on a standby, by the positions replayed before and after the snapshot.

    ``pg_current_snapshot()`` names no transaction that runs on the primary. But transactions become
    visible there in the order of their commits.
    """

    before: int
    after: int

    @classmethod
    def of_text(cls, text: str) -> Replayed:
        """Return what ``text`` has been made of."""
        before, _, after = text.partition("-")
        return cls(lsn_number(before), lsn_number(after))

    @property
    def text(self) -> str:
        """Return it as it is stored."""
        return f"{lsn_text(self.before)}-{lsn_text(self.after)}"

    def shows(self, xid: int, lsn: int) -> bool:
        """Tell whether a transaction that was committed there is visible for sure."""
        del xid
        return lsn < self.before

    def doubts(self, lsn: int) -> bool:
        """Tell whether it may be visible: it was replayed meanwhile, or was just being replayed."""
        return lsn <= self.after + _HEADER


def snapshot_of(text: str | None) -> Snapshot | Replayed | None:
    """Return the snapshot that is stored so."""
    if text is None:
        return None
    return Replayed.of_text(text) if "-" in text else Snapshot.of_text(text)


class Member(NamedTuple):
    """A table whose changes land. ``columns`` are raw's; None stands for one the source lost.

    ``known`` are all columns that the source has now. Changes that the ``snapshot`` shows are in
    raw already; ``resumed``: parts of the copy are of a later one. Of a table that keeps its
    versions, ``near`` is a transaction id of now. Where the changes come in binary, ``types`` are
    those that the source's columns have now.
    """

    key: str
    oid: int
    columns: tuple[str | None, ...]
    keys: tuple[str, ...]
    known: frozenset[str]
    snapshot: Snapshot | Replayed | None = None
    resumed: bool = False
    near: int | None = None
    types: Mapping[str, int] | None = None

    @property
    def settling(self) -> bool:
        """Whether raw may have rows of its copy that changes are yet to come of."""
        return self.resumed or isinstance(self.snapshot, Replayed)

    def doubts(self, lsn: int) -> bool:
        """Tell whether the copy may show a transaction that is not known to be in it."""
        return self.resumed or (self.snapshot is not None and self.snapshot.doubts(lsn))


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
