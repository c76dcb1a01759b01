"""What is told while it runs: on a terminal, in a pipe, in JSON; quietly, and in detail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from datetime import datetime

import pytest

from exporter.state.runs import Result
from exporter.terminal import console as module
from exporter.terminal.console import Console
from tests.conftest import ROOT, Workplace, fill
from tests.helpers.processes import on_terminal, plain
from tests.helpers.tables import SLOW, slow_table

RAW = "analytics_raw.stat_event"


def test_a_bar_on_a_terminal(place: Workplace) -> None:
    slow_table(place, 200)
    status, text = on_terminal(place, "exporter", "load", "Slow", BATCH_SIZE="10", NO_COLOR="1")
    lines = plain(text)
    assert status == 0
    drawn = [line for line in lines if "MB/s" in line]
    assert any(re.match(r"Slow .*━.* \d+ rows, 0\.0 MB/s, 0:00:0\d left$", one) for one in drawn)
    assert max(map(len, drawn)) <= 80
    assert not re.search(r"\x1b\[[0-9;]*[34]\dm", text), "a colour in spite of NO_COLOR"
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor stays hidden"
    assert [one for one in lines if one][-1].startswith("Slow: 200 rows read")


def test_a_bar_a_key(place: Workplace) -> None:
    slow_table(place, 200)
    place.define(SLOW, SLOW.replace("name: slow", "name: two").replace("key: Slow", "key: Second"))
    status, text = on_terminal(place, "exporter", "load", "-j", "2", BATCH_SIZE="10")
    assert status == 0
    bars = [line.split()[0] for line in plain(text) if "MB/s" in line]
    assert ["Slow", "Second"] in [bars[n : n + 2] for n in range(len(bars))]
    ended = [line for line in plain(text) if "rows read" in line]
    assert sorted(line.partition(":")[0] for line in ended) == ["Second", "Slow"]


@pytest.mark.parametrize(
    ("words", "environment"), [((), {"TERM": "dumb"}), (("-q",), {}), (("--log-format=json",), {})]
)
def test_no_bar(place: Workplace, words: tuple[str, ...], environment: dict[str, str]) -> None:
    slow_table(place, 100)
    status, text = on_terminal(place, "exporter", "load", "Slow", *words, **environment)
    assert status == 0
    assert "\x1b" not in text
    assert ("Slow: 100 rows" in text) == ("-q" not in words)


def test_lines_in_a_pipe_every_few_seconds(place: Workplace) -> None:
    slow_table(place, 600)
    done = place.run("exporter", "load", "Slow", BATCH_SIZE="10")
    assert done.stdout.startswith("Slow: 600 rows read")
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 2
    pattern = r"exporter: Slow: \d+ rows, 0\.0 MB/s, 0:00:0\d left"
    assert all(re.fullmatch(pattern, line) for line in lines), lines


@pytest.mark.long
def test_lines_on_a_terminal_that_can_do_no_more(place: Workplace) -> None:
    slow_table(place, 600)
    status, text = on_terminal(place, "exporter", "load", BATCH_SIZE="10", TERM="dumb")
    assert status == 0
    assert re.search(r"^exporter: Slow: \d+ rows, 0\.0 MB/s, 0:00:0\d left\r$", text, re.M)


def test_several_loads_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_EVERY", 0.05)
    console = Console(as_json=True)

    def work(key: str) -> None:
        for number in range(1, 301):
            console.progress(key, number * 10, number * 1000, 3000)
            time.sleep(0.001)
        console.ended(Result(key))

    threads = [threading.Thread(target=work, args=(f"key {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    for n in range(4):
        own = [one for one in events if one["key"] == f"key {n}"]
        assert own[-1]["event"] == "ended"
        rows = [one["rows"] for one in own[:-1]]
        assert 2 <= len(rows) <= 30
        assert rows == sorted(rows)
        assert all(one["seconds_left"] is not None for one in own[:-1])


def test_json_in_the_log(product: Workplace) -> None:
    fill(product.core, 1, 50)
    done = product.run("exporter", "load", "StatEvent", "-v", "--log-format", "json")
    assert (done.returncode, done.stdout) == (0, "")
    events = [json.loads(line) for line in done.stderr.splitlines()]
    for one in events:
        assert list(one)[:5] == ["time", "level", "event", "key", "message"]
        assert datetime.fromisoformat(one["time"]).tzinfo
        assert one["key"] == "StatEvent"
    assert {one["event"] for one in events} == {"window", "path", "sql", "ended"}
    assert (events[-1]["status"], events[-1]["rows_read"], events[-1]["error"]) == ("ok", 50, None)
    product.query(product.analytics, "drop table analytics_raw.stat_event cascade")
    product.query(product.core, 'drop table "StatEvent"')
    done = product.run("exporter", "load", "--json", "--log-format", "json")
    assert done.returncode == 1
    ended = json.loads(done.stderr)
    assert (ended["level"], ended["event"], ended["status"]) == ("error", "ended", "failed")
    assert json.loads(done.stdout)["error"] == ended["error"]
    done = product.run("exporter", "load", "Stat", "--log-format", "json")
    error = json.loads(done.stderr)
    assert done.returncode == 2
    assert (error["event"], error["kind"], error["key"]) == ("error", "UsageError", None)
    assert error["hint"] == "did you mean StatEvent?"


def test_quiet_and_verbose(product: Workplace) -> None:
    fill(product.core, 1, 50)
    quiet = product.run("exporter", "load", "-q")
    assert (quiet.returncode, quiet.stdout + quiet.stderr) == (0, "")
    verbose = product.run("exporter", "load", "-v").stderr
    assert re.search(r"^exporter: StatEvent: reads from 20.*open since 20", verbose, re.M)
    assert re.search(
        r"^exporter: StatEvent: increment: text, through staging, reads \d+ kB$", verbose, re.M
    )
    assert re.search(r'^exporter: StatEvent: source: select "id".*order by "', verbose, re.M)
    product.query(product.core, 'drop table "StatEvent"')
    quiet = product.run("exporter", "load", "-q")
    assert (quiet.returncode, quiet.stdout) == (1, "")
    assert "no table" in quiet.stderr
    assert product.run("exporter", "load", "-q", "-v").returncode == 2


def test_a_reader_that_goes_away(product: Workplace) -> None:
    """`exporter load | head -0` still loads everything."""
    fill(product.core, 1, 50)
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "exporter", "load"],
            cwd=product.folder,
            env={**product.environment, "PYTHONPATH": str(ROOT)},
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert product.query(product.analytics, "select count(*) from analytics_raw.stat_event") == [
        (50,)
    ]
