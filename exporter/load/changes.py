"""Chunks of a slot's changes into raw: each source transaction whole, with the position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from exporter import state
from exporter.config import Definition
from exporter.raw import RawTable
from exporter.raw import table as raw_table
from exporter.raw.changes import ChangesStaging, Landed
from exporter.raw.versions import HistoryStaging
from exporter.source.changes import Chunk
from exporter.source.copied import CopyReader
from exporter.source.member import Member
from exporter.state import Binding, Position, Result, State, record
from exporter.state import slots as remembered
from exporter.state.slots import Slot
from exporter.wire import Connection
from exporter.wire.replication import lsn_number, lsn_text

_UNSAFE = 32 * 1024 * 1024  # bytes of the source's WAL that land without waiting for the disk


class SlotTable(NamedTuple):
    """A table of the slot, as this load finds it."""

    definition: Definition
    reader: CopyReader
    stored: State
    binding: Binding
    raw: RawTable
    why_copy: str
    follows_first: bool = False  # its changes land before it is copied

    @property
    def in_binary(self) -> bool:
        """Whether raw takes what the slot sends of the table in binary, without a cast."""
        raw = self.raw
        sent = [column for column in raw.columns if column.expression != "null"]
        return raw.exact and not raw.target.is_history and all(one.streamed for one in sent)

    @property
    def types(self) -> dict[str, int]:
        """The types of its columns at the source, by name, where it is ``in_binary``."""
        return {column.name: column.streamed for column in self.raw.columns}

    @property
    def files(self) -> dict[str, str]:
        """The files of the source's heaps: others when it is written anew, or emptied."""
        return self.reader.files()

    @property
    def member(self) -> Member:
        """What the changes of the table are gathered by."""
        return self.reader.member(self.stored, self.raw.columns)


class Staging(Protocol):
    """Takes what was gathered of one table's changes to its raw table."""

    def land(self, changes: Any, stamp: str, *, settling: bool) -> Landed:
        """Land them in the running transaction. Raises RowError, DriftError, Doubted."""


def _staging(
    destination: Connection, raw: RawTable, number: int, *, trusting: bool, binary: bool
) -> Staging:
    if raw.target.is_history:
        return HistoryStaging(destination, raw, number, trusting=trusting)
    return ChangesStaging(destination, raw, number, trusting=trusting, binary=binary)


class Landing:
    """Lands chunks, each source transaction whole, and stores the positions."""

    def __init__(
        self,
        destination: Connection,
        slot: Slot,
        tables: Sequence[SlotTable],
        results: dict[str, Result],
        *,
        trusting: bool,
        binary: bool,
        began: str,
    ) -> None:
        """``trusting``, ``binary``: see ``ChangesStaging``.

        ``began``: see ``reached``, of the last chunk.
        """
        self._destination = destination
        self._began = began
        self._slot = slot
        self._safe = lsn_number(slot.lsn or "0/0")  # the destination has it on disk
        self._tables = {table.definition.key: table for table in tables}
        self._results = results
        self._number = 0
        stamps = [slot.exported_at, *(table.stored.exported_at for table in tables)]
        self._stamp = state.stamp_after(destination, [one for one in stamps if one])
        self._stamps = {key: one.stored.exported_at for key, one in self._tables.items()}
        self._rows = {key: one.stored.cursor is not None for key, one in self._tables.items()}
        self._staging = {
            key: _staging(destination, table.raw, number, trusting=trusting, binary=binary)
            for number, (key, table) in enumerate(self._tables.items())
        }
        self._settling = {key: one.member.settling for key, one in self._tables.items()}
        self._emptied_by: dict[str, int] = {}

    def land(self, chunk: Chunk, following: Iterator[Chunk]) -> int:
        """Land a chunk, and those after it up to the next commit.

        Return the position up to which the destination has all on disk, so that the source may
        forget it. Most commits do not wait for the disk: one that does takes those before it
        along. Raises RowError, DriftError, Doubted.
        """
        destination = self._destination
        before = {key: replace(self._results[key].totals) for key in self._tables}
        stamp = state.later(self._stamp, self._number)
        changed: set[str] = set()
        try:
            with destination.transaction():
                while True:
                    self._apply(chunk, stamp, changed)
                    if chunk.position is not None:
                        break
                    chunk = next(following)
                waits = chunk.last or chunk.position - self._safe >= _UNSAFE
                if not waits:
                    destination.execute("set local synchronous_commit = off")
                self._store(chunk, stamp, changed)
        except BaseException:
            for key, totals in before.items():
                self._results[key].totals = totals
            raise
        self._number += 1
        self._safe = chunk.position if waits else self._safe
        return self._safe

    def _apply(self, chunk: Chunk, stamp: str, changed: set[str]) -> None:
        for key, changes in chunk.changes.items():
            settling = self._settling[key]
            landed = self._staging[key].land(changes, stamp, settling=settling)
            totals = self._results[key].totals
            if key not in changed:
                totals.batches += 1
            changed.add(key)
            totals.rows_read += landed.read
            totals.rows_written += landed.written
            totals.rows_deleted += landed.deleted
            totals.bytes += landed.size
            if landed.emptied_by is not None:
                self._emptied_by[key] = landed.emptied_by
            self._rows[key] = self._rows[key] or landed.read > 0

    def _store(self, chunk: Chunk, stamp: str, changed: set[str]) -> None:
        assert chunk.position is not None
        destination, lsn = self._destination, lsn_text(chunk.position)
        stamped, read_at = stamp if changed else None, self._began if chunk.last else None
        remembered.reached(destination, self._slot.name, lsn, chunk.commit, stamped, read_at)
        self._stamps.update(dict.fromkeys(changed, stamp))
        for key, table in self._tables.items():
            if key not in changed and not chunk.last:
                continue
            result, target = self._results[key], table.raw.target
            stored = table.stored._replace(exported_at=self._stamps[key])
            if key in self._emptied_by and stored.slot:
                slot = stored.slot._replace(emptied_by=self._emptied_by[key])
                stored = stored._replace(slot=slot)
            result.cursor = Position(lsn)
            if chunk.last:
                rows = self._rows[key]
                if rows and result.totals.rows_deleted:
                    rows = not raw_table.oid_and_emptiness(destination, target)[1]
                now = table.reader.followed(stored, lsn, rows=rows, is_to_copy=bool(table.why_copy))
                stored = now._replace(binding=table.binding)
            state.write(destination, target, stored)
            record(destination, result, "ok" if chunk.last else "running")
