"""``exporter verify``: whether raw is what the source is, and what to do about what differs."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field

import psycopg
from psycopg import sql

from exporter import state
from exporter.config import Definition
from exporter.errors import DatabaseError, ExporterError, SourceError
from exporter.load import deletes
from exporter.load.one import load
from exporter.load.transfer import After, Transfer
from exporter.raw import compare
from exporter.raw.compare import Difference, Sums
from exporter.raw.sides import FALSE, Comparison, comparison
from exporter.source import CopyReader, Table, describe, find_table, keyed, reader_of
from exporter.terminal import Console, Say, signals
from exporter.wire import Connection, Sessions, connect, first_line, stopped_in_order, with_retries


@dataclass
class Verdict:
    """What a comparison found. Rows in flight are those that the next load lands."""

    key: str
    sums: Sums = field(default_factory=Sums)
    missing_columns: tuple[str, ...] = ()  # of raw
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
        """``equal``, ``different``, ``repaired``, or the error's outcome."""
        if self.error is not None:
            return self.error.outcome
        if not self.differs:
            return "equal"
        return "repaired" if self.repaired and not self.kept else "different"

    def as_dict(self) -> dict[str, object]:
        """Return what ``--json`` and the log in JSON tell."""
        return {
            "key": self.key,
            "status": self.status,
            "rows_source": self.sums.rows_source,
            "rows_raw": self.sums.rows_raw,
            **{kind.replace(" ", "_"): count for kind, count in self.counts.items()},
            "rows": [one._asdict() for one in self.rows],
            "landed": self.landed,
            "deleted": self.deleted,
            "seconds": round(self.seconds, 3),
            "error": str(self.error) if self.error else None,
        }

    def __str__(self) -> str:
        counts = [f"{count:,} {kind}" for kind, count in self.counts.items() if count]
        lines = [
            f"{self.key}: {self.sums.rows_source:,} rows at the source, {self.sums.rows_raw:,} in"
            f" raw, compared in {self.seconds:.1f} s",
            f"  {', '.join(counts if self.differs else ['equal', *counts])}",
        ]
        for kind in compare.KINDS:
            named = [one for one in self.rows if one.kind == kind]
            for one in named:
                key = ", ".join(f"{name}={value}" for name, value in one.key.items())
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
    counts, target = verdict.counts, definition.destination
    gone = verdict.kept or (0 if counts["missing"] or counts["different"] else counts["extra"])
    if gone and target.mode == "upsert" and target.deletes == "ignore":
        return (
            f"{gone:,} rows are gone at the source, and stay while exporter.deletes is ignore;"
            f" set it to mark or remove ({definition.where}), then {command}"
        )
    if target.mode != "upsert" or definition.source.read == "changes":
        command = f"exporter load {definition.key} --full-refresh"
    return f"raw is not what the source is: {command} makes it so"


def verify(definition: Definition, console: Console, *, repair: bool, most: float) -> Verdict:
    """Compare the source and raw of one definition. Never raises ExporterError: see ``error``.

    A repair is a load that then lands what differs, and applies the definition's ``deletes`` to
    what is extra unless that is more than ``most`` percent of raw.
    """
    verdict = Verdict(definition.key)
    began = time.monotonic()

    def attempt() -> None:
        with (
            connect("DATABASE_URL_ANALYTICS") as destination,
            connect(definition.source.variable) as source,
            stopped_in_order(source, destination),
        ):
            _compare(definition, source, destination, verdict, console)

    say = functools.partial(console.say, key=definition.key)
    try:
        with_retries(attempt, lambda why: say(f"{why}; connecting again"))
    except psycopg.Error as error:
        verdict.error = DatabaseError(f"{definition.key}: {first_line(error)}")
    except ExporterError as error:
        verdict.error = error
    except KeyboardInterrupt as stop:
        verdict.error = signals.reason(stop, f"{definition.key}: interrupted")
    verdict.seconds = time.monotonic() - began
    if repair and verdict.differs and verdict.error is None:
        after, command = _repairing(verdict, most), "verify --repair"
        with Sessions() as sessions:
            verdict.error = load(definition, console, sessions, after=after, command=command).error
        verdict.repaired = verdict.error is None
    return verdict


def _compare(
    definition: Definition,
    source: Connection,
    destination: Connection,
    verdict: Verdict,
    console: Console,
) -> None:
    say = functools.partial(console.say, key=definition.key)
    table = find_table(source, definition.source, destination)
    definition = keyed(definition, table)
    describe(definition, table)
    both = comparison(source, destination, definition.destination, table)
    if both.missing:
        say(f"raw does not have {', '.join(both.missing)} yet, the next load adds it")
    if not definition.destination.conflict_columns:
        names = ", ".join(one.name for one in both.raw.keys)
        say(f"has no conflict_columns: its rows are told by {names}")
    text = both.source.rows().as_string(source)
    say(f"source: {text}", "debug", event="sql", sql=text)
    verdict.missing_columns = both.missing
    verdict.sums = compare.sums(
        both, lambda rows, size: console.progress(definition.key, rows, size, table.rows)
    )
    if verdict.sums.differ:
        _classify(definition, both, verdict, say)


def _classify(definition: Definition, both: Comparison, verdict: Verdict, say: Say) -> None:
    """Distinguish lost rows from those in flight, by raw and position as of one moment.

    The source is looked at after them: what it has then and they have not is for the next load.
    """
    source, destination = both.source.session, both.raw.session
    destination.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with destination.transaction():
        stored = state.State()
        if state.tables_exist(destination):
            stored = state.read(destination, definition.destination)
        reader = reader_of(definition, source)
        with reader.opened(stored, None):
            unreplicated = both.unreplicated(reader.horizon)
            if isinstance(reader, CopyReader):
                unreplicated = _pending(both, reader, stored, say)
            verdict.counts = compare.classify(
                both,
                verdict.sums,
                in_flight=reader.in_flight(stored),
                unreplicated=unreplicated,
            )
            verdict.rows = compare.differing_rows(both)


def _pending(both: Comparison, reader: CopyReader, stored: state.State, say: Say) -> sql.Composable:
    """Return the condition for rows of raw that the slot has changes of; where it can be read."""
    from exporter.verify.pending import pending  # noqa: PLC0415  what most do not need

    try:
        with both.raw.session.transaction():
            return pending(both, reader, stored)
    except (psycopg.Error, DatabaseError, SourceError) as error:
        why = first_line(error) if isinstance(error, psycopg.Error) else error.message
        say(
            f"the slot cannot be read now: rows that were deleted since the last load count as"
            f" extra, and keys that changed ({why})",
            "warning",
        )
        return FALSE


def _repairing(verdict: Verdict, max_percent: float) -> After:
    """Return what the load is to do when it has landed what was in flight."""

    def after(transfer: Transfer, table: Table) -> None:
        attempt, target = transfer.attempt, transfer.raw.target
        both = comparison(attempt.source, attempt.destination, target, table)
        # Columns that raw lacked, the load has given to it meanwhile.
        sums = compare.sums(both) if verdict.missing_columns else verdict.sums
        before = attempt.result.totals.rows_written
        command = f"exporter verify {target.key} --repair"
        counts = deletes.settle(transfer, both, sums, max_percent, command, land=True)
        verdict.landed = attempt.result.totals.rows_written - before
        verdict.deleted = attempt.result.totals.rows_deleted
        verdict.kept = counts["extra"] if target.deletes == "ignore" else 0

    return after
