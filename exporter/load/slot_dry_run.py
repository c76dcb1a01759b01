"""What a load of a slot would do. Nothing is made, and nothing of the slot is read or confirmed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psycopg

from exporter import state
from exporter.config import Definition
from exporter.errors import DatabaseError
from exporter.load.dry_run import Rehearsal, described, foreseen
from exporter.load.look import ANEW, look_at
from exporter.load.transfer import Attempt
from exporter.raw import table as raw_table
from exporter.source import NEW, Wanted, megabytes, publication, slots
from exporter.source.copied import CopyReader, of_slot
from exporter.source.snapshot import observe
from exporter.state import Binding, Result, State
from exporter.state import slots as remembered
from exporter.state.slots import Slot
from exporter.terminal import Console
from exporter.wire import Connection, connect, first_line
from exporter.wire.replication import lsn_number, lsn_text

_HOW = "in the order of the commits, each transaction of the source at once"


class SlotOutlook(NamedTuple):
    """What a load would find of its slot, and do with it.

    ``why`` is empty where it is there to be read. ``bytes`` of WAL would be read up to ``until``;
    ``waits_for`` are those who write now, before whose end no slot is made and no table copied.
    """

    name: str
    why: str
    publication: list[str]  # statements
    bytes: int | None
    until: str
    waits_for: str
    unsent: frozenset[str]  # keys whose changes it has not sent

    def as_dict(self) -> dict[str, object]:
        """Return what ``--json`` has of it in each of its tables."""
        return {
            "name": self.name,
            "made": bool(self.why),
            "why": self.why or None,
            "publication": self.publication,
            "bytes": self.bytes,
            "until": self.until,
            "waits_for": self.waits_for or None,
        }

    def lines(self) -> list[str]:
        """Return the same for people."""
        if self.why:
            found = [f"slot {self.name} would be made: {self.why}"]
        else:
            size = megabytes(self.bytes or 0)
            found = [f"slot {self.name}: {size} of WAL would be read, up to {self.until}"]
        found += [f"  publication {statement};" for statement in self.publication]
        if self.waits_for:
            found.append(f"  waits for   {self.waits_for}, where something is made or copied")
        return found


def rehearse(
    definitions: Sequence[Definition], console: Console, refresh: frozenset[str]
) -> tuple[SlotOutlook, list[Rehearsal]]:
    """Return what a load of these tables, which share a slot, would do. Raises ExporterError."""
    try:
        with (
            connect("DATABASE_URL_ANALYTICS") as destination,
            connect(definitions[0].source.variable) as source,
        ):
            destination.execute("set default_transaction_read_only = on")
            slot = outlook_of(source, destination, definitions)
            found = []
            for one in definitions:
                attempt = _attempt(one, source, destination, console)
                wanted = Wanted(full_refresh=True) if one.key in refresh else NEW
                found.append(_rehearsed(attempt, slot, wanted))
            return slot, found
    except psycopg.Error as error:
        raise DatabaseError(f"the slot's changes: {first_line(error)}") from None


def outlook_of(
    source: Connection, destination: Connection, definitions: Sequence[Definition]
) -> SlotOutlook:
    """Return what a load would find of the slot. Raises SourceError where it cannot have one."""
    slots.refuse_unfit(source)
    server = observe(source, State()).server
    known = None
    if remembered.exist(destination):
        known = remembered.of_source(destination, server.cluster, server.database)
    name, why = slots.new_name(destination), "there is none yet"
    if known:
        name = known.name
        if known.lsn is not None:
            why = look_at(source, known, server).why
            why += ANEW if why else ""
    tables = [one.source for one in definitions]
    now = publication.find(source, name)
    unsent = publication.unsent(now, tables)
    statements, _ = publication.statements(name, now, tables)
    end = slots.end_of_wal(source)
    begin = lsn_number(known.lsn) if known and known.lsn and not why else None
    return SlotOutlook(
        name=name,
        why=why,
        publication=[one.as_string(source) for one in statements],
        bytes=None if begin is None else max(0, end - begin),
        until=lsn_text(end),
        waits_for=slots.writers(source),
        unsent=frozenset(one.key for one in definitions if one.source in unsent),
    )


def stand_ins(attempt: Attempt, slot: SlotOutlook) -> tuple[CopyReader, State]:
    """Return the reader of a table, and its state, as they are when the load has its slot."""
    destination, target = attempt.destination, attempt.definition.destination
    stored = state.read(destination, target) if state.tables_exist(destination) else State()
    if slot.why or attempt.definition.key in slot.unsent:
        stored = stored._replace(slot=None)
    return CopyReader(attempt.source, attempt.definition, Slot(slot.name)), of_slot(stored)


def _rehearsed(attempt: Attempt, slot: SlotOutlook, wanted: Wanted) -> Rehearsal:
    destination = attempt.destination
    reader, stored = stand_ins(attempt, slot)
    with foreseen(attempt, wanted, reader, stored) as outlook:
        oid, empty = raw_table.oid_and_emptiness(destination, outlook.planned.raw.target)
        binding = Binding(reader.found, oid, reader.reading())
        why: str | None = reader.why_copy(stored, binding, empty=empty)
        found = described(attempt, outlook)
        if wanted.full_refresh:
            why = "--full-refresh asks for it"
        elif not why:
            found, why = found._replace(how=_HOW, raw=[]), None
        return found._replace(slot=slot.as_dict(), why_copied=why)


def _attempt(
    definition: Definition, source: Connection, destination: Connection, console: Console
) -> Attempt:
    def say(text: str, level: str = "warning", event: str = "notice", **values: object) -> None:
        console.say(text, level, key=definition.key, event=event, **values)

    result = Result(definition.key)
    return Attempt(definition, source, destination, result, say, lambda *_: None)
