"""``upsert`` beside delete+insert and merge: one target each, the same batches for all."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from pathlib import Path

import click
import psycopg
from dbt.cli.main import dbtRunner

from benchmarks.measure import wal_position
from benchmarks.place import about, make_project, place_of, rotated, sql, write_section

STRATEGIES = ("upsert", "merge", "delete+insert")
BATCHES = {
    "1,000": (1_000, True),
    "50,000": (50_000, True),
    "500,000": (500_000, True),
    "500,000 unchanged": (500_000, False),
}
_ROWS = """
select
    'evt_' || lpad(n::text, 12, '0') as id, (array['click', 'print', 'apply'])[1 + n %% 3] as type,
    timestamp '2025-01-01' + n * interval '1 second' as created_at,
    timestamp '2025-01-01' + n * interval '1 second' as updated_at,
    md5(n::text) as click_id, 'https://example.org/page/' || n %% 1000 as referer,
    n %% 7 = 0 as is_bot, 'src_' || n %% 500 as source_id, array['tag' || n %% 9, 'all'] as tags,
    'PENDING' as status, jsonb_build_object('n', n, 'note', md5((n * 7)::text)) as attributes
from generate_series(%(first)s::bigint, %(last)s::bigint) as n
"""
_CHANGED = """
create table batch as
select id, type, created_at, updated_at + interval '1 day' as updated_at, click_id, referer, is_bot,
    source_id, tags, 'VALIDATED ' || %(round)s::text as status, attributes
from (select * from upsert_ order by md5(id || %(round)s::text) limit %(size)s) as picked
"""
_SAME = """
create table batch as
select * from (select * from upsert_ order by md5(id || %(round)s::text) limit %(size)s) as picked
"""


@click.command()
@click.option("--target", default=5_000_000, show_default=True, help="Rows that stand.")
@click.option("--rounds", default=3, show_default=True, help="Figures are medians of so many.")
@click.option("--save", is_flag=True, help="Write README.md.")
def main(target: int, rounds: int, save: bool) -> None:
    """Measure each batch with each strategy, the order another one each round."""
    found: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    os.environ["DBT_SEND_ANONYMOUS_USAGE_STATS"] = "false"
    with place_of() as place:
        make_project(place.folder, place.analytics, _sources())
        _targets(place.analytics, target)
        last = target
        _batch(place.analytics, 0, last, 0, new=False)
        for strategy in STRATEGIES:  # what dbt does but once in a process is not the strategy's
            _run(place.folder, place.analytics, strategy)
        for number in range(rounds):
            turn = rotated(STRATEGIES, number)
            for name, (size, new) in BATCHES.items():
                last = _batch(place.analytics, size, last, number, new=new)
                for strategy in turn:
                    cost = _run(place.folder, place.analytics, strategy)
                    found[name, strategy].append(cost)
                    click.echo(f"{name}, {strategy}: {cost[0]:.2f} s", err=True)
                _same(place.analytics)
    results = [
        {
            "batch": name,
            "strategy": strategy,
            "seconds": round(statistics.median(cost[0] for cost in costs), 3),
            "wal": statistics.median(cost[1] for cost in costs),
        }
        for (name, strategy), costs in found.items()
    ]
    click.echo(_table(results))
    if save:
        write_section(
            "upsert", f"{about(rounds)}; a target of {target:,} rows\n\n{_table(results)}"
        )


def _sources() -> dict[str, str]:
    config = "materialized='incremental', unique_key='id', incremental_strategy='{}'"
    return {
        f"{_model(one)}.sql": f"{{{{ config({config.format(one)}) }}}} select * from public.batch"
        for one in STRATEGIES
    }


def _model(strategy: str) -> str:
    return strategy.replace("+", "_") + "_"


def _targets(url: str, rows: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for strategy in STRATEGIES:
            name = _model(strategy)
            connection.execute(f"drop table if exists {name}".encode())
            values = {"first": 1, "last": rows}
            connection.execute(f"create table {name} as {_ROWS}".encode(), values)
            connection.execute(f"create unique index on {name} (id)".encode())
            connection.execute(f"vacuum (analyze) {name}".encode())


def _batch(url: str, size: int, last: int, number: int, *, new: bool) -> int:
    """Make the table ``batch``, and return the number of the last row there is after it."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("drop table if exists batch")
        values = {"round": number, "size": size // 2 if new else size}
        connection.execute(_CHANGED if new else _SAME, values)
        if new:
            limits = {"first": last + 1, "last": last + size // 2}
            connection.execute("insert into batch " + _ROWS, limits)
        connection.execute("vacuum (analyze) batch")
    return last + (size // 2 if new else 0)


def _run(folder: Path, url: str, strategy: str) -> tuple[float, int]:
    """Return the seconds that dbt says the model took, and the WAL in bytes."""
    sql(url, "checkpoint")
    before = wal_position(url)
    words = ["run", "--quiet", "-s", _model(strategy)]
    done = dbtRunner().invoke([*words, "--project-dir", str(folder), "--profiles-dir", str(folder)])
    assert done.success, done.exception or done.result
    written = wal_position(url) - before
    sql(url, f"vacuum (analyze) {_model(strategy)}")
    return float(done.result.results[0].execution_time), written


def _same(url: str) -> None:
    """Assert that every strategy made the same table."""
    digest = "select count(*), sum(hashtextextended(t::text, 0)) from {} as t"
    assert len({sql(url, digest.format(_model(one)))[0] for one in STRATEGIES}) == 1


def _table(results: list[dict[str, object]]) -> str:
    """Return the results as Markdown; ratios are to ``upsert``."""
    lines = ["| | | seconds | to upsert's | WAL, MB |", "|---|---|---:|---:|---:|"]
    for name in BATCHES:
        of = {str(one["strategy"]): one for one in results if one["batch"] == name}
        for strategy, one in of.items():
            seconds, wal = float(str(one["seconds"])), float(str(one["wal"]))
            ratio = seconds / float(str(of["upsert"]["seconds"]))
            lines.append(
                f"| {name if strategy == 'upsert' else ''} | {strategy} | {seconds:.2f} |"
                f" {ratio:.2f} | {wal / 2**20:.2f} |"
            )
    return "\n".join(lines) + "\n"
