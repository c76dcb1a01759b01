"""A log without a key beside writers: no row twice, none lost, once all of them have ended."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time

import psycopg
import pytest

from exporter.demo.embedded import running_server
from tests.conftest import Workplace

LOG = """
- name: log
  config:
    meta:
      exporter:
        key: Log
        source: {table: log}
        mode: append
"""
WRITERS = 5


def _write(url: str, writer: int, until: float) -> None:
    chance = random.Random(writer)
    numbers = itertools.count(writer, WRITERS)
    row = "insert into log values (%s, repeat('x', 50))"
    with psycopg.connect(url) as session:
        while time.monotonic() < until:
            session.execute(row, (next(numbers),))
            for _ in range(chance.randrange(4)):
                with contextlib.suppress(psycopg.Rollback), session.transaction():
                    session.execute(row, (next(numbers),))
                    with session.transaction():
                        session.execute(row, (next(numbers),))
                    if chance.random() < 0.3:
                        raise psycopg.Rollback
            time.sleep(chance.choice([0, 0.01, 0.05, 1.0]))
            ending = chance.random()
            if ending < 0.2:
                session.rollback()
            elif ending < 0.4:
                name = f"w{writer}-{next(numbers)}"
                session.execute(f"prepare transaction '{name}'".encode())
                time.sleep(chance.choice([0, 0.05, 0.5]))
                session.autocommit = True
                end = "rollback" if chance.random() < 0.3 else "commit"
                session.execute(f"{end} prepared '{name}'".encode())
                session.autocommit = False
            else:
                session.commit()


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.long)])
def test_each_row_lands_once(place: Workplace, seconds: int) -> None:
    with running_server({"max_prepared_transactions": "20", "fsync": "off"}) as server:
        place.core = server.url("postgres")
        place.query(place.core, "create table log (n int, v text)")
        place.define(LOG)
        until = time.monotonic() + seconds
        writers = [
            threading.Thread(target=_write, args=(place.core, n, until)) for n in range(WRITERS)
        ]
        for one in writers:
            one.start()
        loads = rows = 0
        while time.monotonic() < until or loads < 4:
            rows += place.load("Log")["rows_written"]
            loads += 1
        for one in writers:
            one.join()
        place.load("Log")
        found = [
            place.query(url, f"select n, count(*) from {table} group by n order by n")
            for url, table in ((place.core, "log"), (place.analytics, "analytics_raw.log"))
        ]
        assert found[0] == found[1]
        assert rows
