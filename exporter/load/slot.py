"""One load of a slot: what changed in all its tables, up to the end of the WAL at its start.

First the tables that need it are copied, by whoever copies tables; then the changes land, all of a
source transaction in one transaction, with the position that they reach. The source forgets a
position only after the destination has it on disk.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import psycopg

from exporter import state
from exporter.config import Definition
from exporter.errors import DatabaseError, ExporterError, SourceError, StoppedError
from exporter.load import worth
from exporter.load.changes import Landing, SlotTable
from exporter.load.transfer import Attempt
from exporter.raw import table as raw_table
from exporter.raw.changes import Present
from exporter.source import keyed, slots
from exporter.source.changes import Gatherer, Grown, Unsettled
from exporter.source.copied import CopyReader
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

_COPIES = 3  # of a table that somebody writes anew while tables are copied
# Copies tables that the slot is about to be read for, and yields a result for each.
Copy = Callable[[list[Definition], bool], Iterator[Result]]


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
        self._began = time.monotonic()
        self.results = {one.key: Result(one.key) for one in definitions}

    def say(self, text: str, level: str = "info", event: str = "notice", **values: object) -> None:
        """Tell something that concerns the slot."""
        self._console.say(text, level, key=self._definitions[0].key, event=event, **values)

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
                    except Present:
                        self._trusting = False
                    except Unsettled as found:
                        self._leave(found.key)

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
        remembered.lock(destination, server.database)
        slot = self._slot(server)
        tables = [self._look(one) for one in self._definitions]  # before anything is made
        slots.refuse_nested(source, [table.reader.table.oid for table in tables])
        if slot is None:
            connect(source.variable, replication=True).close()  # raises where it could not be read
        slot, added = self._published(slot, server)
        if slot.lsn is None:
            slot = self._made(slot, server)
        if added:
            tables = [self._look(one) for one in self._definitions]
        for _ in range(_COPIES):
            copied = [table for table in tables if self._is_to_copy(table)]
            if not copied:
                break
            tables = [table for table in tables if table not in copied]
            # One that is written anew after its copy has to be copied again.
            tables += [self._look(one) for one in self._copied(copied)]
        for table in tables:
            if table.why_copy:
                raise SourceError(f"{table.definition.key}: {table.why_copy}; now again")
        self._stream(slot, tables)

    def _slot(self, server: Server) -> Slot | None:
        """Return the slot as it was left; None where there is none, or none to go on with."""
        known = remembered.of_source(self._destination, server.cluster, server.database)
        if known is None:
            return None
        found = next(iter(slots.find(self._source, known.name)), None)
        ours = (slots.PLUGIN, self._source.info.dbname)
        if found and (found.plugin, found.database) != ours:
            raise SourceError(
                f"the slot {known.name} is another one than we made: its plugin is"
                f" {found.plugin or 'none'}, its database {found.database or 'none'}",
                hint=f"select pg_drop_replication_slot('{known.name}'), if nobody needs it",
            )
        if known.lsn is None:  # a load was killed while it made the slot
            why = ""
        elif known.timeline != server.timeline:
            why = f"is of timeline {known.timeline}, and the source is on {server.timeline}"
        elif lsn_number(known.lsn) > (server.lsn or 0):  # what comes there now, no slot would send
            why = "was read further than the source has WAL: it has lost commits"
        elif found is None:
            why = "is not at the source any more"
        elif found.lost:
            why = "is lost: the source has removed WAL that it held back (max_slot_wal_keep_size)"
        elif slots.publication(self._source, known.name) is None:  # it cannot be read without
            why = "has lost its publication"
        elif found.confirmed and lsn_number(found.confirmed) > lsn_number(known.lsn):
            why = "was read further by somebody else, or the destination is an older one"
        else:
            return known
        if why:
            self.say(
                f"the slot {known.name} {why}: it is made anew, and its tables copied", "warning"
            )
        slots.drop(self._source, known.name)
        remembered.forget(self._destination, known.name)
        return None

    def _look(self, definition: Definition) -> SlotTable:
        """Look at a table and its state, under its lock. Raises SourceError, DriftError."""
        destination, source = self._destination, self._source
        state.lock(destination, definition.destination)
        stored = state.read(destination, definition.destination)
        result = self.results[definition.key]

        def say(text: str, level: str = "warning", event: str = "notice", **values: object) -> None:
            if level == "warning":
                result.notices.append(text)
            self._console.say(text, level, key=definition.key, event=event, **values)

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
        return SlotTable(found, reader, stored, binding, raw, why)

    def _published(self, slot: Slot | None, server: Server) -> tuple[Slot, bool]:
        """Bring the publication to the tables; return the slot, and whether one was added.

        A new slot has no position.
        """
        destination, sources = self._destination, [one.source for one in self._definitions]
        if slot is None:
            slot = Slot(slots.new_name(destination), timeline=server.timeline)
            remembered.remember(destination, slot, server.cluster, server.database)
        now = slots.publication(self._source, slot.name)
        unsent = slots.unsent(now, sources)
        remembered.leave(
            destination, slot.name, [str(one.destination) for one in self._definitions]
        )
        slots.publish(self._source, slot.name, now, sources, self.say)
        return slot, bool(unsent)

    def _made(self, slot: Slot, server: Server) -> Slot:
        try:
            lsn = slots.make(self._source, slot.name, self.say)
        except ExporterError:
            slots.drop(self._source, slot.name)
            remembered.forget(self._destination, slot.name)
            raise
        slot = slot._replace(lsn=lsn)
        remembered.remember(self._destination, slot, server.cluster, server.database)
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
            missed = table.reader.why_missed(table.stored)
            if missed:
                self._console.say(missed, "warning", key=table.definition.key)
            state.unlock(self._destination, table.definition.destination)
        originals = {one.key: one for one in self._definitions}
        done = set()
        for refresh in (True, False):
            chosen = [
                originals[table.definition.key]
                for table in tables
                if (table.definition.key in self._refresh) is refresh
            ]
            for result in self._copy(chosen, refresh) if chosen else ():
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

    def _stream(self, slot: Slot, tables: Sequence[SlotTable]) -> None:
        """Land the changes of these tables up to the end of the WAL. Raises Grown."""
        assert slot.lsn is not None
        begin, end = lsn_number(slot.lsn), slots.end_of_wal(self._source)
        # A copy that was refused has its result already.
        results = {key: Result(key) if one.error else one for key, one in self.results.items()}
        landing = Landing(self._destination, slot, tables, results, trusting=self._trusting)
        gatherer = Gatherer([table.member for table in tables], begin, end, self._gone)
        session = connect(self._source.variable, replication=True)
        with contextlib.closing(session):
            stream = replication.Slot(session, slot.name, slot.name, begin)
            following = replication.Following(stream, gatherer.chunks)
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
