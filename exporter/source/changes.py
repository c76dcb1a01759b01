"""Changes of a slot, folded by key into chunks that end at commits.

Of several changes of a row within a chunk the last one counts, but for a table that keeps its
versions. A chunk is bounded in memory: a source transaction that is larger comes in several, of
which only the last one has a position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from exporter.source import pgoutput
from exporter.source.folded import Changes, FoldedLayout
from exporter.source.member import Member, Replayed, Snapshot, refuse_unkeyed, unkeyed
from exporter.source.pgoutput import Relation
from exporter.source.versions import Commit, VersionLayout, Versions

CHUNK = 4 * 1024 * 1024  # bytes; one lands, one waits, one is gathered
_OF_ROWS = (pgoutput.INSERT, pgoutput.UPDATE, pgoutput.DELETE)
_STEP = 64 * 1024 * 1024  # bytes of WAL after which a position is worth to be stored, without rows


class Grown(Exception):  # noqa: N818  no error: the load looks at the table again
    """The changes have columns that the table did not have when it was looked at."""

    def __init__(self, columns: frozenset[tuple[str, str]]) -> None:
        super().__init__(columns)
        self.columns = columns


class Chunk(NamedTuple):
    """Changes by their definition's key. Without a ``position`` it ends amid a transaction.

    ``commit`` is the last one so far, as ``pgoutput.commit_of`` tells it.
    """

    changes: dict[str, Changes | Versions]
    position: int | None
    last: bool
    commit: bytes | None


class Layout(Protocol):
    """How the rows of one description of a table are gathered."""

    OVERHEAD: int  # bytes that a change takes beside its message
    member: Member
    snapshot: Snapshot | Replayed | None
    unkeyed: list[str]

    def gathered(self) -> Changes | Versions:
        """Return what the table's changes are gathered in."""

    def take(self, changes: Any, kind: int, message: bytes, commit: Commit) -> None:
        """Gather what a message tells. Raises SourceError, Unsettled."""


class Gatherer:
    """Turns a slot's messages into chunks, up to the position ``end``."""

    def __init__(
        self,
        members: Sequence[Member],
        begin: int,
        end: int,
        gone: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        """``gone`` are columns, by the table's key, that the changes may have and no table has."""
        self._gone = gone
        self._members = members  # several may be of one table
        self._end = end
        self._stored = begin
        self._layouts: dict[bytes, list[Layout]] = {}  # by the table's oid
        self._described: list[Layout] = []  # by the description just before, if it was that
        self._columns: frozenset[str] = frozenset()  # of the table described last
        self._unkeyed: dict[str, dict[bytes, list[str]]] = {}  # by key; of it and its partitions
        self._changes: dict[str, Changes | Versions] = {}
        self._size = 0
        self._amid = False  # the last chunk has ended amid a transaction
        self._transaction: Commit | None = None
        self._commit: bytes | None = None

    def chunks(self, messages: Iterator[bytes | int]) -> Iterator[Chunk]:
        """Yield chunks, the last one with a position at or behind the end. Raises SourceError."""
        position, within = self._stored, False
        for message in messages:
            if isinstance(message, int):
                if within:
                    continue
                position = max(position, message)
                if position >= self._end:
                    yield self._cut(position, last=True)
                    return
                if position - self._stored >= _STEP:
                    self._stored = position
                    yield self._cut(position)
                continue
            kind = message[0]
            if kind == pgoutput.BEGIN:
                self._transaction, within = Commit(message), True
            elif kind == pgoutput.COMMIT:
                within, position = False, max(position, pgoutput.committed(message))
                self._commit = pgoutput.commit_of(message)
                if position >= self._end:
                    yield self._cut(position, last=True)
                    return
                if self._size >= CHUNK or self._amid:
                    self._stored = position
                    yield self._cut(position)
            else:
                self._take(kind, message)
                if self._size >= CHUNK + CHUNK // 8:  # most transactions end before
                    yield self._cut(None)

    def _cut(self, position: int | None, *, last: bool = False) -> Chunk:
        changes, self._changes, self._size = self._changes, {}, 0
        self._amid = position is None
        return Chunk(changes, position, last, self._commit)

    def _take(self, kind: int, message: bytes) -> None:
        if kind == pgoutput.RELATION:
            self._describe(pgoutput.oid_of(message), pgoutput.relation(message))
            return
        self._described = []
        if kind == pgoutput.TRUNCATE:
            for oid in pgoutput.truncated(message):
                for layout in self._layouts.get(oid, ()):
                    self._land(layout, kind, message)
        elif kind in _OF_ROWS:
            for layout in self._layouts[pgoutput.oid_of(message)]:
                self._land(layout, kind, message)

    def _describe(self, oid: bytes, found: Relation) -> None:
        """Take in what a table is now; or, directly behind its table's, what a partition is.

        A partition has a replica identity of its own, and its changes come as its table's.
        """
        members = [member for member in self._members if member.oid == found.oid]
        columns = frozenset(found.columns)
        if members or not self._described or columns != self._columns:
            self._columns = columns
            self._described = [self._layout(member, found) for member in members]
            self._layouts[oid] = self._described
        self._layouts.setdefault(oid, [])
        for layout in self._described:
            known = self._unkeyed.setdefault(layout.member.key, {})
            if members:
                known[oid] = layout.unkeyed
            else:
                known[oid] = [] if self._shown(layout) else unkeyed(layout.member, found)
            layout.unkeyed = next(filter(None, known.values()), [])

    def _shown(self, layout: Layout) -> bool:
        """Tell whether raw has what this transaction changes.

        Of a partition that was described by such a change, another description follows before one
        that the copy does not have: the copy was made when it could be read by its changes.
        """
        commit, snapshot = self._transaction, layout.snapshot
        if commit is None:  # it has landed: of that, descriptions alone are sent again
            return True
        return snapshot is not None and snapshot.shows(commit.xid, commit.lsn)

    def _layout(self, member: Member, found: Relation) -> Layout:
        names = frozenset((member.key, name) for name in {*found.columns} - member.known)
        if names - self._gone:
            raise Grown(names)
        return FoldedLayout(member, found) if member.near is None else VersionLayout(member, found)

    def _land(self, layout: Layout, kind: int, message: bytes) -> None:
        commit = self._transaction
        assert commit is not None
        if layout.snapshot is not None and layout.snapshot.shows(commit.xid, commit.lsn):
            return
        if layout.unkeyed and kind != pgoutput.TRUNCATE:
            refuse_unkeyed(layout.member.key, layout.unkeyed)
        key = layout.member.key
        changes = self._changes.get(key)
        if changes is None:
            changes = self._changes[key] = layout.gathered()
        self._size += len(message) + layout.OVERHEAD
        layout.take(changes, kind, message, commit)
