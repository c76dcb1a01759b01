"""A network that breaks at any byte, on either side: nothing is lost, and nothing hangs."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import ROOT, Workplace, compare
from tests.helpers.processes import until, wait_unlocked
from tests.helpers.proxy import Proxy, anywhere
from tests.helpers.tables import ITEM, forget_everything

_COLUMNS = "id bigint primary key, at timestamptz not null default clock_timestamp(), pad text"
_SETS = {  # the ways of reading, each with a table of its own
    "by_cursor": "cursor: {field: at, id_field: id}\n          read: cursor",
    "by_scan": "read: scan",
    "log": "cursor: {field: at, id_field: id}",
    "log_scan": "read: scan",
}


def _definitions(place: Workplace) -> None:
    texts = []
    for name, way in _SETS.items():
        text = ITEM.replace("- name: item", f"- name: {name}").replace("key: Item", f"key: {name}")
        text = text.replace("table: item", f"table: {name}")
        text = text.replace("cursor: {field: at, id_field: id}", way)
        if name.startswith("log"):
            text = text.replace("conflict_columns: [id]", "mode: append")
        texts.append(text)
        place.query(
            place.core,
            f"create table {name} ({_COLUMNS}); create index on {name} (at, id);"
            f"insert into {name} (id, pad) select n, repeat(n::text, 20)"
            " from generate_series(1, 20000) n",
        )
    place.define(*texts)


@contextlib.contextmanager
def _writing(place: Workplace, chance: random.Random) -> Iterator[list[int]]:
    """Change the tables all the while, two transactions open at once; yield the count."""
    over = threading.Event()
    written = [0]

    def write(first: int) -> None:
        number = first
        with psycopg.connect(place.core) as connection:
            while not over.is_set():
                for name in _SETS:
                    number += 2
                    connection.execute(
                        f"insert into {name} (id, pad) values ({number}, 'new')".encode()
                    )
                    if not name.startswith("log"):
                        row = chance.randrange(1, 20000)
                        connection.execute(
                            f"update {name} set at = clock_timestamp(), pad = pad || 'x'"
                            f" where id = {row - row % 2 + first % 2}".encode()
                        )
                over.wait(chance.random() / 4)
                connection.commit()
                written[0] += 1

    threads = [threading.Thread(target=write, args=(first,)) for first in (1_000_000, 2_000_001)]
    for thread in threads:
        thread.start()
    try:
        yield written
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _same(place: Workplace) -> None:
    for name in _SETS:
        compare(place, f"public.{name}", f"analytics_raw.{name}", "id, at, pad")


@pytest.mark.parametrize("resets", [3, pytest.param(200, marks=pytest.mark.long)])
def test_connections_that_are_reset_at_any_byte(place: Workplace, resets: int) -> None:
    chance = random.Random(resets)
    _definitions(place)
    proxies = [
        Proxy(url, lambda: anywhere(chance, 3_000_000), reset=True)
        for url in (place.core, place.analytics)
    ]
    env = {
        **place.environment,
        "PYTHONPATH": str(ROOT),
        "DATABASE_URL_CORE": proxies[0].url,
        "DATABASE_URL_ANALYTICS": proxies[1].url,
    }
    ends: dict[int, int] = {}
    began = time.monotonic()
    with _writing(place, chance) as written:
        loads = 0
        while sum(one.resets for one in proxies) < resets:
            if loads % 8 == 7:  # first loads, too
                wait_unlocked(place)
                forget_everything(place)
            words = ["load", "-j", str(1 + loads % 3), *(["--full-refresh"] * (loads % 5 == 4))]
            done = subprocess.run(
                [sys.executable, "-m", "exporter", *words],
                cwd=place.folder,
                env={**env, "BATCH_SIZE": str(chance.choice([100, 5000]))},
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            )
            loads += 1
            ends[done.returncode] = ends.get(done.returncode, 0) + 1
            assert done.returncode in (0, 1, 3), done.stderr
            assert "Traceback" not in done.stderr, done.stderr
    for one in proxies:
        one.close()
    wait_unlocked(place)
    sides = " and ".join(str(one.resets) for one in proxies)
    print(
        f"{sides} resets of source and destination in {loads} loads, which ended with {ends};"
        f" {written[0]} transactions; {time.monotonic() - began:.0f} s"
    )
    clean = place.run("exporter", "load")
    assert clean.returncode == 0, clean.stderr
    _same(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
@pytest.mark.parametrize("peers", [pytest.param(20, marks=pytest.mark.long)])
def test_peers_that_fall_silent_at_any_byte(
    place: Workplace, peers: int, number: signal.Signals
) -> None:
    chance = random.Random(peers + number)
    _definitions(place)
    took = []
    for attempt in range(peers):
        forget_everything(place)
        side = ("core", "analytics")[attempt % 2]
        words = ["load", "-j", str(1 + attempt % 3)]
        # The first two fall silent before a session is there, and while one is opened.
        at = (58, 2351, anywhere(chance, 1_500_000))[min(attempt, 2)]
        proxy = Proxy(getattr(place, side), lambda at=at: at, reset=False)  # type: ignore[misc]
        with subprocess.Popen(
            [sys.executable, "-m", "exporter", *words],
            cwd=place.folder,
            env={
                **place.environment,
                "PYTHONPATH": str(ROOT),
                f"DATABASE_URL_{side.upper()}": proxy.url,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                until(lambda p=process, x=proxy: x.silent.is_set() or p.poll() is not None)  # type: ignore[misc]
                assert process.poll() is None, (side, at, process.communicate())
                time.sleep(chance.random())
                process.send_signal(number)
                began = time.monotonic()
                _, said = process.communicate(timeout=8)
            finally:
                process.kill()
            took.append(time.monotonic() - began)
        proxy.close()
        assert process.returncode == 128 + number, (side, at, said)
        assert took[-1] < 5.2, (side, at, said)
        assert "Traceback" not in said
        wait_unlocked(place)
    print(f"{peers} silent peers, {number.name}: gone within {max(took):.1f} s at most")
    assert place.run("exporter", "load").returncode == 0
    _same(place)
