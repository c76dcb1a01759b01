"""Whether a slot can be read on from where it was left."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from exporter.errors import SourceError
from exporter.source import publication, slots, standby
from exporter.source.landed import position_of
from exporter.source.slots import Found
from exporter.source.snapshot import Server
from exporter.state.slots import Slot
from exporter.wire import Connection, connect, replication
from exporter.wire.replication import lsn_number

ANEW = ": it is made anew, and its tables copied"


class Look(NamedTuple):
    """What has become of a slot: ``why`` it cannot be read on, "" if it can.

    ``fork`` is where the source left the timeline that it was read on, None where it has not.
    """

    found: Found | None
    fork: int | None
    why: str


def look_at(source: Connection, known: Slot, server: Server, *, parted: bool = False) -> Look:
    """Look whether a slot can be read on; ``parted``: the source was seen to send another history.

    Raises SourceError for a slot that is not ours, psycopg.Error.
    """
    found, fork = next(iter(slots.find(source, known.name)), None), None
    before, now = known.timeline, server.timeline
    if found and before is not None and now is not None and before != now:
        with contextlib.closing(connect(source.variable, replication=True)) as session:
            fork = replication.fork(session, before, now)
    if found and (found.plugin, found.database) != (slots.PLUGIN, source.info.dbname):
        raise SourceError(
            f"the slot {known.name} is another one than we made: its plugin is"
            f" {found.plugin or 'none'}, its database {found.database or 'none'}",
            hint=f"select pg_drop_replication_slot('{known.name}'), if nobody needs it",
        )
    if found and standby.is_standby(source):
        _refuse_behind(source, known, found, server)
    why = _why_anew(known, found, server, fork, parted=parted)
    if not why and publication.find(source, known.name) is None:  # it cannot be read without
        why = "has lost its publication"
    return Look(found, fork, why)


def _refuse_behind(source: Connection, known: Slot, found: Found, server: Server) -> None:
    """Raise SourceError for a slot of the primary, and for a standby that lags behind raw."""
    if found.synced:
        raise SourceError(
            f"the slot {known.name} is the primary's, and {source.variable} leads to a standby that"
            " takes it over in a failover",
            hint=f"{source.variable}: the primary",
        )
    if lsn_number(known.lsn or "0/0") > (server.lsn or 0):
        raise SourceError(
            f"{source.variable} leads to a standby that has not replayed what has landed:"
            f" {known.lsn}",
            hint="exporter load again when it has; exporter slots drop"
            f" {known.name}, where it never will",
        )


def _why_anew(
    known: Slot, found: Found | None, server: Server, fork: int | None, *, parted: bool
) -> str:
    """Return why a slot cannot be read on; "" if it can.

    ``fork`` is where the source left the timeline that the slot was read on, ``parted`` whether it
    sends another history.
    """
    assert known.lsn
    elsewhere = ""
    if known.timeline and server.timeline and known.timeline != server.timeline:
        elsewhere = f"is of timeline {known.timeline}, and the source is on {server.timeline}"
    if found is None:
        return f"{elsewhere}{', and ' * bool(elsewhere)}is not at the source any more"
    if found.lost:
        return f"is lost: {found.lost}"
    confirmed, last = lsn_number(found.confirmed or known.lsn), position_of(known.last_commit)
    if confirmed > lsn_number(known.lsn):
        return "was read further by somebody else, or the destination is an older one"
    if elsewhere and (fork is None or max(confirmed, last) > fork):
        return f"{elsewhere}, which does not have all that has landed"
    # The session before may have confirmed the commit while we looked for it.
    parted = parted and last > confirmed
    if parted or (not elsewhere and lsn_number(known.lsn) > (server.lsn or 0)):
        return "was read further than the source has WAL: it has lost commits"
    return ""
