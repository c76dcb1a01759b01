"""The slots at the sources: what they hold back, how far behind they are, and what is amiss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import psycopg

from exporter.config import Definition
from exporter.errors import ExporterError, UsageError, nearest
from exporter.source import megabytes, publication, slots
from exporter.source.slots import Found
from exporter.source.snapshot import observe
from exporter.state import State
from exporter.state import slots as remembered
from exporter.state.slots import Known
from exporter.terminal import text
from exporter.wire import Connection, connect
from exporter.wire.replication import lsn_number

CORE = "DATABASE_URL_CORE"
_LONG = 86_400.0  # seconds after which somebody should know that a slot is not read
_MUCH = 1024**3  # bytes that a slot may hold back before somebody should know


class Concern(NamedTuple):
    """What is amiss with a slot, and what to type."""

    message: str
    fix: tuple[str, ...]


class Slot(NamedTuple):
    """A slot of ours, as it was found through the ``variable`` of its source.

    ``here``: it is in that very database, and not beside it on the server. ``known`` is what this
    destination remembers of it: None of another destination's. It is ``needed`` where a definition
    is read by its changes. ``much``: the bytes that it may hold back before somebody should know.
    """

    found: Found
    variable: str
    here: bool
    known: Known | None
    needed: bool
    tables: tuple[str, ...]
    much: int

    @property
    def behind(self) -> int | None:
        """Return the bytes of WAL that have not landed; None of another destination's."""
        if self.known is None or self.known.lsn is None:
            return None
        return max(0, lsn_number(self.found.end) - lsn_number(self.known.lsn))

    @property
    def status(self) -> str:
        """Return in a word or a few what becomes of it."""
        if self.found.lost:
            return "lost"
        if self.found.active_pid:
            return f"read by {self.found.active_pid}"
        if self.known is None:
            return "of another destination"
        return "ok" if self.needed else "not needed"

    def concern(self) -> Concern | None:
        """Return what somebody should know of it."""
        if self.known is None:
            return self._of_another()
        return self._of_ours(self.known) if self.here else None  # else see ``Overview.missing``

    def _of_another(self) -> Concern | None:
        late = (self.found.idle or 0) > _LONG
        if self.found.active_pid or not (late or (self.found.held or 0) > self.much):
            return None
        name, last = self.found.name, ""
        if self.found.idle is not None:
            last = f"; it was read {text.duration(self.found.idle)} ago"
        return Concern(
            f"{name} is of another destination, or of this one before it was made anew, and holds"
            f" back {self._held}{last}",
            (f"exporter slots drop {name}",),
        )

    def _of_ours(self, known: Known) -> Concern | None:
        name, load, drop = self.found.name, "exporter load", f"exporter slots drop {known.name}"
        if not self.needed:
            why = "no definition is read by its changes there any more"
            return Concern(f"{name} holds back {self._held}, and {why}", (drop,))
        if self.found.lost:
            then = "the next load makes a new one, and copies its tables"
            return Concern(f"{name} is lost: {self.found.lost}; {then}", (load,))
        if known.seconds is None or known.seconds > _LONG:
            last = "has never been read to its end"
            if known.seconds is not None:
                last = f"was read to its end {text.duration(known.seconds)} ago"
            return Concern(f"{name} {last}, and holds back {self._held}", (load, drop))
        if (self.found.held or 0) <= self.much:
            return None
        behind = self.behind or 0
        if behind * 2 > (self.found.held or 0):
            return Concern(f"{name} holds back {self._held}", (load,))
        # A transaction that is open is decoded from its begin.
        return Concern(
            f"{name} holds back {self._held}, of which {megabytes(behind)} are to be read: the rest"
            " is for a transaction that was open at the last load",
            (
                "select pid, xact_start, application_name from pg_stat_activity"
                " where backend_xid is not null order by xact_start limit 3;",
            ),
        )

    @property
    def _held(self) -> str:
        return megabytes(self.found.held or 0)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "slot": self.found.name,
            "database": self.found.database,
            "status": self.status,
            "bytes_held_back": self.found.held,
            "bytes_behind": self.behind,
            "read_at": self.known.read_at if self.known else None,
            "seconds_since_read": self.known.seconds if self.known else None,
            "tables": list(self.tables),
        }


class Overview(NamedTuple):
    """The slots of the sources, and what is amiss with those that are remembered, and not there."""

    slots: list[Slot]
    missing: list[Concern]

    def concerns(self) -> list[Concern]:
        """Return what is amiss with the slots that concern this project."""
        found = [one.concern() for one in self.slots if one.known or one.needed]
        return [*(one for one in found if one), *self.missing]


def lost_sight_of(slot: Known) -> Concern:
    """Return what somebody should know of a slot to whose database no definition leads."""
    database = slot.database.partition("/")[2]
    return Concern(
        f"{slot.name} keeps WAL for this destination in database {database}, from which no"
        " definition reads any more",
        (f"DATABASE_URL_CORE=<the URL of {database}> exporter slots drop {slot.name}",),
    )


def sources_of(definitions: Iterable[Definition]) -> dict[str, bool]:
    """Return the variables of the sources, and whether changes are read there."""
    found: dict[str, bool] = {}
    for one in definitions:
        variable, changes = one.source.variable, one.source.read == "changes"
        if variable:  # else it is a function's
            found[variable] = changes or found.get(variable, False)
    return found


def current(sources: Mapping[str, bool], say: Callable[[str], None]) -> Overview:
    """Return the slots of these sources; say of a source why it cannot be asked.

    Raises DatabaseError where the destination cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        destination = stack.enter_context(connect("DATABASE_URL_ANALYTICS"))
        sessions: dict[str, Connection] = {}
        if any(sources.values()) or remembered.exist(destination):
            for variable in sources:
                try:
                    sessions[variable] = stack.enter_context(connect(variable))
                except ExporterError as error:
                    say(str(error))
        return overview(sources, sessions, destination)


def overview(
    sources: Mapping[str, bool],
    sessions: Mapping[str, Connection],
    destination: Connection,
) -> Overview:
    """Return the slots of the sources that can be asked: those with a session.

    A server names the slots of all its databases; one counts where it is in the session's own.
    """
    known = remembered.known(destination)
    found: dict[str, Slot] = {}
    servers = {}
    for variable, needed in sources.items():
        session = sessions.get(variable)
        if session is None or not (needed or known):
            continue
        server = observe(session, State()).server
        servers[server.cluster, server.database] = needed
        for slot in _of_source(session, known, needed=needed):
            if slot.here or slot.found.name not in found:
                found[slot.found.name] = slot
    missing = []
    for one in known.values():
        where = one.cluster, one.database
        if where not in servers:
            # Unless it is of a source that was not asked.
            missing += [] if sources.keys() - sessions.keys() else [lost_sight_of(one)]
        elif servers[where] and one.name not in found and one.lsn is not None:
            why = "is not at the source any more: the next load makes a new one, and copies"
            missing.append(Concern(f"{one.name} {why} its tables", ("exporter load",)))
    return Overview(sorted(found.values()), missing)


def _of_source(session: Connection, known: Mapping[str, Known], *, needed: bool) -> list[Slot]:
    keep = slots.limits(session).keep
    much = _MUCH if keep is None else min(_MUCH, keep // 2)
    its = []
    for found in slots.find(session):
        here = found.database == session.info.dbname
        rows = session.execute(
            "select schemaname || '.' || tablename from pg_publication_tables"
            " where pubname = %s order by 1",
            (found.name if here else "",),
        ).fetchall()
        tables = tuple(name for (name,) in rows)
        of_it = known.get(found.name)
        its.append(Slot(found, session.variable, here, of_it, needed and here, tables, much))
    return its


def drop(name: str, sources: Iterable[str], say: Callable[[str], None]) -> str:
    """End a slot and its publication; return what was done. Raises UsageError, SourceError."""
    with contextlib.ExitStack() as stack:
        sessions = []
        for variable in sources:
            try:
                sessions.append(stack.enter_context(connect(variable)))
            except ExporterError as error:
                say(str(error))
        source = _where(name, sessions)
        slots.drop(source, name)
        with contextlib.suppress(ExporterError, psycopg.Error):
            destination = stack.enter_context(connect("DATABASE_URL_ANALYTICS"))
            if remembered.exist(destination):
                remembered.forget(destination, name)
        return f"dropped {name}, the slot and the publication: a load makes new ones, and copies"


def _where(name: str, sessions: Iterable[Connection]) -> Connection:
    """Return the session on the database that has the slot, or its publication."""
    ours, elsewhere = set(), ""
    for session in sessions:
        for one in slots.find(session):
            ours.add(one.name)
            if one.name == name and one.database == session.info.dbname:
                return session
            elsewhere = (one.database or "") if one.name == name else elsewhere
        published = name.startswith(slots.PREFIX) and publication.find(session, name)
        if published:
            return session
    if elsewhere:
        raise UsageError(
            f"the slot {name} is in the database {elsewhere}, from which no definition reads",
            hint=f"DATABASE_URL_CORE=<the URL of {elsewhere}> exporter slots drop {name}",
        )
    raise UsageError(f"there is no slot {name} at the source", hint=nearest(name, ours))
