"""`exporter status`, and dbt's own look at the record of runs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from typing import Any

import psycopg
import pytest

from exporter.config.project import definitions
from exporter.state import position as state
from tests.conftest import ROOT, Workplace, fill
from tests.helpers.tables import ITEM

HOURLY = ITEM.replace(
    "  config:\n", "  config:\n    freshness: {error_after: {count: 1, period: hour}}\n", 1
)
RUNS = "analytics_raw._exporter_runs"


@pytest.fixture
def items(place: Workplace) -> Workplace:
    """A hundred items, one a minute up to now, landed; with an index on the cursor."""
    place.define(HOURLY)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null, v int);"
        "create index on item (at, id);"
        "insert into item select n, now() - (100 - n) * interval '1 minute', 0"
        " from generate_series(1, 100) n; analyze item",
    )
    place.load("Item")
    return place


def _status(place: Workplace, *words: str, **environment: str) -> dict[str, Any]:
    done = place.run("exporter", "status", "--json", *words, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(json.loads(done.stdout.splitlines()[0]))


def test_a_definition_a_line(items: Workplace) -> None:
    told = _status(items)
    assert (told["key"], told["table"], told["status"]) == ("Item", "analytics_raw.item", "ok")
    assert (told["rows_read"], told["rows_written"]) == (100, 100)
    assert told["behind"] == {"rows": 0, "estimated": False, "seconds": 0.0, "bytes": None}
    assert (told["freshness"], told["cursor"]["id"], told["error"]) == ("pass", "100", None)
    done = items.run("exporter", "status", NO_COLOR="1")
    head, line = done.stdout.splitlines()
    assert line.split()[:2] == ["Item", "ok"]
    assert max(len(head), len(line)) <= 80
    assert "\x1b" not in done.stdout


def test_how_far_behind_the_source(items: Workplace) -> None:
    items.query(items.core, "insert into item select 100 + n, now() + interval '10 minutes', 0"
                " from generate_series(1, 7) n")  # fmt: skip
    behind = _status(items)["behind"]
    assert (behind["rows"], behind["estimated"]) == (7, False)
    assert 590 < behind["seconds"] < 700
    items.query(
        items.core, "insert into item select 1000 + n, now(), 0 from generate_series(1, 11000) n"
    )
    assert _status(items)["behind"]["estimated"]
    assert "~" in items.run("exporter", "status").stdout


def test_a_large_source_is_never_read_whole(items: Workplace) -> None:
    items.query(
        items.core,
        "insert into item select n, '2020-01-01', 0 from generate_series(101, 60000) n;"
        " analyze item; select pg_stat_reset()",
    )
    assert _status(items)["behind"]["rows"] == 0
    items.query(items.core, "drop index item_at_id_idx")
    assert _status(items)["behind"]["estimated"]
    time.sleep(1)  # before PostgreSQL 15 the counters arrive a little later
    read = "select seq_scan, seq_tup_read from pg_stat_user_tables where relname = 'item'"
    assert items.query(items.core, read) == [(0, 0)]


def test_a_killed_run_has_died(items: Workplace) -> None:
    items.query(items.core, "insert into item select n, now(), 0 from generate_series(101, 9000) n")
    process = subprocess.Popen(
        [sys.executable, "-m", "exporter", "load", "Item"],
        cwd=items.folder,
        env={**items.environment, "BATCH_SIZE": "50", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    with psycopg.connect(items.analytics, autocommit=True) as watcher:
        for _ in range(3000):
            time.sleep(0.005)
            row = watcher.execute(
                f"select batches from {RUNS} where status = 'running'".encode()
            ).fetchone()
            if row and row[0] > 5:
                break
        process.send_signal(signal.SIGSTOP)
        alive = _status(items)
        runs = items.run("exporter", "status", "Item").stdout
        process.kill()
        process.wait()
        locks = b"select from pg_locks where locktype = 'advisory' and granted"
        while watcher.execute(locks).fetchone():
            time.sleep(0.05)
    assert alive["status"] == "running"
    assert "session" in alive["holder"]
    assert "running" in runs
    assert _status(items)["status"] == "died"
    said = items.run("exporter", "status").stdout
    assert "no session holds its lock" in said
    assert max(len(line) for line in said.splitlines()) <= 80
    assert "died" in items.run("exporter", "status", "Item").stdout
    items.load("Item")
    assert _status(items)["status"] == "ok"
    kinds = [
        json.loads(line)["status"]
        for line in items.run("exporter", "status", "Item", "--json").stdout.splitlines()
    ]
    assert kinds == ["ok", "died", "ok"]


def test_a_failed_run_and_its_reason(items: Workplace) -> None:
    items.query(items.analytics, "alter table analytics_raw.item add check (v < 5)")
    items.query(items.core, "update item set v = 9, at = now() where id = 4")
    assert items.run("exporter", "load").returncode == 1
    told = _status(items)
    assert (told["status"], told["behind"]["rows"]) == ("failed", 1)
    for words in (("status",), ("status", "Item")):
        done = items.run("exporter", *words)
        assert "id=4" in done.stdout
        assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_a_run_that_found_the_lock_taken_hides_nothing(items: Workplace) -> None:
    with psycopg.connect(items.analytics, autocommit=True) as holder:
        state.lock(holder, definitions(items.folder)[0].destination)
        assert items.run("exporter", "load").returncode == 3
        assert _status(items)["status"] == "running"
    assert _status(items)["status"] == "ok"
    assert "locked" in items.run("exporter", "status", "Item").stdout


def test_freshness_is_that_of_dbt(place: Workplace) -> None:
    (place.folder / "profiles.yml").write_bytes((ROOT / "profiles.yml.example").read_bytes())
    levels = {
        "inherits": "{}",
        "strict": "{error_after: {count: 1, period: hour}}",
        "patient": "{warn_after: {count: 2, period: hour}, error_after: {}}",
        "none": "null",
    }
    text = (
        "sources:\n  - name: analytics_raw\n    config:\n      loaded_at_field: _exported_at\n"
        "      freshness: {warn_after: {count: 1, period: hour}}\n    tables:\n"
    )
    for name, level in levels.items():
        table = ITEM.replace("name: item", f"name: {name}").replace("key: Item", f"key: {name}")
        table = table.replace("  config:\n", f"  config:\n    freshness: {level}\n", 1)
        text += "".join(f"      {line}\n" for line in table.strip().splitlines())
    (place.folder / "models" / "sources.yml").write_text(text)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null);"
        "insert into item values (1, now())",
    )
    for _ in range(2):
        assert place.run("exporter", "load").returncode == 0
    late = "now() - interval '90 minutes'"
    place.query(place.analytics, f"update {RUNS} set started_at = {late}")
    for name in levels:
        place.query(place.analytics, f"update analytics_raw.{name} set _exported_at = {late}")
    told = place.run("exporter", "status", "--json").stdout.splitlines()
    ours = {one["key"]: one["freshness"] for one in map(json.loads, told)}
    assert ours == {"inherits": "warn", "strict": "error", "patient": "pass", "none": None}
    place.run("dbt", "source", "freshness")
    results = json.loads((place.folder / "target" / "sources.json").read_text())["results"]
    theirs = {one["unique_id"].rpartition(".")[2]: one["status"] for one in results}
    assert theirs == {name: status for name, status in ours.items() if status}


def test_before_the_first_load_and_without_the_source(place: Workplace) -> None:
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int, at timestamp, v int);"
        "insert into item select n, now() from generate_series(1, 30) n",
    )
    told = _status(place)
    assert (told["status"], told["behind"]["rows"]) == ("never", 30)
    assert place.run("exporter", "status", "Item").stdout == "Item has never run\n"
    assert place.query(place.analytics, "select to_regnamespace('analytics_raw')") == [(None,)]
    done = place.run(
        "exporter", "status", DATABASE_URL_CORE="postgresql://nobody@/x?host=/no/where"
    )
    assert done.returncode == 0
    assert "never" in done.stdout
    assert "how far behind the source is not known" in done.stderr
    place.query(place.core, "drop table item")
    done = place.run("exporter", "status")
    assert (done.returncode, "no table" in done.stderr) == (0, True)


def test_a_first_load_on_its_way(items: Workplace) -> None:
    items.query(
        items.analytics,
        "update analytics_raw._exporter_state set cursor_value = null, next_block = 1",
    )
    behind = _status(items)["behind"]
    assert (behind["rows"], behind["estimated"], behind["seconds"]) == (0, True, None)


def test_dbt_build_shows_loads_that_fail_or_stop(product: Workplace) -> None:
    fill(product.core, 1, 50)
    product.load("StatEvent")
    product.query(
        product.analytics,
        f"insert into {RUNS} (key, command, status) values ('Gone', 'load', 'failed')",
    )
    product.dbt("build", "-s", "exporter_runs")
    rows = product.query(
        product.analytics, "select key, is_last, seconds > 0 from analytics.exporter_runs"
    )
    assert ("StatEvent", True, True) in rows

    later = ITEM.replace("name: item", "name: late").replace("key: Item", "key: Late")
    product.define(later)  # the source in a second file
    product.query(
        product.analytics,
        f"insert into {RUNS} (key, command, status) values ('StatEvent', 'load', 'failed');"
        f"insert into {RUNS} (key, command, status, started_at)"
        " values ('Late', 'load', 'ok', now() - interval '27 hours')",
    )
    done = product.run("dbt", "test", "-s", "exporter_runs", "--no-use-colors")
    assert done.returncode == 1
    assert re.search(r"FAIL 2 .*loads_end_well", done.stdout), done.stdout


@pytest.mark.parametrize(
    ("freshness", "said"),
    [
        ("{warn_after: {count: 1}}", "freshness.warn_after"),
        ("{error_after: {count: x, period: day}}", "freshness.error_after"),
        ("{error_after: 1 day}", "freshness.error_after"),
        ("daily", "freshness.warn_after"),
    ],
)
def test_a_wrong_freshness_is_named(place: Workplace, freshness: str, said: str) -> None:
    place.define(ITEM.replace("  config:\n", f"  config:\n    freshness: {freshness}\n", 1))
    done = place.run("exporter", "status")
    assert done.returncode == 2
    assert said in done.stderr
    assert "sources.yml:5" in done.stderr
