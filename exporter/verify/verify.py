"""``exporter verify``: whether raw is what the source is, and what to do about what differs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

import psycopg

from exporter import state
from exporter.config import Definition
from exporter.errors import DatabaseError, ExporterError
from exporter.load import deletes
from exporter.load.one import load
from exporter.load.transfer import After, Transfer, refuse_more
from exporter.raw import compare
from exporter.raw.compare import Difference, Sums
from exporter.raw.sides import Comparison, comparison
from exporter.source import Table, describe, find_table, reader_of
from exporter.state import outcome
from exporter.terminal import Console, signals
from exporter.wire import Connection, Sessions, connect, first_line, stopped_in_order, with_retries


@dataclass
class Verdict:
    """What a comparison found. Rows in flight are those that the next load lands."""

    key: str
    rows_source: int = 0
    rows_raw: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(compare.KINDS, 0))
    rows: list[Difference] = field(default_factory=list)  # the first of each kind
    repaired: bool = False
    landed: int = 0  # by a repair: rows written to raw, and rows marked there or removed
    deleted: int = 0
    kept: int = 0  # extra rows that a repair left alone
    seconds: float = 0.0
    error: ExporterError | None = None

    @property
    def differs(self) -> bool:
        """Whether rows differ that no load will bring."""
        return any(self.counts[kind] for kind in ("missing", "extra", "different"))

    @property
    def status(self) -> str:
        """``equal``, ``different``, ``repaired``, or what ``outcome`` says of the error."""
        if self.error is not None:
            return outcome(self.error)
        if not self.differs:
            return "equal"
        return "repaired" if self.repaired and not self.kept else "different"

    def as_dict(self) -> dict[str, object]:
        """Return what ``--json`` and the log in JSON tell."""
        return {
            "key": self.key,
            "status": self.status,
            "rows_source": self.rows_source,
            "rows_raw": self.rows_raw,
            **{kind.replace(" ", "_"): count for kind, count in self.counts.items()},
            "rows": [
                {"kind": one.kind, "key": one.row, "columns": list(one.columns)}
                for one in self.rows
            ],
            "landed": self.landed,
            "deleted": self.deleted,
            "seconds": round(self.seconds, 3),
            "error": str(self.error) if self.error else None,
        }

    def as_json(self) -> str:
        """Return the one-line object of ``--json``."""
        return json.dumps(self.as_dict())

    def __str__(self) -> str:
        told = [f"{count:,} {kind}" for kind, count in self.counts.items() if count]
        lines = [
            f"{self.key}: {self.rows_source:,} rows at the source, {self.rows_raw:,} in raw,"
            f" compared in {self.seconds:.1f} s",
            f"  {', '.join(told) if self.differs else ', '.join(['equal', *told])}",
        ]
        for kind in compare.KINDS:
            named = [one for one in self.rows if one.kind == kind]
            for one in named:
                key = ", ".join(f"{name}={value}" for name, value in one.row.items())
                columns = f": {', '.join(one.columns)}" if one.columns else ""
                lines.append(f"  {kind:<9}  {key}{columns}")
            if named and self.counts[kind] > len(named):
                lines.append(f"  {kind:<9}  … and {self.counts[kind] - len(named):,} more")
        if self.counts["in flight"]:
            lines.append("  in flight: changed since the last load, the next one lands them")
        if self.repaired:
            lines.append(f"  repaired: {self.landed:,} landed, {self.deleted:,} deleted")
        return "\n".join(lines)


def advice(definition: Definition, verdict: Verdict) -> str:
    """Return what to do about rows that differ."""
    command = f"exporter verify {definition.key} --repair"
    counts = verdict.counts
    gone = verdict.kept or (0 if counts["missing"] or counts["different"] else counts["extra"])
    if (
        gone
        and definition.destination.conflict_columns
        and definition.destination.deletes == "ignore"
    ):
        return (
            f"{gone:,} rows are gone at the source, and stay while"
            f" exporter.deletes is ignore; set it to mark or remove ({definition.where}), then"
            f" {command}"
        )
    if definition.destination.mode == "append":
        command = f"exporter load {definition.key} --full-refresh"
    return f"raw is not what the source is: {command} makes it so"


def verify(definition: Definition, console: Console, *, repair: bool, most: float) -> Verdict:
    """Compare the source and raw of one definition. Never raises ExporterError: see ``error``.

    A repair is a load that then lands what differs, and applies the definition's ``deletes`` to
    what is extra unless that is more than ``most`` percent of raw.
    """
    verdict = Verdict(definition.key)
    began = time.monotonic()
    looked: list[tuple[Comparison, Sums]] = []

    def attempt() -> None:
        with (
            connect("DATABASE_URL_ANALYTICS") as destination,
            connect("DATABASE_URL_CORE") as source,
            stopped_in_order(source, destination),
        ):
            looked.append(_look(definition, source, destination, verdict, console))

    try:
        with_retries(
            attempt, lambda why: console.say(f"{why}; connecting again", key=definition.key)
        )
    except psycopg.Error as error:
        hint = None
        if isinstance(error, psycopg.errors.QueryCanceled):
            hint = "a statement reads up to 1 GB: give the role a longer statement_timeout"
        verdict.error = DatabaseError(f"{definition.key}: {first_line(error)}", hint=hint)
    except ExporterError as error:
        verdict.error = error
    except KeyboardInterrupt as stop:
        verdict.error = signals.reason(stop, f"{definition.key}: interrupted")
    verdict.seconds = time.monotonic() - began
    if repair and verdict.differs and verdict.error is None:
        with Sessions() as sessions:
            done = load(
                definition,
                console,
                sessions,
                after=_repairing(verdict, *looked[-1], most),
                command="verify --repair",
            )
        verdict.error = done.error
        verdict.repaired = done.error is None
    return verdict


def _look(
    definition: Definition,
    source: Connection,
    destination: Connection,
    verdict: Verdict,
    console: Console,
) -> tuple[Comparison, Sums]:
    table = find_table(source, definition.source, destination)
    describe(definition, table)
    both = comparison(source, destination, definition.destination, table)
    if both.missing:
        names = ", ".join(both.missing)
        console.say(f"raw does not have {names} yet, the next load adds it", key=definition.key)
    if not definition.destination.conflict_columns:
        names = ", ".join(one.name for one in both.raw.keys)
        console.say(f"has no conflict_columns: its rows are told by {names}", key=definition.key)
    text = both.source.rows().as_string(source)
    console.say(f"source: {text}", "debug", key=definition.key, event="sql", sql=text)
    sums = compare.sums(
        source,
        destination,
        both,
        lambda rows, size: console.progress(definition.key, rows, size, table.rows),
    )
    verdict.rows_source, verdict.rows_raw = sums.rows_source, sums.rows_raw
    if sums.differ:
        _look_closer(source, destination, definition, both, sums, verdict)
    return both, sums


def _look_closer(
    source: Connection,
    destination: Connection,
    definition: Definition,
    both: Comparison,
    sums: Sums,
    verdict: Verdict,
) -> None:
    """Tell lost rows from those in flight, by raw and position as of one moment.

    The source is looked at after them: what it has then and they have not is for the next load.
    """
    destination.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with destination.transaction():
        stored = state.State()
        if state.tables_exist(destination):
            stored = state.read(destination, definition.destination)
        reader = reader_of(definition, source)
        with reader.opened(stored, None):
            flight, young = reader.in_flight(stored), deletes.not_yet(both, reader.horizon)
            verdict.counts = compare.narrow(
                source, destination, both, sums, flight=flight, young=young
            )
            verdict.rows = compare.name(source, destination, both)


def _repairing(verdict: Verdict, before: Comparison, sums: Sums, most: float) -> After:
    """Return what the load is to do when it has landed what was in flight."""

    def after(transfer: Transfer, table: Table) -> None:
        attempt, target = transfer.attempt, transfer.raw.target
        source, destination = attempt.source, attempt.destination
        both = comparison(source, destination, target, table)
        seen = sums
        if before.missing:  # columns that the load has given to raw meanwhile
            seen = compare.sums(source, destination, both)
        applies = target.deletes != "ignore"
        with destination.transaction():
            young = deletes.not_yet(both, transfer.plan.horizon)
            found = compare.narrow(source, destination, both, seen, young=young)
            stamp = deletes.next_stamp(transfer)
            if applies:
                command = f"exporter verify {target.key} --repair"
                refuse_more(target.key, found["extra"], seen.rows_raw, most, command)
                deletes.apply(transfer, both, stamp)
            if found["missing"] or found["different"]:
                where = seen.condition(both.source)
                verdict.landed = transfer.land_at_once(table, where, stamp)
            deletes.store(transfer, stamp)
        verdict.deleted = attempt.result.totals.rows_deleted
        verdict.kept = 0 if applies else found["extra"]

    return after
