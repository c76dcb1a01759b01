"""``exporter verify`` beside the checksum that a person would type, on both servers."""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import click

from benchmarks.contestants import ROOT, Place
from benchmarks.measure import Cost, cost_of
from benchmarks.place import about, fill_source, place_of, rotated, sql, write_section

TYPED, EQUAL, SEEDED, REPAIR = (
    "count(*), sum(hashtext(t::text))",
    "exporter verify",
    "exporter verify, 1,000 rows differ",
    "exporter verify --repair of those",
)
_SEED = (
    "update analytics_raw.stat_event set tag = 'seeded' where id in"
    " (select id from analytics_raw.stat_event order by md5(id) limit 1000)"
)


@click.command()
@click.option("--rows", default=10_000_000, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Figures are medians of so many.")
@click.option("--save", is_flag=True, help="Write README.md.")
def main(rows: int, rounds: int, save: bool) -> None:
    """Measure equal tables, and a thousand rows that differ."""
    costs: dict[str, list[Cost]] = defaultdict(list)
    with place_of() as place:
        environment = {
            **os.environ,
            "DATABASE_URL_CORE": place.core,
            "DATABASE_URL_ANALYTICS": place.analytics,
        }
        fill_source(place, rows)
        subprocess.run(_exporter("load"), env=environment, check=True)
        sql(place.analytics, "vacuum (analyze) analytics_raw.stat_event")
        for number in range(rounds):
            for name in (*rotated((TYPED, EQUAL), number), SEEDED, REPAIR):
                if name == SEEDED:
                    sql(place.analytics, _SEED)
                cost = cost_of(_command(place, name), environment, place.analytics)
                costs[name].append(cost)
                click.echo(f"round {number + 1}: {name} {cost.seconds:.2f} s", err=True)
    table = _table(costs)
    click.echo(table)
    if save:
        write_section("verify", f"{about(rounds)}; {rows:,} rows\n\n{table}")


def _command(place: Place, name: str) -> list[str]:
    if name == TYPED:
        typed = [
            ["psql", url, "-qXAt", "-c", f"select {TYPED} from {table} t"]
            for url, table in (
                (place.core, '"StatEvent"'),
                (place.analytics, "analytics_raw.stat_event"),
            )
        ]
        both = " & ".join(shlex.join(command) for command in typed)
        return ["sh", "-c", f"{both} & wait"]
    if name == SEEDED:  # says that they differ by its exit status
        return ["sh", "-c", f"{shlex.join(_exporter('verify'))}; [ $? = 1 ]"]
    return _exporter("verify") if name == EQUAL else _exporter("verify", "--repair")


def _exporter(*words: str) -> list[str]:
    program = Path(sys.executable).parent / "exporter"
    return [str(program), words[0], "StatEvent", *words[1:], "--project-dir", str(ROOT)]


def _table(costs: dict[str, list[Cost]]) -> str:
    lines = ["| | seconds | to the SQL | CPU, s | peak MB |", "|---|---:|---:|---:|---:|"]
    seconds = {
        name: statistics.median(one.seconds for one in found) for name, found in costs.items()
    }
    for name, found in costs.items():
        cpu = statistics.median(one.cpu for one in found)
        memory = max(one.memory for one in found) / 1e6
        lines.append(
            f"| {name} | {seconds[name]:.2f} | {seconds[name] / seconds[TYPED]:.2f} | {cpu:.2f}"
            f" | {memory:.0f} |"
        )
    return "\n".join(lines) + "\n"
