"""`exporter load --scheduler`: a Dask scheduler and three workers, each a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

from exporter.demo.embedded import running_server
from tests.conftest import ROOT, Workplace, compare, fill
from tests.helpers.changes import define, results, same
from tests.helpers.history import replayed
from tests.helpers.processes import start_load
from tests.helpers.tables import ITEM

pytest.importorskip("distributed")

WIDE = ITEM.replace("name: item", "name: wide").replace("key: Item", "key: Wide")
WIDE = WIDE.replace("table: item", "table: wide")
ROWS = 50_000  # 80 MB: large enough to be shared
RAW = "analytics_raw.wide"
TTL = 3  # seconds after which the scheduler gives up a worker that it does not hear of


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass
class Cluster:
    address: str
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)


@contextlib.contextmanager
def running_cluster(
    place: Workplace,
    *,
    host: str = "127.0.0.1",
    inside: Callable[[str], list[str]] = lambda _: [],
    environments: tuple[dict[str, str], ...] = ({}, {}, {}),
) -> Iterator[Cluster]:
    """A scheduler and workers; ``inside`` gives what a command has to begin with, by name."""
    env = {
        **place.environment,
        "PYTHONPATH": str(ROOT),
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": f"{TTL}s",
        "DASK_DISTRIBUTED__WORKER__MEMORY__TARGET": "False",
    }
    dask = [sys.executable, "-m", "distributed.cli"]
    told = place.folder / "scheduler.json"
    log = (place.folder / "dask.log").open("wb")
    with contextlib.ExitStack() as stack:
        stack.enter_context(log)

        def start(name: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [*inside(name), *dask[:2], *words],
                cwd=place.folder,
                env={**env, **environment},
                stdout=log,
                stderr=log,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        start(
            "scheduler",
            "distributed.cli.dask_scheduler",
            *("--host", host, "--port", "0", "--no-dashboard", "--scheduler-file", str(told)),
        )
        until(lambda: told.exists() and told.read_text().rstrip().endswith("}"))
        cluster = Cluster(json.loads(told.read_text())["address"])
        for number, environment in enumerate(environments):
            words = [cluster.address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
            words += ["--name", f"w{number}", "--local-directory", str(place.folder)]
            name = f"worker{number}"
            cluster.workers.append(
                start(name, "distributed.cli.dask_worker", *words, **environment)
            )
        until(lambda: log_of(place).count("Register worker addr") == len(environments))
        yield cluster


def log_of(place: Workplace) -> str:
    return (place.folder / "dask.log").read_text()


@contextlib.contextmanager
def network(*names: str) -> Iterator[Callable[[str], list[str]]]:
    """A network namespace for each name, on one bridge, whose own address is 10.77.0.1.

    Yields what gives the beginning of a command that runs inside.
    """
    tag = f"exp{os.getpid() % 100_000}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("link", "add", tag, "type", "bridge")
        ip("addr", "add", "10.77.0.1/24", "dev", tag)
        ip("link", "set", tag, "up")
        for number, name in enumerate(names):
            space, outside = f"{tag}-{name}", f"{tag}v{number}"
            ip("netns", "add", space)
            ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", outside, "master", tag, "up")
            ip("-n", space, "addr", "add", f"10.77.0.{number + 10}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield lambda name: ["ip", "netns", "exec", f"{tag}-{name}"]
    finally:
        for name in names:
            subprocess.run(
                ["ip", "netns", "delete", f"{tag}-{name}"], check=False, capture_output=True
            )
        subprocess.run(["ip", "link", "delete", tag], check=False, capture_output=True)


def _has_namespaces() -> bool:
    with contextlib.suppress(OSError, subprocess.CalledProcessError), network("probe"):
        return True
    return False


def _wide(place: Workplace, rows: int = ROWS) -> None:
    place.define(WIDE)
    place.query(
        place.core,
        "create table wide (id int primary key, at timestamptz not null, pad text not null);"
        "insert into wide select n, now(), repeat(md5(n::text), 45)"
        f" from generate_series(1, {rows}) n; analyze wide",
    )


def landed(place: Workplace) -> int:
    """How many rows the last run has committed so far."""
    if place.query(place.analytics, "select to_regclass('analytics_raw._exporter_runs') is null")[
        0
    ][0]:
        return 0
    runs = "select rows_written from analytics_raw._exporter_runs order by id desc limit 1"
    return int((place.query(place.analytics, runs) or [(0,)])[0][0])


def pause_inside_a_range(place: Workplace, worker: subprocess.Popen[bytes]) -> None:
    """Stop a worker while its session has a range under way."""
    stuck = (
        "select count(*) from pg_locks l join pg_stat_activity a using (pid) where objsubid = 2"
        " and locktype = 'advisory' and a.datname = current_database() and a.query ilike 'copy%'"
        " and now() - a.state_change > interval '0.3 seconds'"
    )
    for _ in range(200):
        worker.send_signal(signal.SIGSTOP)
        time.sleep(0.4)
        if place.query(place.analytics, stuck) != [(0,)]:
            return
        worker.send_signal(signal.SIGCONT)
        time.sleep(0.03)
    raise AssertionError("never inside a range")


@pytest.mark.long
def test_one_worker_killed_and_one_paused(place: Workplace) -> None:
    _wide(place)
    with running_cluster(place) as cluster:
        process = start_load(place, "--scheduler", cluster.address, BATCH_SIZE="500")
        until(lambda: landed(place) > 0)
        cluster.workers[0].kill()
        pause_inside_a_range(place, cluster.workers[1])
        until(lambda: landed(place) > ROWS // 2 or process.poll() is not None)
        cluster.workers[1].send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert (result["rows_read"], result["rows_written"]) == (ROWS, ROWS)
    compare(place, "public.wide", RAW)
    assert place.load("Wide")["rows_written"] == 0


def _peak(pid: int) -> int:
    """The most memory that a process has had, in MB."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) // 1024 if found else 0


def _traffic(inside: list[str]) -> float:
    """What has gone into a namespace and out of it, in MB."""
    told = subprocess.run([*inside, "cat", "/proc/net/dev"], check=True, capture_output=True)
    (fields,) = re.findall(r"eth0:(.*)", told.stdout.decode())
    return (int(fields.split()[0]) + int(fields.split()[8])) / 1e6


@pytest.mark.long
def test_five_machines(product: Workplace) -> None:
    """Each in a network of its own: a scheduler, a client and three workers; one dies, one sleeps.

    5,000,000 rows, of which the client sees none: its memory and its traffic stay as they are.
    """
    if not _has_namespaces():
        pytest.skip("needs root, and ip with network namespaces")
    rows = 5_000_000
    names = ("scheduler", "client", "worker0", "worker1", "worker2")
    settings = {"listen_addresses": "10.77.0.1", "port": "54330", "max_wal_size": "4GB"}
    with network(*names) as inside, running_server(settings) as server:
        with (server.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.77.0.0/24 trust\n")
        place = Workplace(product.folder, "", "")
        place.core, place.analytics = (
            f"postgresql://postgres@10.77.0.1:54330/{name}" for name in ("core", "analytics")
        )
        with psycopg.connect(server.url("postgres") + "&port=54330", autocommit=True) as admin:
            admin.execute("select pg_reload_conf()")
            admin.execute("create database core")
            admin.execute("create database analytics")
        with psycopg.connect(place.core) as connection:
            connection.execute((ROOT / "exporter" / "demo" / "demo.sql").read_bytes())
        for first in range(1, rows, 500_000):
            fill(place.core, first, first + 499_999)
        with running_cluster(place, host="10.77.0.10", inside=inside) as cluster:
            process = subprocess.Popen(
                [
                    *inside("client"),
                    *(sys.executable, "-m", "exporter", "load", "--json"),
                    *("--scheduler", cluster.address),
                ],
                cwd=place.folder,
                env=place.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            until(lambda: landed(place) > rows // 10, 300)
            before = _peak(process.pid), _traffic(inside("client"))
            cluster.workers[0].kill()
            pause_inside_a_range(place, cluster.workers[1])
            until(lambda: landed(place) > rows // 2 or process.poll() is not None, 600)
            cluster.workers[1].send_signal(signal.SIGCONT)
            until(lambda: landed(place) > rows * 9 // 10 or process.poll() is not None, 600)
            after = _peak(process.pid), _traffic(inside("client"))
            moved = _traffic(inside("worker2"))
            out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert json.loads(out)["rows_written"] == rows
        columns = "id, type::text, created_at, updated_at, referer, status::text, custom_attributes"
        whole = f"select count(*), sum(hashtextextended(row({columns})::text, 0)) from "
        assert place.query(place.core, whole + '"StatEvent"') == place.query(
            place.analytics, whole + "analytics_raw.stat_event"
        )
        assert place.load("StatEvent")["rows_written"] == 0
    print(f"\nclient at 10% and 90%: {before} and {after} MB of memory, of traffic; worker {moved}")
    assert after[0] - before[0] < 5
    assert after[1] - before[1] < 5
    assert moved > 500


@pytest.mark.long
def test_a_range_of_a_client_that_is_gone_never_lands(place: Workplace) -> None:
    """A worker sleeps over its client's death, and over the load that another client makes."""
    _wide(place)
    with running_cluster(place, environments=({},)) as cluster:
        process = start_load(place, "--scheduler", cluster.address, BATCH_SIZE="500")
        until(lambda: 0 < landed(place) < ROWS // 2)
        pause_inside_a_range(place, cluster.workers[0])
        process.kill()
        process.communicate()
        before = landed(place)
        assert before < ROWS
        result = place.load("Wide", BATCH_SIZE="500")
        assert result["rows_read"] == ROWS - before
        compare(place, "public.wide", RAW)
        cluster.workers[0].send_signal(signal.SIGCONT)
        time.sleep(1)
        compare(place, "public.wide", RAW)
    assert place.load("Wide")["rows_written"] == 0


@pytest.mark.long
def test_workers_make_way(place: Workplace) -> None:
    _wide(place)
    with running_cluster(place) as cluster:
        process = start_load(place, "--scheduler", cluster.address, BATCH_SIZE="250")
        until(lambda: landed(place) > 0)
        time.sleep(1)
        began = time.monotonic()
        place.query(place.core, "alter table wide add extra int")
        waited = time.monotonic() - began
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert waited < 4
    assert "which waits for a lock on public.wide; goes on after it" in err
    assert json.loads(out)["rows_read"] == ROWS
    compare(place, "public.wide", RAW)


@pytest.mark.long
def test_small_tables_and_increments_are_loaded_by_workers(place: Workplace) -> None:
    names = [f"item_{number}" for number in range(4)]
    place.define(
        *(
            ITEM.replace("name: item", f"name: {name}")
            .replace("key: Item", f"key: {name}")
            .replace("table: item", f"table: {name}")
            for name in names
        )
    )
    for name in names:
        place.query(
            place.core,
            f"create table {name} (id int primary key, at timestamptz not null);"
            f"insert into {name} select n, now() from generate_series(1, 1000) n",
        )
    with running_cluster(place) as cluster:
        for words, rows in (([], 1000), ([], 10), (["--full-refresh"], 0)):
            done = place.run(
                *("exporter", "load", "--json", "--scheduler", cluster.address, *words),
                DATABASE_URL_CORE="postgresql://nobody@127.0.0.1:1/none",  # not reached from here
            )
            assert done.returncode == 0, done.stderr
            results = [json.loads(line) for line in done.stdout.splitlines()]
            assert {result["key"]: result["rows_written"] for result in results} == dict.fromkeys(
                names, rows
            )
            for name in names:
                compare(place, f"public.{name}", f"analytics_raw.{name}")
                place.query(
                    place.core,
                    f"insert into {name} select max(id) + n, now() from {name},"
                    " generate_series(1, 10) n group by n"
                    if rows == 1000
                    else "select",
                )
        place.query(place.core, "drop table item_2")
        done = place.run("exporter", "load", "--scheduler", cluster.address)
        assert done.returncode == 1
        assert "the source database has no table" in done.stderr
        assert done.stdout.count("rows read") == 3


@pytest.mark.long
def test_sessions_are_bounded(place: Workplace) -> None:
    _wide(place)
    count = (
        "select count(*) from pg_stat_activity where application_name = 'dbt-exporter' and"
        " backend_type = 'client backend' and datname = current_database()"
    )
    most = 0
    with running_cluster(place) as cluster:
        process = start_load(
            place, "--scheduler", cluster.address, "--max-connections", "3", BATCH_SIZE="500"
        )
        while process.poll() is None:
            most = max(most, place.query(place.analytics, count)[0][0])
    assert process.returncode == 0, process.communicate()[1]
    process.communicate()
    # The third looks for who waits; a session that has just ended may be there for a moment.
    assert most in (2, 3)
    compare(place, "public.wide", RAW)


MODEL = """
import os
import re
from dataclasses import dataclass

WORD = re.compile("[0-9]+")


@dataclass
class Found:
    digits: str


def transform(row):
    if row["n"] % 7 == 0:
        return None
    if row["id"] == {bad}:
        raise ValueError("no such thing")
    return {{**row, "digits": Found(WORD.sub("#", row["doc"] or "")).digits, "pid": os.getpid()}}


def model(dbt, session):
    dbt.config(materialized="table"{meta})
    return dbt.source("analytics_raw", "item").map(transform).map(lambda row: {{**row, "more": 1}})
"""


@pytest.mark.long
def test_row_functions_run_on_workers(bare: Workplace) -> None:
    bare.query(
        bare.analytics,
        "create schema analytics_raw; create table analytics_raw.item as"
        " select n as id, n % 100 as n, 'text ' || n as doc, n / 8.0 as number,"
        " now() + n * interval '1 second' as at,"
        " case n % 4 when 0 then 'infinity'::date else current_date + n % 50 end as day,"
        " case n % 3 when 0 then 'null'::jsonb else jsonb_build_object('n', n) end as json,"
        " case when n % 2 = 0 then int4range(n, n + 3) end as span, array[n, null] as list"
        " from generate_series(1, 23000) n; alter table analytics_raw.item add primary key (id)",
    )
    models = bare.folder / "models"
    (models / "sources.yml").write_text(
        "sources: [{name: analytics_raw, schema: analytics_raw, tables: [{name: item}]}]\n"
    )
    (models / "here.py").write_text(MODEL.format(bad=0, meta=""))
    with running_cluster(bare) as cluster:
        meta = f', meta={{"scheduler": "{cluster.address}"}}'
        (models / "there.py").write_text(MODEL.format(bad=0, meta=meta))
        bare.dbt("run", "-s", "here", "there")
        columns = "id, n, doc, at, number, day, json, span, list, digits, more"
        one, other = (f"select {columns} from public.{name}" for name in ("here", "there"))
        differ = f"({one} except all {other}) union all ({other} except all {one})"
        assert bare.query(bare.analytics, differ) == []
        assert bare.query(bare.analytics, "select count(*) from there") == [(23000 - 3450,)]
        pids = "select count(distinct pid) from public."
        assert bare.query(bare.analytics, f"{pids}there") > bare.query(
            bare.analytics, f"{pids}here"
        )
        (models / "there.py").write_text(MODEL.format(bad=12345, meta=meta))
        done = bare.run("dbt", "run", "-s", "there")
        assert done.returncode == 1
        assert "ValueError: no such thing\n  row 12345, id = 12345" in done.stdout
        assert 'raise ValueError("no such thing")' in done.stdout
    done = bare.run("dbt", "run", "-s", "there")
    assert f"no Dask scheduler answers at {cluster.address}" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.long
def test_what_is_missing_is_told(place: Workplace) -> None:
    _wide(place, 10)
    done = place.run("exporter", "load", "--scheduler", "tcp://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
    done = place.run("exporter", "load", "--scheduler", "tcp://h:1", "--max-connections", "1")
    assert done.returncode == 2
    with running_cluster(place, environments=({"DATABASE_URL_CORE": ""},)) as cluster:
        done = place.run("exporter", "load", "--scheduler", cluster.address)
    assert done.returncode == 2, done.stderr
    assert "DATABASE_URL_CORE is not set" in done.stderr


def test_tables_that_are_read_by_their_changes(place: Workplace) -> None:
    """A worker copies each; their changes come here."""
    for table in ("one", "two"):
        place.query(
            place.core,
            f"create table {table} (id int primary key, a text);"
            f"insert into {table} select i, 'a' from generate_series(1, 50) i",
        )
    define(place, "one", "two", two="mode: history")
    with running_cluster(place, environments=({},)) as cluster:
        words = ("--scheduler", cluster.address)
        assert [one["rows_written"] for one in results(place, *words).values()] == [50, 50]
        place.query(place.core, "delete from one where id < 9; update two set a = 'b'")
        found = results(place, *words)
        assert (found["one"]["rows_deleted"], found["two"]["rows_read"]) == (8, 50)
    same(place, "one")
    replayed(place, "two")
