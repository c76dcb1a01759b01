"""A function's rows by exporter and by dlt, into the same server."""

from __future__ import annotations

import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import click

from benchmarks.contestants import ROOT, Place
from benchmarks.measure import Cost, cost_of
from benchmarks.place import about, place_of, rotated, sql, write_section

TABLES = {"exporter": "bench_rows.orders", "dlt": "bench_dlt_rows.orders"}
_SAME = "select count(*), sum(hashtext(concat(id, at, customer, email, amount, paid, note))) from "


@click.command()
@click.option("--rows", default=1_000_000, show_default=True, help="Rows that are yielded.")
@click.option("--rounds", default=3, show_default=True, help="Figures are medians of so many.")
@click.option("--only", multiple=True, help="These contestants.")
@click.option("--save", is_flag=True, help="Write README.md.")
def main(rows: int, rounds: int, only: tuple[str, ...], save: bool) -> None:
    """Measure first loads, the order another one each round."""
    chosen = [name for name in TABLES if not only or name in only]
    costs: dict[str, list[Cost]] = defaultdict(list)
    with place_of() as place:
        for number in range(rounds):
            found = []
            for name in rotated(chosen, number):
                for schema in ("bench_rows", "bench_dlt_rows", "analytics_raw"):
                    sql(place.analytics, f"drop schema if exists {schema} cascade")
                sql(place.analytics, "checkpoint")
                costs[name].append(_cost(place, name, rows, number))
                click.echo(f"round {number + 1}: {name} {costs[name][-1]}", err=True)
                found += sql(place.analytics, f"{_SAME} {TABLES[name]}")
            assert {one[0] for one in found} == {rows}, found
            assert len(set(found)) == 1, found
    table = _table({name: costs[name] for name in chosen}, rows)
    click.echo(table)
    if save:
        write_section("rows", f"{about(rounds)}; {rows:,} rows\n\n{table}")


def _cost(place: Place, name: str, rows: int, number: int) -> Cost:
    environment = {
        **os.environ,
        "BENCH_ROWS": str(rows),
        "DATABASE_URL_ANALYTICS": place.analytics,
        "DLT_DATA_DIR": str(place.folder / f"dlt {number}"),
        "RUNTIME__DLTHUB_TELEMETRY": "false",
        "RUNTIME__LOG_LEVEL": "ERROR",
    }
    if name == "dlt":
        python = ROOT / ".bench" / "bin" / "python"
        command = [str(python), str(ROOT / "benchmarks" / "dlt_rows_job.py")]
    else:
        program = Path(sys.executable).parent / "exporter"
        command = [str(program), "load", "--project-dir", str(ROOT / "benchmarks" / "rows")]
    return cost_of(command, environment, place.analytics)


def _table(costs: dict[str, list[Cost]], rows: int) -> str:
    """Return the results as Markdown; ratios are to this loader."""
    lines = ["| | rows/s | seconds | to exporter's | CPU, s | peak MB |", "|---|" + "---:|" * 5]
    ours = statistics.median(one.seconds for one in next(iter(costs.values())))
    for name, found in costs.items():
        seconds = statistics.median(one.seconds for one in found)
        cpu = statistics.median(one.cpu for one in found)
        memory = max(one.memory for one in found) / 2**20
        lines.append(
            f"| {name} | {rows / seconds:,.0f} | {seconds:.2f} | {seconds / ours:.2f} | {cpu:.2f}"
            f" | {memory:.0f} |"
        )
    return "\n".join(lines) + "\n"
