"""One load: look, plan, land, record."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING

import psycopg

from exporter import state
from exporter.config import Definition
from exporter.errors import DatabaseError, ExporterError
from exporter.load import MOST_DELETES, way, worth
from exporter.load.transfer import After, Attempt, Transfer
from exporter.raw import RawTable
from exporter.raw import table as raw_table
from exporter.source import NEW, Plan, Wanted, keyed, reader_of
from exporter.state import Binding, Result, State, Totals, record_failure, take_counts
from exporter.terminal import Console, signals
from exporter.wire import (
    Connection,
    Sessions,
    connect,
    first_line,
    stopped_in_order,
    with_retries,
)

if TYPE_CHECKING:
    from exporter.load.ranges import Crew


def load(
    definition: Definition,
    console: Console,
    sessions: Sessions,
    *,
    wanted: Wanted = NEW,
    after: After | None = None,
    command: str = "load",
    crew: Crew | None = None,
) -> Result:
    """Land what is new of one definition, on sessions that the next load may use again.

    Never raises ExporterError: the result carries it. A KeyboardInterrupt ends the load in order,
    and is carried as ``StoppedError``.

    A full refresh reads everything, and removes from raw what is gone at the source. A span is
    read again whatever the stored position is, and leaves it alone. ``command`` is what the record
    of runs calls it all. Raises NotByRanges where the crew does nothing else.
    """
    result = Result(definition.key, " ".join([command, *wanted.words()]))

    def say(text: str, level: str = "warning", event: str = "notice", **values: object) -> None:
        if level == "warning":
            result.notices.append(text)
        console.say(text, level, key=definition.key, event=event, **values)

    def attempt(lost: float) -> None:
        with contextlib.ExitStack() as stack:
            destination, source = stack.enter_context(sessions.opened(definition.source.variable))
            if crew:
                stack.enter_context(crew.watching(*filter(None, (destination, source))))
            watched = stack.enter_context(
                way.watched(
                    definition.key, source, destination, say, lost, looks=not sessions.alone
                )
            )
            progress = functools.partial(console.progress, definition.key)
            one = Attempt(definition, source, destination, result, say, progress)
            with stopped_in_order(source, destination):
                _run(one, wanted, after, crew, watched)

    try:
        with_retries(
            lambda: way.making_way(attempt),
            lambda why: say(f"{why}; connecting again", event="retry"),
        )
    except psycopg.Error as error:
        result.error = DatabaseError(
            f"{definition.key}: {first_line(error)}",
            hint=f"what has landed is kept; exporter load {definition.key} goes on from there",
        )
    except ExporterError as error:
        result.error = error
    except KeyboardInterrupt as stop:
        result.error = signals.reason(stop, f"{definition.key}: interrupted")
    stopped = signals.stopping()
    if stopped and isinstance(result.error, DatabaseError):  # its sessions were ended for it
        result.error = signals.reason(stopped, f"{definition.key}: interrupted")
    if result.error:
        with (
            contextlib.suppress(psycopg.Error, ExporterError),
            connect("DATABASE_URL_ANALYTICS") as destination,
        ):
            record_failure(destination, result)
    result.seconds = time.monotonic() - result.began
    return result


def _run(
    attempt: Attempt,
    wanted: Wanted,
    after: After | None,
    crew: Crew | None,
    watched: way.Watched,
) -> None:
    """Read onward from the stored position, or what is wanted instead; store how far that is."""
    definition, destination, result = attempt.definition, attempt.destination, attempt.result
    stored = _locked_state(attempt)
    old_key = stored.binding.reading.keys if stored.binding else ()
    reader = reader_of(definition, attempt.session)
    with reader.opened(stored, destination) as table:
        definition = keyed(definition, table)
        attempt = attempt._replace(definition=definition)
        if not wanted.full_refresh:
            worth.refuse_elsewhere(attempt, stored, reader)
        oid, empty = raw_table.oid_and_emptiness(destination, definition.destination)
        binding = Binding(reader.found, oid, reader.reading())
        stored, wanted, gone = worth.weigh(attempt, stored, reader, binding, wanted, empty=empty)
        begun = reader.begun(stored, wanted)
        raw = raw_table.prepare(destination, definition.destination, begun, attempt.say)
        stored, binding = _of_new(raw, destination, stored, binding)
        shared = bool(crew and crew.shares)
        plan = reader.plan(stored, raw, wanted, empty=empty, shared=shared)
        if gone or plan.reconciles:
            from exporter.load.deletes import reconcile  # noqa: PLC0415

            after = after or reconcile(MOST_DELETES)
        if plan.blocks is None and crew and crew.ranges_only:
            from exporter.load.ranges import NotByRanges  # noqa: PLC0415  a cluster has it already

            raise NotByRanges
        if wanted.sweep or not plan.goes_on:
            watched.begins_anew()
        tell_plan(attempt, plan, stored)
        transfer = Transfer(attempt, plan, raw)
        direct = plan.blocks is not None and plan.blocks.direct
        # Staged rows are upserted on the key; the others have it when all are there, if it can be.
        give_key = raw_table.key_statement if direct else raw_table.ensure_key
        give_key(destination, raw, old_key)
        if plan.blocks is not None:
            from exporter.load.first import land_blocks  # noqa: PLC0415  most loads do not need it

            land_blocks(transfer, plan.blocks, crew)
            raw_table.ensure_key(destination, raw)
        transfer.land(reader.batches(plan))
        _tell_swept(attempt, plan)
        final = reader.finished()
        if not wanted.span:
            final = final._replace(binding=binding)
        batches = result.totals.batches
        stamp = transfer.stamp_of(batches) if batches else stored.exported_at
        with destination.transaction():
            transfer.store(final._replace(exported_at=stamp), "ok")
        reader.confirm(final)
        if after:
            watched.begins_anew()
            after(transfer, table)


def _locked_state(attempt: Attempt) -> State:
    """Take the definition's lock; return what is stored. Raises LockedError."""
    target, destination, result = (
        attempt.definition.destination,
        attempt.destination,
        attempt.result,
    )
    state.create_tables(destination)
    state.lock(destination, target)
    stored = state.read(destination, target)
    if stored.binding is None:  # an earlier version's, if there is one
        state.take_over(destination, target)
    if stored.run is not None:  # a first load that did not end
        from exporter.state import fence  # noqa: PLC0415  what most loads do not need

        fence.close(destination, target)
        stored = state.read(destination, target)
    if result.run_id is not None and not take_counts(destination, result):
        result.totals = Totals()  # connected again, to a server that lost all of it
    result.cursor = stored.cursor
    return stored


def _of_new(
    raw: RawTable, destination: Connection, stored: State, binding: Binding
) -> tuple[State, Binding]:
    """Return what a position is bound to where the raw table has only now been made."""
    if binding.raw:
        return stored, binding
    oid, _ = raw_table.oid_and_emptiness(destination, raw.target)
    made = binding._replace(raw=oid)
    return stored._replace(binding=made) if stored.binding == binding else stored, made


def _tell_swept(attempt: Attempt, plan: Plan) -> None:
    found = attempt.result.totals.rows_swept
    if found:
        rows = f"{found:,} rows that the cursor had passed over"
        attempt.say(f"the sweep found {rows}: {plan.passed_over}")


def tell_plan(attempt: Attempt, plan: Plan, stored: State) -> None:
    """Tell what will be read and why: with ``-v``, and where the source hides something."""
    say, horizon = attempt.say, plan.horizon
    if horizon:
        if plan.unseen:
            say(plan.unseen)
        safe = plan.bound.value if plan.bound else None
        by_cursor = (
            f"reads from {stored.watermark or 'the start'}, has landed up to"
            f" {stored.cursor or 'nothing yet'}; transactions are open since {horizon.oldest_open},"
            f" the next load reads from {safe or 'the start'} on"
        )
        by_transaction = f"reads what transaction {stored.cursor} and later ones wrote"
        if stored.cursor is None:
            by_transaction = "reads everything"
        say(
            by_cursor if plan.order else by_transaction,
            "debug",
            "window",
            cursor=stored.cursor,
            watermark=stored.watermark,
            horizon=horizon.oldest_open,
            clock=horizon.clock,
            safe=safe,
            standby=horizon.standby,
        )
    say(f"{plan.path}: {plan.how()}", "debug", "path", path=plan.path, how=plan.how())
    if plan.call:
        say(f"source: {plan.call}", "debug", "call")
