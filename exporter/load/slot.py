"""One load of a slot: what changed in all its tables, up to the end of the WAL at its start.

First the tables that need it are copied, by whoever copies tables; then the changes land, all of a
source transaction in one transaction, with the position that they reach. The source forgets a
position only after the destination has it on disk.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import psycopg

from exporter import state
from exporter.config import Definition
from exporter.errors import DatabaseError, ExporterError, SourceError, StoppedError
from exporter.load import worth
from exporter.load.changes import Landing, SlotTable
from exporter.load.look import ANEW, look_at
from exporter.load.transfer import Attempt
from exporter.raw import table as raw_table
from exporter.raw.changes import Doubted
from exporter.source import keyed, publication, slots, standby
from exporter.source.changes import Gatherer, Grown
from exporter.source.copied import CopyReader
from exporter.source.folded import Retyped, Unsettled
from exporter.source.landed import Parted, unlanded
from exporter.source.snapshot import Server, observe
from exporter.state import Binding, Result, State, record_failure
from exporter.state import slots as remembered
from exporter.state.slots import Slot
from exporter.terminal import Console, signals
from exporter.wire import (
    Sessions,
    connect,
    first_line,
    replication,
    stopped_in_order,
    with_retries,
)
from exporter.wire.replication import lsn_number

# Copies tables that the slot is about to be read for, and yields a result for each.
Copy = Callable[[list[Definition], bool], Iterator[Result]]
_BINARY = 140000  # the first version whose slots send it
_COPIES = 5  # of a table that a load makes, one after another, before it gives up


def follow(
    definitions: Sequence[Definition],
    console: Console,
    copy: Copy,
    *,
    refresh: frozenset[str] = frozenset(),
) -> list[Result]:
    """Land what changed in these tables, which share a slot; return a result for each.

    Those of ``refresh`` are copied anew before. Never raises ExporterError.
    """
    load = _Load(definitions, console, copy, refresh)
    error: ExporterError | None = None
    try:
        with_retries(load.attempt, lambda why: load.say(f"{why}; connecting again", "warning"))
    except psycopg.Error as failed:
        error = DatabaseError(
            f"the slot's changes: {first_line(failed)}",
            hint="what has landed is kept; exporter load goes on from there",
        )
    except ExporterError as failed:
        error = failed
    except KeyboardInterrupt as stop:
        error = signals.reason(stop, "the slot's changes: interrupted")
    load.ended(error)
    return list(load.results.values())


class _Load:
    """The steps of a load, and what they have found so far."""

    def __init__(
        self,
        definitions: Sequence[Definition],
        console: Console,
        copy: Copy,
        refresh: frozenset[str],
    ) -> None:
        self._definitions = definitions
        self._console = console
        self._copy = copy
        self._refresh = refresh
        self._gone: frozenset[tuple[str, str]] = frozenset()
        self._trusting = True  # what is new at the source is new to raw
        self._retyped = False  # some changes are of a column that has another type now
        self._parted = False
        self._unsettled: Counter[str] = Counter()
        self._began = time.monotonic()
        self.results = {one.key: Result(one.key) for one in definitions}

    def say(self, text: str, level: str = "info", event: str = "notice", **values: object) -> None:
        """Tell something that concerns the slot: once, whichever tables it is of."""
        self._tell(self._definitions[0].key, text, level, event, **values)

    def _tell(self, key: str, text: str, level: str, event: str, **values: object) -> None:
        notices = self.results[key].notices
        if level == "warning" and text not in notices:  # a table is looked at more than once
            notices.append(text)
        self._console.say(text, level, key=key, event=event, **values)

    def attempt(self) -> None:
        """Do it all. Raises psycopg.Error, ExporterError, KeyboardInterrupt."""
        while True:
            with (
                Sessions() as sessions,
                sessions.pair(self._definitions[0].source.variable) as (destination, source),
            ):
                self._destination, self._source = destination, source
                with stopped_in_order(source, destination):
                    try:
                        self._run()
                        return
                    except Grown as grown:  # looked at again, a table has them, or has lost them
                        self._gone |= grown.columns
                    except Doubted:
                        self._trusting = False
                    except Retyped:
                        self._retyped = True
                    except Parted:
                        self._parted = True
                    except Unsettled as found:
                        self._leave(found.key)
                        self._refuse_endless(found.key)

    def _refuse_endless(self, key: str) -> None:
        """Raise SourceError for a table of which no copy fits its changes, whose keys move."""
        self._unsettled[key] += 1
        if self._unsettled[key] >= _COPIES:
            raise SourceError(
                f"{key}: it was copied {_COPIES} times, and each time keys moved amid the copy"
                " while large values stayed: which row has those cannot be told",
                hint=f"exporter load {key}, when fewer keys change; or read it from the primary",
            )

    def ended(self, error: ExporterError | None) -> None:
        """Give the error to the tables that have none of their own, and record it."""
        for result in self.results.values():
            result.seconds = time.monotonic() - self._began
            if error is None or result.error is not None:
                continue
            result.error = error
            with (
                contextlib.suppress(psycopg.Error, ExporterError),
                connect("DATABASE_URL_ANALYTICS") as destination,
            ):
                record_failure(destination, result)

    # -- the steps

    def _run(self) -> None:
        destination, source = self._destination, self._source
        # What the source forgets, and whose the slot there is, must not be lost with a crash here.
        destination.execute("set synchronous_commit = on")
        state.create_tables(destination)
        remembered.create_table(destination)
        slots.refuse_unfit(source)
        server = observe(source, State()).server
        remembered.lock(destination, server.cluster, server.database)
        slot = self._slot(server)
        tables = [self._look(one) for one in self._definitions]  # before anything is made
        publication.refuse_nested(source, [table.reader.table.oid for table in tables])
        if slot.lsn is None:
            connect(source.variable, replication=True).close()  # raises where it could not be read
        added = self._published(slot, server)
        if slot.lsn is None:
            slot = self._made(slot, server)
        if added:
            tables = [self._look(one) for one in self._definitions]
        self._follow(slot, server, tables)

    def _follow(self, slot: Slot, server: Server, tables: Sequence[SlotTable]) -> None:
        """Make the copies that are needed, and land the changes; of some before their copy."""
        destination = self._destination
        first = [one for one in tables if one.follows_first]
        tables = self._with_copies([one for one in tables if one not in first])
        self._stream(slot, [*tables, *first])
        again = [self._look(one.definition) for one in first]
        # What was written anew since the first look, the next load's changes may explain.
        moved = [now for now, one in zip(again, first, strict=True) if now.files != one.files]
        same = [now for now in again if now not in moved]
        if any(map(self._is_to_copy, same)):
            known = remembered.of_source(destination, server.cluster, server.database)
            assert known is not None
            tables = self._looked_again([one.definition for one in tables])
            tables += self._with_copies(same)
            destination.execute("discard temp")  # what the changes were staged in
            self._stream(known, [*tables, *moved])

    def _with_copies(self, tables: Sequence[SlotTable]) -> list[SlotTable]:
        """Copy those of the tables that need it; return all that have their copy then."""
        copied = [table for table in tables if self._is_to_copy(table)]
        if not copied:
            return list(tables)
        rest = [table for table in tables if table not in copied]
        return [*rest, *self._looked_again(self._copied(copied))]

    def _looked_again(self, definitions: Sequence[Definition]) -> list[SlotTable]:
        """Return tables that are followed as they are now. Raises SourceError where one cannot be.

        One that was written anew meanwhile gets its changes, and the next load copies it: to copy
        it at once might have no end.
        """
        tables = [self._look(one) for one in definitions]
        for table in tables:
            if table.why_copy and table.why_copy != table.reader.why_files(table.stored):
                raise SourceError(
                    f"{table.definition.key}: {table.why_copy}; that came during this load",
                    hint=f"exporter load {table.definition.key}",
                )
        return tables

    def _slot(self, server: Server) -> Slot:
        """Return the slot as it was left; without a position where it is to be made.

        It keeps its name and its publication, which may be the work of the tables' owner; but not
        where another destination may know it by that name, which would then take it for its own.
        """
        known = remembered.of_source(self._destination, server.cluster, server.database)
        if known is None:
            return Slot(slots.new_name(self._destination))
        name, reached = known.name, known.lsn
        if reached is not None:  # else a load was killed while it made the slot
            look = look_at(self._source, known, server, parted=self._parted)
            if look.found and not look.why:
                if look.fork is not None:
                    known = known._replace(timeline=server.timeline)
                    remembered.moved(self._destination, known, look.fork)
                # Of a slot of which nothing has landed, its tables' copies are newer than what it
                # may still send: another server of the cluster can have one of the same name.
                return known._replace(lsn=(known.last_commit and look.found.confirmed) or known.lsn)
            self._parted = False
            self.say(f"the slot {known.name} {look.why}{ANEW}", "warning")
            if look.found and lsn_number(look.found.confirmed or "0/0") > lsn_number(reached):
                name = slots.new_name(self._destination)
        slots.drop_slot(self._source, known.name)
        if name != known.name:
            with contextlib.suppress(ExporterError):  # a publication that is not ours stays
                slots.drop(self._source, known.name)
        remembered.forget(self._destination, known.name)
        return Slot(name)

    def _look(self, definition: Definition) -> SlotTable:
        """Look at a table and its state, under its lock. Raises SourceError, DriftError."""
        destination, source = self._destination, self._source
        state.lock(destination, definition.destination)
        stored = state.read(destination, definition.destination)
        result = self.results[definition.key]

        def say(text: str, level: str = "warning", event: str = "notice", **values: object) -> None:
            self._tell(definition.key, text, level, event, **values)

        reader = CopyReader(source, definition)
        with reader.opened(stored, destination) as table:
            found = keyed(definition, table)
            attempt = Attempt(found, source, destination, result, say, lambda *_: None)
            if definition.key not in self._refresh:
                worth.refuse_elsewhere(attempt, stored, reader)
            raw = raw_table.prepare(destination, found.destination, table, say)
            reader.refuse_unkeyed(raw)
            oid, empty = raw_table.oid_and_emptiness(destination, raw.target)
            binding = Binding(reader.found, oid, reader.reading())
            why = reader.why_copy(stored, binding, empty=empty)
            first = reader.can_follow(stored, why) and definition.key not in self._refresh
        return SlotTable(found, reader, stored, binding, raw, why, first)

    def _published(self, slot: Slot, server: Server) -> bool:
        """Bring the publication to the tables; return whether one was added."""
        destination, sources = self._destination, [one.source for one in self._definitions]
        if slot.lsn is None:
            remembered.remember(destination, slot, server)
        now = publication.find(self._source, slot.name)
        unsent = publication.unsent(now, sources)
        names = [str(one.destination) for one in self._definitions]
        remembered.leave(destination, slot.name, names)
        publication.publish(self._source, slot.name, now, sources, self.say)
        return bool(unsent)

    def _made(self, slot: Slot, server: Server) -> Slot:
        try:
            lsn = slots.make(self._source, slot.name, self.say)
        except ExporterError:
            with contextlib.suppress(ExporterError):  # a publication that is not ours stays
                slots.drop(self._source, slot.name)
                remembered.forget(self._destination, slot.name)
            raise
        slot = slot._replace(lsn=lsn, timeline=server.timeline)
        remembered.remember(self._destination, slot, server)
        self.say(
            f"made the slot and the publication {slot.name} at the source: it keeps WAL until it"
            " is read; exporter slots shows how much",
            "warning",
        )
        return slot

    def _is_to_copy(self, table: SlotTable) -> bool:
        return bool(table.why_copy) or (
            table.definition.key in self._refresh and not self.results[table.definition.key].run_id
        )

    def _leave(self, key: str) -> None:
        for one in self._definitions:
            if one.key == key:
                remembered.leave_one(self._destination, one.destination)

    def _copied(self, tables: Sequence[SlotTable]) -> list[Definition]:
        """Copy these tables; return those that have their copy."""
        slots.await_writers(self._source, self.say)
        for table in tables:
            target = table.definition.destination
            missed = table.reader.why_missed(table.stored)
            if target.is_history and table.stored.cursor:
                self._tell_gap(table)
            elif missed and table.definition.key not in self._refresh:
                self._tell(table.definition.key, missed, "warning", "notice")
            state.unlock(self._destination, target)
        originals = {one.key: one for one in self._definitions}
        done = set()
        for refresh in (True, False):
            chosen = [
                originals[table.definition.key]
                for table in tables
                if (table.definition.key in self._refresh) is refresh
            ]
            for result in self._copy(chosen, refresh) if chosen else ():
                told = self.results[result.key].notices
                result.notices[:0] = [one for one in told if one not in result.notices]
                self.results[result.key] = result
                if isinstance(result.error, StoppedError):
                    raise result.error
                if result.error is None:
                    done.add(result.key)
        for table in tables:
            if table.definition.key in done:
                continue
            if not table.why_copy:  # a refresh that was refused: the table is as it was before
                done.add(table.definition.key)
            else:  # what the others get now, it misses
                self._leave(table.definition.key)
        return [one for key, one in originals.items() if key in done]

    def _tell_gap(self, table: SlotTable) -> None:
        why = f"{table.why_copy}; " if table.follows_first else ""
        gap = (
            f"{why}what was committed after {table.stored.cursor} and before this copy, its history"
            " misses but for the last version of each row, which has _op = copy"
        )
        self._tell(table.definition.key, gap, "warning", "notice")

    def _is_in_binary(self, tables: Sequence[SlotTable]) -> bool:
        """Whether values come in binary, which costs less. What is refused, texts name better."""
        able = self._source.info.server_version >= _BINARY
        sure = self._trusting and not self._retyped
        return able and sure and all(table.in_binary for table in tables)

    def _stream(self, slot: Slot, tables: Sequence[SlotTable]) -> None:
        """Land the changes of these tables up to the end of the WAL. Raises Grown."""
        assert slot.lsn is not None
        began = remembered.now(self._destination)
        begin, end = lsn_number(slot.lsn), slots.end_of_wal(self._source)
        slots.await_standbys(self._source, slot.name, end, self.say)
        if standby.is_paused(self._source):
            self.say(
                "the standby's replay is paused: what it has got since is not landed; select"
                " pg_wal_replay_resume()",
                "warning",
            )
        # A copy that was refused has its result already.
        results = {key: Result(key) if one.error else one for key, one in self.results.items()}
        trusting, binary = self._trusting, self._is_in_binary(tables)
        landing = Landing(
            self._destination, slot, tables, results, trusting=trusting, binary=binary, began=began
        )
        members = [table.member._replace(types=table.types if binary else None) for table in tables]
        gatherer = Gatherer(members, begin, end, self._gone)
        session = connect(self._source.variable, replication=True)
        with contextlib.closing(session):
            stream = replication.Slot(session, slot.name, slot.name, begin, binary=binary)
            following = replication.Following(
                stream, lambda sent: gatherer.chunks(unlanded(sent, begin, slot.last_commit))
            )
            try:
                chunks = iter(following)
                for chunk in chunks:
                    stream.confirm(landing.land(chunk, chunks))
                    del chunk
            except psycopg.errors.UndefinedObject as error:  # as of these changes, by their order
                if "publication" not in first_line(error):
                    raise
                raise SourceError(
                    f"the slot's changes cannot be read: {first_line(error)}, or did not when they"
                    " were made",
                    hint=f"exporter slots drop {slot.name}; exporter load makes a new one, and"
                    " copies",
                ) from None
            finally:
                following.stop(session)
