"""Several loads at once: in threads, and on a Dask cluster, beside what a model predicts."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import psycopg

from benchmarks.contestants import ROOT, Place
from benchmarks.distance import further_away
from benchmarks.model import SITES, Model, Run
from benchmarks.place import SETTINGS, about, fill_source, rotated, sql, write_section
from exporter.demo.demo import create_databases
from exporter.demo.embedded import Server, running_server

SMALL = 20  # definitions
SIZES = (5_000, 20_000)  # rows of each
LATE = 0.001  # seconds that a message takes where the servers are further away
_DEFINITION = """
      - name: {name}
        config:
          meta:
            exporter:
              key: {name}
              source: {{table: {table}, cursor: {{field: {cursor}, id_field: id}}}}
              conflict_columns: [id]
"""
_TICKS = os.sysconf("SC_CLK_TCK")


@click.command()
@click.option("--rows", default=10_000_000, show_default=True, help="Of the first load by threads.")
@click.option("--cluster-rows", default=2_000_000, show_default=True, help="Of that by workers.")
@click.option("--rounds", default=3, show_default=True, help="Figures are medians of so many.")
@click.option("--save", is_flag=True, help="Write README.md.")
def main(rows: int, cluster_rows: int, rounds: int, save: bool) -> None:
    """First loads and small definitions by threads; first loads by 1, 2 and 3 Dask workers."""
    text = about(rounds) + "\n\n"
    with _servers() as (core, analytics), tempfile.TemporaryDirectory() as folder:
        place = Place(core.url("core"), analytics.url("analytics"), Path(folder))
        text += _threads(place, rows, rounds)
        for size in SIZES:
            text += _definitions(place, size, rounds)
        fill_source(place, cluster_rows)
        text += _cluster(place, core, analytics, rounds)
    click.echo(text)
    if save:
        write_section("scaling", text)


@contextlib.contextmanager
def _servers() -> Iterator[tuple[Server, Server]]:
    with running_server(SETTINGS) as core, running_server(SETTINGS) as analytics:
        create_databases(core)
        create_databases(analytics)
        yield core, analytics


def _threads(place: Place, rows: int, rounds: int) -> str:
    fill_source(place, rows)
    _project(place.folder, ["StatEvent"], "updated_at")
    jobs = ("1", "2", "4")
    found: dict[str, list[float]] = {one: [] for one in jobs}
    for number in range(rounds):
        for one in rotated(jobs, number):
            found[one].append(_seconds(place, "-j", one))
    return _table(
        f"**A first load of {rows:,} rows**", ["", "seconds", "to -j 1"], _ratios(found, "-j {}")
    )


def _definitions(place: Place, rows: int, rounds: int) -> str:
    names = [f"small_{number}" for number in range(SMALL)]
    for name in names:
        sql(
            place.core,
            f"create table if not exists {name} (id int primary key, at timestamptz not null,"
            f" pad text); insert into {name} select n, now(), repeat('x', 100)"
            f" from generate_series(1, {rows}) n on conflict do nothing; analyze {name}",
        )
    _project(place.folder, names, "at")
    title = f"{SMALL} definitions of {rows:,} rows"
    text = _overlap(place, rounds, f"**{title}**")
    with further_away(place.core, place.analytics, seconds=LATE) as (core, analytics):
        trip = _seconds_each(core, "select") * 1000
        far = Place(core, analytics, place.folder)
        return text + _overlap(far, rounds, f"**{title}, {trip:.1f} ms there and back**")


def _overlap(place: Place, rounds: int, title: str) -> str:
    jobs = ("1", "2", "4", "8")
    first: dict[str, list[float]] = {one: [] for one in jobs}
    again: dict[str, list[float]] = {one: [] for one in jobs}
    for number in range(rounds):
        for one in rotated(jobs, number):
            first[one].append(_seconds(place, "-j", one))
            again[one].append(_seconds(place, "-j", one, fresh=False))
    lines = [
        [*left, *right[1:]]
        for left, right in zip(_ratios(first, "-j {}"), _ratios(again, "-j {}"), strict=True)
    ]
    return _table(
        title,
        ["", "first load, s", "to -j 1", "nothing new, s", "to -j 1"],
        lines,
    )


def _seconds(place: Place, *words: str, fresh: bool = True) -> float:
    if fresh:
        sql(place.analytics, "drop schema if exists analytics_raw cascade")
    sql(place.analytics, "checkpoint")
    begin = time.perf_counter()
    _load(place, *words).communicate()
    return time.perf_counter() - begin


def _load(place: Place, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "exporter", "load", "-q", "--json", *words],
        cwd=place.folder,
        env=_environment(place),
        stdout=subprocess.PIPE,
    )


def _environment(place: Place) -> dict[str, str]:
    urls = {"DATABASE_URL_CORE": place.core, "DATABASE_URL_ANALYTICS": place.analytics}
    return {**os.environ, **urls, "PYTHONPATH": str(ROOT)}


def _project(folder: Path, names: list[str], cursor: str) -> None:
    (folder / "models").mkdir(exist_ok=True)
    (folder / "dbt_project.yml").write_text("name: bench\nprofile: dbt_exporter\n")
    tables = [_DEFINITION.format(name=n.lower(), table=n, cursor=cursor) for n in names]
    head = "version: 2\nsources:\n  - name: analytics_raw\n    tables:\n"
    (folder / "models" / "sources.yml").write_text(head + "".join(tables))


def _ratios(found: dict[str, list[float]], name: str) -> list[list[str]]:
    medians = {one: statistics.median(values) for one, values in found.items()}
    base = next(iter(medians.values()))
    return [
        [name.format(one), f"{value:.2f}", f"{value / base:.2f}"] for one, value in medians.items()
    ]


def _table(title: str, head: list[str], lines: list[list[str]]) -> str:
    marks = ["---", *("---:" for _ in head[1:])]
    return (
        "\n".join([title, "", *("| " + " | ".join(one) + " |" for one in (head, marks, *lines))])
        + "\n\n"
    )


# -- the cluster


def _cluster(place: Place, core: Server, analytics: Server, rounds: int) -> str:
    _project(place.folder, ["StatEvent"], "updated_at")
    runs: dict[int, list[Run]] = {1: [], 2: [], 3: []}
    for number in range(rounds):
        for workers in rotated(tuple(runs), number):
            with _dask(place, workers) as (address, scheduler, processes):
                sql(place.analytics, "drop schema if exists analytics_raw cascade")
                sql(place.analytics, "checkpoint")
                run = _first_load(place, address, core, analytics, scheduler, processes)
            runs[workers].append(run)
            click.echo(f"{workers} workers: {run}", err=True)
    middle = {
        n: sorted(found, key=lambda r: r.copied)[len(found) // 2] for n, found in runs.items()
    }
    model = Model.of(middle[1], _commit(place))
    cores = os.cpu_count() or 1
    size = middle[1].size
    checked = [
        [str(n), f"{run.seconds:.1f}", f"{run.copied:.1f}", f"{size / model.shared(n, cores):.1f}"]
        for n, run in middle.items()
    ]
    text = _table(
        f"**A first load of {size / 2**20:,.0f} MB in {middle[1].ranges} ranges, by Dask**",
        ["workers", "seconds", "until the last range, s", "predicted, s"],
        checked,
    )
    mega = 2**20
    text += (
        f"Of one worker: {model.alone / mega:.0f} MB/s; CPU seconds a GB: source"
        f" {model.source * 2**30:.1f}, destination {model.destination * 2**30:.1f}, worker"
        f" {model.loader * 2**30:.1f}; a range has {model.size / mega:.0f} MB, and costs client and"
        f" scheduler {model.client * 1000:.0f} ms, its commit {model.commit * 1000:.0f} ms.\n\n"
    )
    lines = []
    for site in SITES:
        for workers in (10, 100, 1000):
            parts = model.apart(workers, site)
            first = min(parts, key=lambda name: parts[name])
            rate = parts[first]
            hours = 10e9 * size / _rows(place) / rate / 3600
            lines.append([site.name, str(workers), f"{rate / mega:,.0f}", f"{hours:.1f}", first])
    return text + _table(
        "**Predicted for more workers**",
        ["each database", "workers", "MB/s", "hours for 10 billion rows", "the limit"],
        lines,
    )


def _rows(place: Place) -> int:
    return int(str(sql(place.core, 'select count(*) from "StatEvent"')[0][0]))


@contextlib.contextmanager
def _dask(
    place: Place, workers: int
) -> Iterator[tuple[str, subprocess.Popen[bytes], list[subprocess.Popen[bytes]]]]:
    told = place.folder / "scheduler.json"
    told.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack, (place.folder / "dask.log").open("wb") as log:

        def start(kind: str, *words: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard", *words],
                cwd=place.folder,
                env=_environment(place),
                stdout=log,
                stderr=log,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        scheduler = start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(told)
        )
        while not told.exists() or not told.read_text().rstrip().endswith("}"):
            time.sleep(0.05)
        address = json.loads(told.read_text())["address"]
        found = [start("worker", address, "--nthreads", "1", "--no-nanny") for _ in range(workers)]
        log_file = place.folder / "dask.log"
        while log_file.read_text().count("Register worker addr") < workers:
            time.sleep(0.05)
        yield address, scheduler, found


def _first_load(
    place: Place,
    address: str,
    core: Server,
    analytics: Server,
    scheduler: subprocess.Popen[bytes],
    workers: list[subprocess.Popen[bytes]],
) -> Run:
    """Run one; what it takes is counted from its first range on until its last one is in."""
    begin = time.perf_counter()
    process = _load(place, "--scheduler", address)

    def used() -> list[float]:
        return [
            time.perf_counter(),
            _cpu(_pid(core)),
            _cpu(_pid(analytics)),
            sum(_cpu(worker.pid) for worker in workers),
            _cpu(scheduler.pid) + _cpu(process.pid),
        ]

    marks: list[list[float]] = []
    watch = threading.Thread(target=_watch, args=(place.analytics, process, used, marks))
    watch.start()
    assert process.stdout is not None
    told = json.loads(process.stdout.read())
    process.wait()
    seconds = time.perf_counter() - begin
    watch.join()
    spent = [now - then for now, then in zip(marks[-1], marks[0], strict=True)]
    return Run(seconds, *spent, told["bytes"], told["batches"])


def _watch(
    url: str,
    process: subprocess.Popen[bytes],
    used: Callable[[], list[float]],
    marks: list[list[float]],
) -> None:
    """Note what has been used when the first range is begun, and whenever one is in."""
    table = "analytics_raw._exporter_state"
    with psycopg.connect(url, autocommit=True) as connection:
        last = -1
        while process.returncode is None:
            time.sleep(0.02)
            row = connection.execute(f"select to_regclass('{table}') is not null").fetchone()
            if not row or not row[0]:
                continue
            row = connection.execute(f"select next_block from {table}").fetchone()
            if row and row[0] is not None and row[0] > last:
                last = row[0]
                marks.append(used())


def _pid(server: Server) -> int:
    return int((server.data / "postmaster.pid").read_text().splitlines()[0])


def _cpu(pid: int) -> float:
    """CPU seconds of a process and of all that it has started, ended or not."""
    total = 0.0
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total = sum(int(one) for one in fields[11:15]) / _TICKS
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += _cpu(int(child))
    return total


def _commit(place: Place) -> float:
    """Seconds from one range's commit to the next one's: a row changed, on disk, and seen."""
    sql(place.analytics, "create table if not exists chain (n int); insert into chain values (0)")
    spent = _seconds_each(place.analytics, "update chain set n = n + 1")
    sql(place.analytics, "drop table chain")
    return spent + 0.01  # half of the time between two looks of the one that waits


def _seconds_each(url: str, statement: str) -> float:
    count = 200
    with psycopg.connect(url, autocommit=True) as connection:
        begin = time.perf_counter()
        for _ in range(count):
            connection.execute(statement.encode())
        return (time.perf_counter() - begin) / count
