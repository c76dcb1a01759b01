"""What a load makes of the stored position, before anything is read."""

from __future__ import annotations

from exporter.errors import SourceError
from exporter.load.transfer import Attempt
from exporter.source import Reader, Wanted
from exporter.state import Binding, Judgement, State, Worth, judge
from exporter.state.binding import changed_columns, is_elsewhere


def refuse_elsewhere(attempt: Attempt, stored: State, reader: Reader) -> None:
    """Raise SourceError where the position belongs to another database or cluster."""
    key, bound = attempt.definition.key, stored.binding
    if bound is None or not is_elsewhere(bound.source, reader.found):
        return
    assert attempt.session is not None  # else nothing is elsewhere
    raise SourceError(
        f"{key}: the position is that of database {bound.source.database} in cluster"
        f" {bound.source.cluster or '?'}; {attempt.source.variable} leads to"
        f" {reader.found.database} in {reader.found.cluster or '?'}",
        hint=f"exporter load {key} --full-refresh starts over; after a planned move,"
        f" exporter state adopt {key} keeps the position",
    )


def weigh(
    attempt: Attempt, stored: State, reader: Reader, now: Binding, wanted: Wanted, *, empty: bool
) -> tuple[State, Wanted, bool]:
    """Return the position to go on from, what is wanted then, and whether rows may be gone.

    They may where everything is read again; then they have to be looked for afterwards. A full
    refresh and a span do not depend on the position. Raises SourceError.
    """
    if wanted.full_refresh or wanted.span:
        return stored, wanted, False
    stored, worth = _settle(attempt, stored, reader, now, empty=empty)
    wanted = wanted._replace(sweep=wanted.sweep or worth is Worth.SWEEP)
    deletes = attempt.definition.destination.deletes != "ignore"
    return stored, wanted, worth is Worth.REREAD and deletes


def _settle(
    attempt: Attempt, stored: State, reader: Reader, now: Binding, *, empty: bool
) -> tuple[State, Worth]:
    """Return the position that the load goes on from, and what made it so; tell the reason.

    Raises SourceError where an append-only log would take rows twice.
    """
    judgement = _judged(stored, reader, now, empty=empty)
    if stored.binding and judgement.worth is Worth.ONWARD:
        _tell_columns(attempt, stored.binding, now)
    if judgement.reason:
        attempt.say(judgement.reason, "info" if judgement.worth is Worth.ONWARD else "warning")
    append = attempt.definition.destination.mode == "append"
    if append and judgement.worth in (Worth.REREAD, Worth.SWEEP):
        key = attempt.definition.key
        raise SourceError(
            f"{key} is append-only: read again, its rows would be there twice",
            hint=f"exporter load {key} --full-refresh starts over;"
            f" exporter state adopt {key} goes on from the position as it is",
        )
    if judgement.worth in (Worth.ONWARD, Worth.SWEEP):
        bound = stored.binding if stored.cursor or stored.is_first else now
        return stored._replace(binding=bound), judgement.worth
    # Where deletes follow, a load that is killed before them has to begin again.
    ignores = attempt.definition.destination.deletes == "ignore"
    bound = now if ignores or judgement.worth is Worth.ANEW else stored.binding
    # The stamp stays: a later one that is lower would be passed over by the models.
    return State(exported_at=stored.exported_at, binding=bound), judgement.worth


def _judged(stored: State, reader: Reader, now: Binding, *, empty: bool) -> Judgement:
    if stored.cursor is None and not stored.is_first:
        return Judgement(Worth.ONWARD)  # nothing has landed yet
    # A state of an earlier version says nothing of its tables: it is taken to describe these.
    judgement = judge(stored.binding or now, now, raw_is_empty=empty)
    if judgement.worth is not Worth.ONWARD:
        return judgement
    doubt = reader.doubt(stored)
    return judgement if doubt.worth is Worth.ONWARD else doubt


def _tell_columns(attempt: Attempt, before: Binding, now: Binding) -> None:
    changed = changed_columns(before.reading, now.reading)
    known = [name for name in changed if name in before.reading.columns]
    if known:
        attempt.say(
            f"the expression of {', '.join(known)} has changed: rows that landed before keep what"
            f" the old one gave; exporter load {attempt.definition.key} --full-refresh renews them"
        )
