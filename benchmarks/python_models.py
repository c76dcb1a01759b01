"""A row function as a Python model, beside pandas; and a relation beside the SQL model."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections import defaultdict

import click

from benchmarks.contestants import ROOT, SELECTED, Place
from benchmarks.measure import Cost, cost_of
from benchmarks.place import about, fill_source, make_project, place_of, rotated, sql, write_section

TRANSFORM = (ROOT / "benchmarks" / "transform.py").read_text()
MODELS = {
    "events.sql": f'select {SELECTED} from public."StatEvent"',
    "row_function.py": TRANSFORM
    + "\n\ndef model(dbt, session):\n    dbt.config(materialized='table')\n"
    "    return dbt.ref('events').map(transform)\n",
    "relation.py": "def model(dbt, session):\n    dbt.config(materialized='table')\n"
    "    return dbt.ref('events')\n",
    "ibis_expression.py": "def model(dbt, session):\n    dbt.config(materialized='table')\n"
    "    return dbt.ref('events').ibis()\n",
    "query.sql": "{{ config(materialized='table') }} select * from {{ ref('events') }}",
}
PANDAS = "pandas"
CONTESTANTS = ("row_function", "relation", "ibis_expression", "query")


@click.command()
@click.option("--rows", default=1_000_000, show_default=True, help="Events to go through.")
@click.option("--rounds", default=3, show_default=True, help="Figures are medians of so many.")
@click.option("--save", is_flag=True, help="Write README.md.")
def main(rows: int, rounds: int, save: bool) -> None:
    """Measure each, the order another one each round."""
    costs: dict[str, list[Cost]] = defaultdict(list)
    built: dict[str, list[float]] = defaultdict(list)
    with place_of() as place:
        make_project(place.folder, place.core, MODELS)
        fill_source(place, rows)
        _dbt(place, "events")
        for number in range(rounds):
            every = (*CONTESTANTS, PANDAS)
            for name in rotated(every, number):
                sql(place.core, f"drop table if exists {name}")
                sql(place.core, "checkpoint")
                if name == PANDAS:
                    python = str(ROOT / ".bench" / "bin" / "python")
                    job = [python, str(ROOT / "benchmarks" / "pandas_job.py"), place.core]
                    costs[name].append(cost_of(job, dict(os.environ), place.core))
                    built[name].append(costs[name][-1].seconds)
                else:
                    costs[name].append(_dbt(place, name))
                    ran = json.loads((place.folder / "target" / "run_results.json").read_text())
                    built[name].append(ran["results"][0]["execution_time"])
                click.echo(f"{name}: {built[name][-1]:.2f} s", err=True)
                assert sql(place.core, f"select count(*) from {name}") == [(rows,)]
            same = "select count(*) from (select {0} from {1} except all select {0} from {2}) as d"
            plain = "id, host, tag, is_bot, status, source, created_at"
            assert sql(place.core, same.format(plain, "row_function", PANDAS)) == [(0,)]
    text = _table(costs, built)
    click.echo(text)
    if save:
        write_section("python", f"{about(rounds)}; {rows:,} rows\n\n{text}")


def _dbt(place: Place, model: str) -> Cost:
    folder = str(place.folder)
    words = ["run", "-s", model, "--project-dir", folder, "--profiles-dir", folder]
    environment = {**os.environ, "DBT_SEND_ANONYMOUS_USAGE_STATS": "false"}
    command = [sys.executable, "-m", "dbt.cli.main", *words]
    environment["PYTHONPATH"] = str(ROOT)
    return cost_of(command, environment, place.core)


def _table(costs: dict[str, list[Cost]], built: dict[str, list[float]]) -> str:
    """Return the results as Markdown: the model's seconds, the command's, and its memory."""
    lines = ["| | model, s | command, s | CPU, s | peak MB |", "|---|---:|---:|---:|---:|"]
    for name, found in costs.items():
        seconds, cpu, memory = (
            statistics.median(getattr(cost, figure) for cost in found)
            for figure in ("seconds", "cpu", "memory")
        )
        lines.append(
            f"| {name.replace('_', ' ')} | {statistics.median(built[name]):.2f} | {seconds:.2f} |"
            f" {cpu:.2f} | {memory / 2**20:.0f} |"
        )
    return "\n".join(lines) + "\n"
