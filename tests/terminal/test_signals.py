"""Ctrl-C and SIGTERM, really sent: one line, the right exit status, nothing half done."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import ROOT, Workplace, compare, fill
from tests.helpers.processes import on_terminal, plain, started, until
from tests.helpers.tables import SLOW, slow_table

RAW = "analytics_raw.slow"
RUNS = (
    "select status, rows_written, finished_at is not null, error"
    " from analytics_raw._exporter_runs order by id desc limit 1"
)

READING = (
    "select 1 from pg_stat_activity where query like 'copy%pg_sleep%' and state = 'active'"
    " and datname = current_database()"
)


def _rows(place: Workplace) -> int:
    with psycopg.connect(place.analytics, autocommit=True) as connection:
        return _count(connection)


def _count(connection: psycopg.Connection[Any]) -> int:
    try:
        row = connection.execute(f"select count(*) from {RAW}".encode()).fetchone()
    except psycopg.errors.UndefinedTable:
        return 0
    return int(row[0]) if row else 0


def _same(place: Workplace) -> None:
    compare(place, "public.slow", RAW, "id, at")


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "interrupted by SIGTERM")],
)
@pytest.mark.parametrize(
    "path", ["first", "increment", pytest.param("refresh", marks=pytest.mark.long)]
)
def test_a_load_that_is_stopped(
    place: Workplace, path: str, number: signal.Signals, status: int, told: str
) -> None:
    slow_table(place, 8 if path == "increment" else 300)
    words = ["load", "Slow"]
    before = 0
    if path == "increment":
        place.load("Slow")
        place.query(place.core, "insert into slow select n, now() from generate_series(9, 300) n")
        before = 8
    elif path == "refresh":
        place.query(place.core, "delete from slow where id > 8")
        place.load("Slow")
        place.query(place.core, "insert into slow select n, now() from generate_series(9, 300) n")
        before = 8
        words.append("--full-refresh")
    with started(place, *words, BATCH_SIZE="10") as process:
        if path == "refresh":
            until(lambda: bool(place.query(place.core, READING)))
        else:
            with psycopg.connect(place.analytics, autocommit=True) as connection:
                until(lambda: _count(connection) > before)
        process.send_signal(number)
        begin = time.monotonic()
        out, err = process.communicate(timeout=30)
    assert time.monotonic() - begin < 5
    assert (process.returncode, out, err) == (status, "", f"exporter: Slow: {told}\n")
    landed = _rows(place)
    assert landed == before if path == "refresh" else before < landed < 300
    run = place.query(place.analytics, RUNS)[0]
    assert run == ("interrupted", landed - before, True, f"Slow: {told}")
    place.load("Slow")
    _same(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loads_side_by_side_that_are_stopped(place: Workplace, number: signal.Signals) -> None:
    slow_table(place, 200)
    others = ("second", "third", "fourth")
    place.define(
        SLOW, *(SLOW.replace("slow\n  config", f"{n}\n  config").replace("Slow", n) for n in others)
    )
    with started(place, "load", "-j", "3", BATCH_SIZE="10") as process:
        until(lambda: _rows(place) > 0)
        process.send_signal(number)
        begin = time.monotonic()
        out, err = process.communicate(timeout=30)
    assert time.monotonic() - begin < 5
    assert (process.returncode, out) == (130 if number == signal.SIGINT else 143, "")
    assert err.count("interrupted") == len(err.splitlines()) == 3, err
    runs = "select distinct status, finished_at is not null from analytics_raw._exporter_runs"
    assert place.query(place.analytics, runs) == [("interrupted", True)]
    assert 0 < _rows(place) < 300
    place.load("Slow")
    _same(place)


@pytest.mark.long
def test_ctrl_c_at_any_moment(product: Workplace) -> None:
    chance = random.Random(7)
    last = 0
    stopped = 0
    while stopped < 25:
        fill(product.core, last + 1, last + 2000)
        last += 2000
        words = ["load", *(["--full-refresh"] if chance.random() < 0.2 else [])]
        with started(product, *words, BATCH_SIZE="50") as process:
            time.sleep(chance.uniform(0.15, 1.2))
            process.send_signal(signal.SIGINT)
            err = process.communicate(timeout=30)[1]
        if process.returncode != 0:
            stopped += 1
            # Interrupted in the exec() of a dataclass, Python ends by SIGINT: 130 to a shell.
            assert process.returncode in (130, -signal.SIGINT), err
            # Before there is a load, or during it.
            assert err in ("", "exporter: interrupted\n", "exporter: StatEvent: interrupted\n")
    product.load()
    compare(product, 'public."StatEvent"', "analytics_raw.stat_event")
    assert product.query(
        product.analytics,
        "select sum(rows_written) = (select count(*) from analytics_raw.stat_event)"
        " from analytics_raw._exporter_runs",
    ) == [(True,)]


def test_ctrl_c_ends_the_whole_run(place: Workplace) -> None:
    """No definition after the one that was stopped, and what --json promises all the same."""
    slow_table(place, 200)
    place.define(SLOW, SLOW.replace("name: slow", "name: second").replace("key: Slow", "key: Two"))
    with started(place, "load", "--json", BATCH_SIZE="10") as process:
        until(lambda: _rows(place) > 0)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err.count("\n")) == (130, 1)
    ended = json.loads(out)
    assert (ended["key"], ended["status"], ended["error"]) == (
        "Slow",
        "interrupted",
        "Slow: interrupted",
    )
    runs = place.query(place.analytics, "select distinct key from analytics_raw._exporter_runs")
    assert runs == [("Slow",)]


def test_ctrl_c_while_the_source_waits_for_a_lock(place: Workplace) -> None:
    slow_table(place, 8)
    waiting = "select 1 from pg_stat_activity where wait_event_type = 'Lock'"
    with psycopg.connect(place.core) as other:
        other.execute("lock table slow in access exclusive mode")
        with started(place, "load", "Slow") as process:
            until(lambda: bool(place.query(place.core, waiting)))
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "exporter: Slow: interrupted\n")
    assert place.query(place.core, waiting) == []


def test_ctrl_c_on_a_terminal_with_a_bar(place: Workplace) -> None:
    slow_table(place, 200)

    def press(process: subprocess.Popen[bytes], terminal: int, text: str) -> None:
        if "rows, " in text and "^C" not in text:
            os.write(terminal, b"\x03")
            time.sleep(0.1)

    status, text = on_terminal(place, "exporter", "load", "Slow", act=press, BATCH_SIZE="10")
    assert status == 130
    after = [one for one in plain(text.partition("^C")[2]) if "exporter" in one or "Trace" in one]
    assert after == ["exporter: Slow: interrupted"]
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize(
    "at", ["rows.", "$ exporter load", pytest.param("$ dbt build", marks=pytest.mark.long)]
)
def test_ctrl_c_in_the_demo(product: Workplace, at: str) -> None:
    shutil.copy(ROOT / "profiles.yml.example", product.folder)
    temp = Path(tempfile.mkdtemp(dir="/tmp"))  # short: a socket's path goes below it
    temp.chmod(0o755)
    pressed = 0.0

    def press(process: subprocess.Popen[bytes], terminal: int, text: str) -> None:
        nonlocal pressed
        if at in text and not pressed:
            time.sleep(3 if "dbt" in at else 0.3)  # into the work of that part
            os.write(terminal, b"\x03")
            pressed = time.monotonic()

    status, text = on_terminal(
        product, "exporter", "demo", "--rows", "200000", act=press, TMPDIR=str(temp)
    )
    assert time.monotonic() - pressed < 10
    after = [line for line in plain(text.partition("^C")[2]) if line.strip()]
    assert (status, after) == (130, ["exporter: interrupted"])
    temp.rmdir()  # nothing is left in it


def test_sigterm_ends_the_demo(product: Workplace) -> None:
    shutil.copy(ROOT / "profiles.yml.example", product.folder)
    with started(product, "demo", "--rows", "200000") as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "")


def test_ctrl_c_during_a_migration(place: Workplace) -> None:
    folder = place.folder / "db" / "migrations"
    folder.mkdir(parents=True)
    sql = "-- migrate:up\ncreate table half (id int); select pg_sleep(60);\n-- migrate:down\n"
    (folder / "20260101000000_slow.sql").write_text(sql)

    def press(process: subprocess.Popen[bytes], terminal: int, text: str) -> None:
        if "Applying" in text and "^C" not in text:
            time.sleep(0.5)
            os.write(terminal, b"\x03")

    status, text = on_terminal(place, "exporter", "db", "migrate", act=press)
    after = [line for line in plain(text.partition("^C")[2]) if line.strip()]
    assert (status, after) == (130, ["exporter: interrupted"])
    assert place.query(place.analytics, "select to_regclass('half')") == [(None,)]


def test_a_pipe_that_closes_is_no_error(product: Workplace) -> None:
    table = SLOW.replace("name: slow", "name: t{n}").replace("key: Slow", "key: t{n}")
    names = [table.replace("{n}", str(n)) for n in range(300)]
    (product.folder / "models" / "staging" / "_sources.yml").unlink()
    product.define(*names)
    for words in ("state show", "load --help"):
        done = subprocess.run(
            f"{sys.executable} -m exporter {words} | head -1",
            shell=True,
            cwd=product.folder,
            env={**product.environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.stderr, done.stdout.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("typed", "status", "told"), [(b"\x03", 130, "exporter: interrupted"), (b"\x04", 1, "Aborted!")]
)
def test_ctrl_c_at_a_prompt(place: Workplace, typed: bytes, status: int, told: str) -> None:
    place.query(
        place.core, "create view thing as select 1 as id, 'a' as state, now() as updated_at"
    )
    pressed = ""

    def press(process: subprocess.Popen[bytes], terminal: int, text: str) -> None:
        nonlocal pressed
        if "apart?" in text and not pressed:
            pressed = text
            time.sleep(0.3)  # Python's input() misses a signal while it begins to read
            os.write(terminal, typed)

    ended, text = on_terminal(place, "exporter", "new", "thing", act=press)
    after = [line for line in plain(text.removeprefix(pressed).replace("^C", "")) if line.strip()]
    assert (ended, after) == (status, [told])
    assert sorted(place.folder.rglob("*.yml")) == [place.folder / "dbt_project.yml"]
