"""The rounds of the benchmark: same rows, same keys, same durability for every contestant."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections import defaultdict
from dataclasses import asdict

import click
import psycopg

from benchmarks.contestants import (
    CONTESTANTS,
    EXPORTER,
    FIRST,
    NOTHING_NEW,
    ROOT,
    Contestant,
    Place,
)
from benchmarks.measure import Cost, cost_of
from benchmarks.place import about, fill_source, place_of, rotated, sql, write_section
from exporter.demo.demo import fill

# Two changes of different size where a per cent is more than the fixed number: the time of the
# second must not grow with the table.
CHANGES = {"1% changed + 1% new": None, "10,000 changed + 10,000 new": 10_000}
RESULTS = ROOT / "benchmarks" / "results.json"
# One stamp a change, ten minutes after the newest one, as if loads were that far apart: rows that
# the lookback would look at again are not in the figures.
_STAMP = "select max(updated_at) + interval '10 minutes' from \"StatEvent\""
_CHANGE = """
update "StatEvent" set status = 'VALIDATED', updated_at = %(stamp)s
where id in (select id from "StatEvent" order by md5(id || %(round)s::text) limit %(share)s)
"""
_RESTAMP = """
update "StatEvent" set updated_at = %(stamp)s where id > %(last)s
"""


@click.command()
@click.option("--rows", "sizes", multiple=True, type=int, help="Instead of 100,000 and 1,000,000.")
@click.option("--large", is_flag=True, help="10,000,000 rows, too.")
@click.option("--rounds", default=3, show_default=True, help="Figures are medians of so many.")
@click.option("--only", multiple=True, help="These contestants.")
@click.option("--save", is_flag=True, help="Write results.json, README.md and the plot.")
def main(
    sizes: tuple[int, ...], large: bool, rounds: int, only: tuple[str, ...], save: bool
) -> None:
    """Run the contestants on an embedded server, or on the databases that DATABASE_URL_* name."""
    chosen = [one for one in CONTESTANTS if not only or one.name in only]
    sizes = sizes or (100_000, 1_000_000)
    results = []
    for rows in (*sizes, 10_000_000) if large else sizes:
        with place_of() as place:
            results += _measure(place, chosen, rows, rounds)
        click.echo(_table(results, rows))
    if save:
        run = about(rounds)
        RESULTS.write_text(json.dumps({"about": run, "results": results}, indent=1))
        tables = "\n".join(
            _table(results, rows) for rows in sorted({int(str(one["rows"])) for one in results})
        )
        write_section("load", f"{run}\n\n{tables}")
        python = ROOT / ".bench" / "bin" / "python"
        subprocess.run([python, ROOT / "benchmarks" / "plot.py"], check=True)


def _measure(
    place: Place, chosen: list[Contestant], rows: int, rounds: int
) -> list[dict[str, object]]:
    """Return the medians of ``rounds`` rounds, in which each contestant meets the same rows.

    First loads come one by one, the later phases with all tables in place.
    """
    chosen = [one for one in chosen if rows <= one.largest]
    followers = [one for one in chosen if one.follows]
    fill_source(place, rows)
    costs: dict[tuple[str, str], list[Cost]] = defaultdict(list)

    def measure(one: Contestant, phase: str, number: int) -> None:
        cost = _cost(place, one, phase)
        if cost is not None:
            costs[one.name, phase].append(cost)
            click.echo(
                f"{rows:>10,} rows, round {number + 1}, {phase}: {one.name} {cost.seconds:.2f} s",
                err=True,
            )

    for number in range(rounds):
        for one in rotated(chosen, number):
            _clear(place, chosen)  # four tables of ten million rows are more than memory holds
            measure(one, FIRST, number)
            if one.follows:
                _same(place, [one])
    _clear(place, chosen)
    for one in followers:
        _cost(place, one, FIRST)
        sql(place.analytics, f"vacuum (analyze) {one.table}")  # else it would come in between
    for number in range(rounds):
        turn = rotated(chosen, number)
        for phase in _later(rows):
            if phase in CHANGES:
                _change(place, CHANGES[phase] or rows // 100, number)
            for one in turn:
                measure(one, phase, number)
        _same(place, followers)
    return [
        {"rows": rows, "contestant": name, "phase": phase, **_median(found)}
        for (name, phase), found in costs.items()
    ]


def _clear(place: Place, chosen: list[Contestant]) -> None:
    for one in chosen:
        sql(place.analytics, one.clear)


def _cost(place: Place, one: Contestant, phase: str) -> Cost | None:
    """What a phase costs a contestant; None where it does not take part."""
    command = one.command(phase)
    if command is None:
        return None
    sql(place.analytics, "checkpoint")
    environment = _environment(place, one.name, fresh=phase == FIRST)
    return cost_of(command(place), environment, place.analytics)


def _later(rows: int) -> list[str]:
    """Return the phases after the first load."""
    changes = [name for name, fixed in CHANGES.items() if fixed is None or fixed < rows // 100]
    return [*changes, NOTHING_NEW]


def _change(place: Place, share: int, number: int) -> None:
    """Change so many rows, anywhere in the table, and add as many."""
    newest = sql(place.core, 'select max(id) from "StatEvent"')[0][0]
    stamp = sql(place.core, _STAMP)[0][0]
    last = int(str(newest).removeprefix("evt_"))
    with psycopg.connect(place.core) as connection:
        connection.execute(_CHANGE, {"round": number, "share": share, "stamp": stamp})
    fill(place.core, last + 1, last + share)
    with psycopg.connect(place.core) as connection:
        connection.execute(_RESTAMP, {"last": newest, "stamp": stamp})
    sql(place.core, 'vacuum "StatEvent"')  # else the first to read would tidy up for the others


def _environment(place: Place, name: str, *, fresh: bool) -> dict[str, str]:
    folder = place.folder / name.replace(" ", "_")
    if fresh:
        subprocess.run(["rm", "-rf", folder], check=True)
    return {
        **os.environ,
        "DATABASE_URL_CORE": place.core,
        "DATABASE_URL_ANALYTICS": place.analytics,
        "DLT_DATA_DIR": str(folder),
        "RUNTIME__DLTHUB_TELEMETRY": "false",
        "RUNTIME__LOG_LEVEL": "ERROR",
    }


def _same(place: Place, followers: list[Contestant]) -> None:
    """Assert that these landed every row of the source, as it is now."""
    statement = "select count(*), max(updated_at)::text, count(*) filter (where status {}) from {}"
    wanted = sql(place.core, statement.format("= 'VALIDATED'", '"StatEvent"'))
    for one in followers:
        found = sql(place.analytics, statement.format("= 'VALIDATED'", one.table))
        assert found[0][0] == wanted[0][0], (one.name, found, wanted)
        assert found[0][2] == wanted[0][2], (one.name, found, wanted)


def _median(costs: list[Cost]) -> dict[str, float]:
    every = [asdict(cost) for cost in costs]
    return {name: round(statistics.median(c[name] for c in every), 3) for name in every[0]}


def _table(results: list[dict[str, object]], rows: int) -> str:
    """Return one size's results as Markdown; ratios are to this loader."""
    lines = [
        f"**{rows:,} rows**",
        "",
        "| | | seconds | to exporter's | CPU, s | peak MB | WAL, MB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for phase in (FIRST, *_later(rows)):
        of = {str(r["contestant"]): r for r in results if (r["rows"], r["phase"]) == (rows, phase)}
        for place, name in enumerate(sorted(of, key=lambda n: float(str(of[n]["seconds"])))):
            one = {key: float(str(of[name][key])) for key in ("seconds", "cpu", "memory", "wal")}
            ours = float(str(of[EXPORTER]["seconds"])) if EXPORTER in of else one["seconds"]
            ratio = one["seconds"] / ours
            lines.append(
                f"| {'' if place else phase} | {name} | {one['seconds']:.2f} | {ratio:.2f} |"
                f" {one['cpu']:.2f} | {one['memory'] / 2**20:.0f} | {one['wal'] / 2**20:.1f} |"
            )
    return "\n".join(lines) + "\n"
