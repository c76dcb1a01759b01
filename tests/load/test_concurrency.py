"""Writers, loaders and crashes beside a load: raw equals the source at the end, every time."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from exporter.demo.demo import create_databases
from exporter.demo.embedded import Server, running_server
from tests.conftest import Workplace, compare, fill
from tests.helpers.processes import start_load, wait_unlocked
from tests.helpers.tables import EVENT, ITEM, RAW, forget_everything

UTC = "at time zone 'UTC'"
STAMPS = (
    f"now() {UTC}",
    f"clock_timestamp() {UTC}",
    f"now() {UTC} - random() * interval '299 seconds'",  # a clock up to the lookback behind
)


def _write(place: Workplace, writer: int, until: float, longest: float) -> int:
    """Keep a transaction open for up to ``longest`` seconds, again and again; count them."""
    chance = random.Random(writer)
    number = 0
    with psycopg.connect(place.core) as connection:
        while time.monotonic() < until:
            number += 1
            stamp = chance.choice(STAMPS)
            connection.execute(
                'insert into "StatEvent" (id, type, source, source_id, updated_at) select'
                f" 'w{writer}_{number}_' || n, 'click', 'api', 's', {stamp}"
                " from generate_series(1, 3) n".encode()
            )
            connection.execute(
                f"update \"StatEvent\" set tag = 'w{writer}_{number}', updated_at = {stamp}"
                f' where id in (select id from "StatEvent" where hashtext(id) % 8 = {writer}'
                " order by random() limit 5)".encode()
            )
            time.sleep(chance.uniform(0, longest))
            if chance.random() < 0.1:
                connection.rollback()
            else:
                connection.commit()
    return number


@pytest.mark.parametrize(
    ("seconds", "longest"), [(4, 0.5), pytest.param(60, 3.0, marks=pytest.mark.long)]
)
def test_writers_with_long_transactions(product: Workplace, seconds: int, longest: float) -> None:
    fill(product.core, 1, 2000)
    product.load("StatEvent")
    product.dbt("build", "--quiet")
    until = time.monotonic() + seconds
    done: list[int] = []
    writers = [
        threading.Thread(target=lambda n=n: done.append(_write(product, n, until, longest)))
        for n in range(8)
    ]
    for writer in writers:
        writer.start()
    loads = 0
    with ThreadPoolExecutor(1) as other:
        built = other.submit(product.dbt, "run", "--quiet")
        while time.monotonic() < until:
            product.load("StatEvent")
            loads += 1
    for writer in writers:
        writer.join()
    assert len(done) == 8
    built.result()
    assert loads > 3
    product.load("StatEvent")
    compare(product, EVENT, RAW)
    product.dbt("build", "--quiet")  # with the test that the model equals its staging model
    assert product.load("StatEvent")["rows_written"] == 0


def _seconds_of_a_load(product: Workplace, batch: int, jobs: str) -> float:
    began = time.monotonic()
    process = start_load(product, "StatEvent", "-j", jobs, BATCH_SIZE=str(batch))
    process.communicate()
    return time.monotonic() - began


@pytest.mark.parametrize("jobs", ["1", pytest.param("4", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("kills", "rows"), [(12, 20_000), pytest.param(100, 200_000, marks=pytest.mark.long)]
)
def test_killed_at_random_moments(product: Workplace, kills: int, rows: int, jobs: str) -> None:
    fill(product.core, 1, rows)
    chance = random.Random(1)
    ended = threading.Event()

    def update() -> None:
        with psycopg.connect(product.core, autocommit=True) as connection:
            while not ended.is_set():
                connection.execute(
                    f"update \"StatEvent\" set tag = 'new', updated_at = now() {UTC}"
                    " where hashtext(id || %s) %% 200 = 0",
                    (str(chance.random()),),
                )
                time.sleep(0.02)

    writer = threading.Thread(target=update)
    writer.start()
    killed = {True: 0, False: 0}  # in a first load, in an increment
    lasts = {first: _seconds_of_a_load(product, rows // 40, jobs) for first in (True, False)}
    try:
        for number in range(kills):
            if number % 6 == 0:
                forget_everything(product)
            process = start_load(product, "StatEvent", "-j", jobs, BATCH_SIZE=str(rows // 40))
            time.sleep(lasts[number % 6 < 3] * chance.uniform(0.3, 1))
            alive = process.poll() is None
            process.kill()
            process.communicate()
            killed[number % 6 < 3] += alive
            wait_unlocked(product)
    finally:
        ended.set()
        writer.join()
    assert min(killed.values()) >= kills / 6, "the moments were not in the loads"
    product.load("StatEvent")
    compare(product, EVENT, RAW)


@pytest.fixture(scope="module")
def two_servers() -> Iterator[tuple[Server, Server]]:
    """A source and a destination that a test may crash."""
    with running_server() as core, running_server() as analytics:
        yield core, analytics


@pytest.mark.parametrize("side", ["core", pytest.param("analytics", marks=pytest.mark.long)])
def test_server_crashes_in_the_middle(
    product: Workplace, two_servers: tuple[Server, Server], side: str
) -> None:
    core, analytics = two_servers
    place = Workplace(product.folder, core.url("core"), analytics.url("analytics"))
    if side == "core":
        create_databases(core)
        create_databases(analytics)
    server = core if side == "core" else analytics
    chance = random.Random(2)
    forget_everything(place)
    crashed = 0
    for number in range(3):
        first = number * 10_000 + (80_000 if side == "analytics" else 0)
        fill(place.core, first + 1, first + 10_000)
        place.query(  # fill's own stamps are spread over more than the lookback
            place.core,
            f'update "StatEvent" set updated_at = clock_timestamp() {UTC}'
            f" where id > 'evt_{first:012}'",
        )
        process = start_load(place, "StatEvent", "-j", "4", BATCH_SIZE="300")
        time.sleep(chance.uniform(0.2, 0.5))
        crashed += process.poll() is None
        server.stop("immediate")
        server.start()
        told, said = process.communicate()
        assert process.returncode in (0, 1)
        assert "Traceback" not in said
        if process.returncode == 0 and number:  # what a crash has undone does not count
            assert json.loads(told)["rows_written"] == 10_000
        wait_unlocked(place)
        place.load("StatEvent")
        compare(place, EVENT, RAW)
    assert crashed


@pytest.mark.long
def test_loaders_of_one_definition_at_once(product: Workplace) -> None:
    fill(product.core, 1, 20_000)
    for _ in range(3):
        processes = [start_load(product, "StatEvent", BATCH_SIZE="500") for _ in range(4)]
        said = [process.communicate()[1] for process in processes]
        ends = [process.returncode for process in processes]
        assert 0 in ends, said
        assert set(ends) <= {0, 3}, said
        compare(product, EVENT, RAW)
        forget_everything(product)


@pytest.mark.long
def test_loaders_of_all_definitions_at_once(place: Workplace) -> None:
    names = ("item", "other", "third")
    place.define(
        *(
            ITEM.replace("name: item", f"name: {n}").replace("key: Item", f"key: {n.title()}")
            for n in names
        )
    )
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null);"
        "insert into item select n, now() from generate_series(1, 5000) n",
    )
    for _ in range(3):
        processes = [start_load(place) for _ in range(3)]
        for name in names:
            processes.append(start_load(place, name.title()))
        told = [process.communicate() for process in processes]
        statuses = [json.loads(line)["status"] for out, _ in told for line in out.splitlines()]
        assert set(statuses) <= {"ok", "locked"}, told
        assert len(statuses) == 12
        for name in names:
            compare(place, "public.item", f"analytics_raw.{name}")
        forget_everything(place)
