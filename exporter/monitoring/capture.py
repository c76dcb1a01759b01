"""What change capture needs of a source and keeps there: findings of ``exporter check``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from exporter.config import Definition
from exporter.monitoring.finding import Finding, failure, subject_of
from exporter.monitoring.grants import missing_for_publication
from exporter.monitoring.slots import CORE, Overview, overview, sources_of
from exporter.source import Table, megabytes, publication, slots, standby
from exporter.wire import Connection

_LIMIT = "alter system set max_slot_wal_keep_size = '50GB'; select pg_reload_conf();"


def of_sources(
    declared: list[Definition], sessions: Mapping[str, Connection], analytics: Connection
) -> Iterator[Finding]:
    """Yield the findings about the sources that can be asked: those with a session.

    Of one where no changes are read, only what was left behind.
    """
    sources = sources_of(declared) or {CORE: False}
    found = overview(sources, sessions, analytics)
    for variable, needed in sources.items():
        source = sessions.get(variable)
        if needed and source:
            ours = (one for one in found.slots if one.variable == variable and one.known)
            name = next((one.found.name for one in ours if one.here), None)
            yield from _of_server(source, has_slot=name is not None)
            yield from _standbys(source, name or "")
            its = [it for it in declared if it.source.variable == variable]
            yield from _publication(source, name, [it for it in its if it.source.read == "changes"])
    yield from _of_slots(found)


def _of_server(source: Connection, *, has_slot: bool) -> Iterator[Finding]:
    subject = subject_of(source.variable)
    wrong = dict(slots.unfit(source))
    yield from (failure(subject, check, error) for check, error in wrong.items())
    if "wal_level" not in wrong:
        yield Finding("ok", subject, "wal_level", "logical")
    if "replication" not in wrong:
        yield Finding("ok", subject, "replication", "the role may read a slot")
    has = slots.limits(source)
    yield _room(
        subject,
        "slots",
        f"{has.slots_used} of {has.slots} (max_replication_slots) are in use",
        full=has.slots_used >= has.slots and not has_slot,
        fix=f"alter system set max_replication_slots = {has.slots_used + 5}, and a restart; or end"
        " one that nobody reads: exporter slots show",
    )
    yield _room(
        subject,
        "wal senders",
        f"{has.senders_used} of {has.senders} (max_wal_senders) are in use",
        full=has.senders_used >= has.senders,
        fix=f"alter system set max_wal_senders = {has.senders_used + 5}, and a restart",
    )
    if has.keep is None:
        message = (
            "max_slot_wal_keep_size is not set: a slot that nobody reads keeps WAL until the disk"
            " is full"
        )
        yield Finding("warn", subject, "wal kept", message, (_LIMIT,))
    else:
        message = f"a slot keeps {megabytes(has.keep)} at most (max_slot_wal_keep_size)"
        yield Finding("ok", subject, "wal kept", message)


def _publication(
    source: Connection, name: str | None, definitions: list[Definition]
) -> Iterator[Finding]:
    subject = subject_of(source.variable)
    now = publication.find(source, name) if name else None
    unsent = publication.unsent(now, [one.source for one in definitions])
    if not unsent:
        tables = "1 table" if len(definitions) == 1 else f"{len(definitions)} tables"
        yield Finding("ok", subject, "publication", f"{name} sends {tables}")
        return
    added = [one for one in definitions if one.source in unsent]
    what = "is made by the first load" if now is None else "gets tables at the next load"
    wanted = missing_for_publication(source, name if now else None, added)
    replica = standby.is_standby(source)
    if not wanted and not replica:
        yield Finding("ok", subject, "publication", what)
        return
    where = "to be run on the primary" if replica else "for their owner to run"
    fix = f"exporter load prints the statement, {where}"
    if now and name:
        statements, _ = publication.statements(name, now, [one.source for one in definitions])
        fix = "; ".join(one.as_string(source) for one in statements)
    why = "which a standby cannot do" if replica else f"for which the role must {', '.join(wanted)}"
    message = f"{what}, {why}"
    yield Finding("fail", subject, "publication", message, (fix,))


def _standbys(source: Connection, name: str) -> Iterator[Finding]:
    absent = slots.standbys_behind(source, name)
    if absent:
        message = (
            f"loads wait for the standby of {', '.join(absent)}, which is not connected:"
            " synchronized_standby_slots names it"
        )
        fix = "start it, or take it out of synchronized_standby_slots"
        yield Finding("fail", subject_of(source.variable), "standby", message, (fix,))


def _room(subject: str, check: str, message: str, *, full: bool, fix: str) -> Finding:
    return Finding("fail" if full else "ok", subject, check, message, (fix,) if full else ())


def _of_slots(found: Overview) -> Iterator[Finding]:
    for slot in found.slots:
        if not (slot.needed or (slot.known and slot.here)):
            continue  # of another project, whose own check tells, or among the missing
        subject = subject_of(slot.variable)
        if concern := slot.concern():
            yield Finding("warn", subject, "slot", *concern)
        elif slot.known:
            message = f"{slot.found.name} holds back {megabytes(slot.found.held or 0)}"
            message += f", {megabytes(slot.behind)} to be read" if slot.behind is not None else ""
            yield Finding("ok", subject, "slot", message)
        else:
            yield Finding("ok", subject, "slot", f"{slot.found.name} is of another destination")
    for missing in found.missing:
        yield Finding("warn", "analytics", "slot", *missing)


def identity(source: Connection, definition: Definition, table: Table) -> Iterator[Finding]:
    """Yield by what the changes of a table tell its rows, which ``refuse_unfit`` has let pass."""
    heaps = [heap.oid for heap in table.heaps] or [table.oid]
    whole = [one.name for one in slots.identities(source, heaps) if one.kind == "f"]
    if whole:
        message = f"{', '.join(whole)} writes whole old rows to the WAL (replica identity full)"
    else:
        message = f"has {', '.join(definition.destination.conflict_columns)}"
    yield Finding("ok", definition.key, "replica identity", message)
