"""``exporter status``: how every definition stands, and the last runs of one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from exporter.commands import shared as cli
from exporter.terminal import text

if TYPE_CHECKING:
    from exporter.monitoring.status import Behind, Status


@click.command(
    "status",
    epilog=cli.examples(
        "exporter status",
        "exporter status StatEvent",
        "exporter status 'crm_*' tag:nightly",
        "exporter status --json | jq -r 'select(.status != \"ok\").key'",
    ),
)
@click.argument("keys", nargs=-1, metavar="[KEY]...", type=cli.KEY)
@cli.as_json
@cli.shared
def command(call: cli.Call, keys: tuple[str, ...], as_json: bool) -> None:
    """Show the last run, position, backlog and freshness of each definition.

    With one KEY, show its last runs.
    """
    from exporter.config import project
    from exporter.monitoring import slots, status

    chosen = call.definitions(keys, source=False)
    if keys == (chosen[0].key,):
        found = status.recent_runs(chosen[0])
        lines = _table_of_runs(chosen[0].key, found)
    else:
        captured = slots.sources_of(project.declared(call.root()))
        statuses = list(status.current(chosen, captured, call.console.say))
        found = [it.as_dict() for it in statuses]
        lines = _table_of_definitions(statuses)
    if as_json:
        lines = [json.dumps(record, default=lambda value: value.isoformat()) for record in found]
    cli.out(*lines)


def _table_of_definitions(statuses: list[Status]) -> list[str]:
    head = ("KEY", "LAST RUN", "WRITTEN", "ROWS/S", "POSITION", "BEHIND", "FRESH")
    right = ("WRITTEN", "ROWS/S", "BEHIND")
    lines = text.table(head, map(_cells, statuses), right=right, width=text.width())
    notes = [line for status in statuses for line in _notes(status)]
    return [*lines, "", *notes] if notes else lines


def _cells(status: Status) -> tuple[str, ...]:
    run, behind, rate = status.run or {}, status.behind, status.rows_per_second
    last = status.ended
    if run:
        ago = "" if last == "running" else " ago"
        last += f" {text.duration(run['ago'])}{ago}"
    backlog = "?"
    if behind:
        backlog = ("~" if behind.estimated else "") + _amount(behind)
        backlog += f", {text.duration(behind.seconds)}" if behind.seconds else ""
    fresh = status.freshness or "-"
    if status.freshness and status.age is not None:
        fresh += f" {text.duration(status.age.total_seconds())}"
    return (
        status.definition.key,
        last,
        text.number(run["rows_written"]) if run else "-",
        text.number(rate) if rate else "-",
        status.stored.cursor.value[:16] if status.stored.cursor else "-",
        backlog,
        fresh,
    )


def _amount(behind: Behind) -> str:
    from exporter.source import megabytes

    return megabytes(behind.bytes or 0) if behind.rows is None else text.number(behind.rows)


def _notes(status: Status) -> list[str]:
    key = status.definition.key
    return [*_swept(status), *_ended(status, key)]


def _swept(status: Status) -> list[str]:
    if not status.swept:
        return []
    return _wrapped(
        f"{status.definition.key}: in seven days the sweep found {status.swept:,} rows that the"
        " cursor had passed over: a trigger that sets it, a longer lookback, or source.read: scan"
    )


def _ended(status: Status, key: str) -> list[str]:
    if status.ended in ("failed", "interrupted"):
        return _wrapped(f"{key} {status.ended}: {(status.run or {}).get('error')}")
    if status.ended == "died":
        return _wrapped(
            f"{key} died: its last run recorded no end, and no session holds its lock;"
            f" exporter load {key} goes on from the position"
        )
    return _wrapped(f"{key} is running: {status.holder}") if status.ended == "running" else []


def _table_of_runs(key: str, runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return [f"{key} has never run"]
    head = ("STARTED (UTC)", "COMMAND", "ENDED", "SECONDS", "READ", "WRITTEN", "ROWS/S")
    rows = [
        (
            f"{run['started_at']:%Y-%m-%d %H:%M:%S}",
            run["command"],
            run["status"],
            "-" if run["seconds"] is None else f"{run['seconds']:,.1f}",
            text.number(run["rows_read"]),
            text.number(run["rows_written"]),
            text.number(run["rows_per_second"]) if run["rows_per_second"] else "-",
        )
        for run in runs
    ]
    first, *others = text.table(head, rows, right=head[3:], width=text.width())
    lines = [first]
    for line, run in zip(others, runs, strict=True):
        lines += [line, *(_wrapped(run["error"], "  ") if run["error"] else ())]
    return lines


def _wrapped(line: str, first: str = "") -> list[str]:
    return text.wrapped(line, text.width(), first, "  " + first)
