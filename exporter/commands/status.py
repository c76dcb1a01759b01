"""``exporter status``: how every definition stands, and the last runs of one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.shared import ANALYTICS, KEY, Call, as_json, examples, out, shared
from exporter.terminal import text

if TYPE_CHECKING:
    from exporter.monitoring.status import Status


@click.command(
    "status",
    epilog=examples(
        "exporter status",
        "exporter status StatEvent",
        "exporter status --json | jq -r 'select(.status != \"ok\").key'",
    ),
)
@click.argument("key", metavar="[KEY]", type=KEY, required=False)
@as_json
@shared
def command(call: Call, key: str | None, as_json: bool) -> None:
    """Show how each definition stands: its last run, its position, what is behind, how fresh.

    With a KEY, its last runs.
    """
    from exporter.monitoring import status  # noqa: PLC0415  what --help does not need

    chosen = call.definitions((key,) if key else (), ANALYTICS)
    if key:
        found = status.recent(chosen[0])
        lines = _runs(key, found)
    else:
        standing = list(status.look(chosen, call.say))
        found = [one.as_dict() for one in standing]
        lines = _standing(standing)
    if as_json:
        lines = [json.dumps(one, default=lambda value: value.isoformat()) for one in found]
    for line in lines:
        out(line)


def _standing(standing: list[Status]) -> list[str]:
    from exporter.monitoring.status import rate  # noqa: PLC0415

    rows, notes = [], []
    for one in standing:
        run, behind, speed = one.run or {}, one.behind, rate(one.run or {})
        since = f" {text.duration(run['ago'])}" if run else ""
        last = f"{one.ended}{since}" + ("" if one.ended in ("never", "running") else " ago")
        lag = "?"
        if behind:
            lag = ("~" if behind.estimated else "") + text.number(behind.rows)
            lag += f", {text.duration(behind.seconds)}" if behind.seconds else ""
        fresh = one.freshness or "-"
        if fresh != "-" and one.age is not None:
            fresh += f" {text.duration(one.age.total_seconds())}"
        rows.append(
            (
                one.definition.key,
                last,
                text.number(run["rows_written"]) if run else "-",
                text.number(speed) if speed else "-",
                one.stored.cursor.value[:16] if one.stored.cursor else "-",
                lag,
                fresh,
            )
        )
        notes += _notes(one)
    head = ("KEY", "LAST RUN", "WRITTEN", "ROWS/S", "POSITION", "BEHIND", "FRESH")
    lines = text.table(head, rows, right=("WRITTEN", "ROWS/S", "BEHIND"), width=text.width())
    return [*lines, "", *notes] if notes else lines


def _notes(one: Status) -> list[str]:
    key = one.definition.key
    if one.ended in ("failed", "interrupted"):
        return _wrapped(f"{key} {one.ended}: {(one.run or {}).get('error')}")
    if one.ended == "died":
        return _wrapped(
            f"{key} died: its last run recorded no end, and no session holds its lock;"
            f" exporter load {key} goes on from the position"
        )
    if one.ended == "running":
        return _wrapped(f"{key} is running: {one.holder}")
    return []


def _runs(key: str, found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return [f"{key} has never run"]
    head = ("STARTED (UTC)", "COMMAND", "ENDED", "SECONDS", "READ", "WRITTEN", "ROWS/S")
    rows = [
        (
            f"{one['started_at']:%Y-%m-%d %H:%M:%S}",
            one["command"],
            one["status"],
            "-" if one["seconds"] is None else f"{one['seconds']:,.1f}",
            text.number(one["rows_read"]),
            text.number(one["rows_written"]),
            text.number(one["rows_per_second"]) if one["rows_per_second"] else "-",
        )
        for one in found
    ]
    lines = text.table(head, rows, right=head[3:], width=text.width())
    told = lines[:1]
    for line, one in zip(lines[1:], found, strict=True):
        told += [line, *(_wrapped(one["error"], "  ") if one["error"] else ())]
    return told


def _wrapped(line: str, first: str = "") -> list[str]:
    return text.wrapped(line, text.width() or 80, first, "  " + first)
