"""A function that is stopped in the middle: by a signal, in order; by kill -9, without a loss."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.conftest import Workplace
from tests.helpers.processes import start_load, started, until, wait_unlocked
from tests.load.test_rows import EVENT, IN_ORDER, calls, failed, position, rows, shop, write

__all__ = ["shop"]  # a fixture
KILLS = int(os.environ.get("ROWS_KILLS", "30"))
SLOW = """
import time

def events(since):
    called(since)
    try:
        for n in range(1000):
            time.sleep({nap})
            if since is None or event(n)["at"] >= since:
                yield event(n)
    finally:
        called("end")
"""


@pytest.mark.parametrize("jobs", [(), ("-j", "2")])
@pytest.mark.parametrize(
    ("number", "status", "told"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "interrupted by SIGTERM")],
)
def test_a_signal_ends_it_in_order(
    shop: Workplace, jobs: tuple[str, ...], number: signal.Signals, status: int, told: str
) -> None:
    write(shop, SLOW.format(nap=0.1))
    with started(shop, "load", *jobs) as process:
        until(lambda: bool(calls(shop)))
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert time.monotonic() - began < 2.5
    assert process.returncode == status
    assert (f"Event: {told}" in said, "Traceback" in said) == (True, False), said
    assert calls(shop) == ["None", "'end'"]
    assert position(shop)["cursor"] is None
    runs = "select status, finished_at is not null from analytics_raw._exporter_runs"
    assert shop.query(shop.analytics, runs) == [("interrupted", True)]


def test_one_that_does_not_listen_does_not_keep_the_process(shop: Workplace) -> None:
    write(shop, SLOW.format(nap=60))
    with started(shop, "load", "-j", "2") as process:
        until(lambda: bool(calls(shop)))
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert (process.returncode, time.monotonic() - began < 8) == (143, True)


def _killed(shop: Workplace, declared: str, kills: int) -> None:
    """Kill loads at random moments; then raw has all rows, each once."""
    shop.define(declared.replace("batch_rows: 10", "batch_rows: 50"))
    write(shop, SLOW.format(nap="0.002 if n % 10 == 0 else 0"))
    chance = random.Random(kills)
    for _ in range(kills):
        process = start_load(shop)
        time.sleep(chance.uniform(0.2, 1.2))
        process.kill()
        process.communicate()
        wait_unlocked(shop)
    shop.load()
    assert rows(shop) == [(n, f"n{n}") for n in range(1000)]
    assert position(shop)["cursor"]["value"] == "2026-01-01 16:39:00+00"


@pytest.mark.parametrize("declared", [EVENT, IN_ORDER])
def test_killed_again_and_again_nothing_is_lost(shop: Workplace, declared: str) -> None:
    _killed(shop, declared, 4)


@pytest.mark.long
@pytest.mark.parametrize("declared", [EVENT, IN_ORDER])
def test_killed_many_times_nothing_is_lost(shop: Workplace, declared: str) -> None:
    _killed(shop, declared, KILLS)


def test_a_destination_that_goes_away_is_connected_to_again(shop: Workplace) -> None:
    """The function is called anew, from the position as it is then."""
    write(
        shop,
        """
import psycopg

def events(since):
    called(since)
    yield from (event(n) for n in range(20))
    if len(open(pathlib.Path(__file__).with_name("calls")).readlines()) == 1:
        with psycopg.connect(os.environ["DATABASE_URL_ANALYTICS"]) as other:
            other.execute("select pg_terminate_backend(pid) from pg_stat_activity where"
                          " datname = current_database() and pid <> pg_backend_pid()")
""",
    )
    shop.load()
    assert calls(shop) == ["None", "None"]
    assert len(rows(shop)) == 20


def test_an_error_of_a_driver_is_the_functions_own(shop: Workplace) -> None:
    """It is not taken for the destination's, which would be tried again."""
    write(
        shop,
        """
import psycopg

def events(since):
    called(since)
    yield event(1)
    raise psycopg.OperationalError("the connection is lost")
""",
    )
    said = failed(shop)
    assert "failed after 1 row: readers/shop.py:20: OperationalError: the connection is" in said
    assert calls(shop) == ["None"]
