"""Writers, a loader that is killed again and again, servers that crash: raw is the source."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from exporter.demo.embedded import Server, running_server
from tests.conftest import Workplace, empty_project
from tests.helpers.changes import define, results, same
from tests.helpers.processes import start_load, wait_unlocked

ROUNDS = int(os.environ.get("CHANGES_ROUNDS", "25"))
SETTINGS = {
    "wal_level": "logical",
    "max_replication_slots": "10",
    "max_prepared_transactions": "4",
    "fsync": "off",
    "full_page_writes": "off",
}
SCHEMA = """
create table thing (id int primary key, a text, big text, n numeric);
alter table thing alter big set storage external;
create table whole (id int primary key, a text, big text);
alter table whole alter big set storage external;
alter table whole replica identity full;
create table indexed (id int primary key, code text not null, a text, big text);
alter table indexed alter big set storage external;
create unique index indexed_code on indexed (code);
alter table indexed replica identity using index indexed_code;
create table part (id int, kind int, a text, big text, primary key (id, kind))
    partition by list (kind);
create table part_0 partition of part for values in (0);
create table part_1 partition of part for values in (1);
create table part_2 partition of part default;
alter table part alter big set storage external;
create table small (id int primary key, a text);
create table account (id int primary key, balance int not null);
create table entry (id bigint generated always as identity primary key, account int, amount int);
insert into account select i, 0 from generate_series(1, 50) i;
"""
TABLES = ("thing", "whole", "indexed", "part", "small", "account", "entry")


def _big(r: random.Random) -> str:
    return str(r.random()) * r.choice((1, 300, 600))


def _statement(r: random.Random) -> tuple[str, tuple[object, ...]]:
    id, new, text = r.randint(1, 300), r.randint(1, 300), str(r.random())
    table = r.choice(("thing", "whole", "indexed", "part"))
    kind = r.randint(0, 2)
    if table == "indexed":
        insert = "insert into indexed values (%s, %s, %s, %s) on conflict do nothing"
        values: tuple[object, ...] = (id, f"c{id}", text, _big(r))
    elif table == "part":
        insert = "insert into part values (%s, %s, %s, %s) on conflict do nothing"
        values = (id, kind, text, _big(r))
    else:
        insert = f"insert into {table} (id, a, big) values (%s, %s, %s) on conflict do nothing"
        values = (id, text, _big(r))
    moves = {
        "indexed": ("update indexed set code = %s where id = %s", (f"c{new}", id)),
        "part": ("update part set kind = %s where id = %s", (kind, id)),
    }
    return r.choice(
        (
            (insert, values),
            (insert, values),
            (f"update {table} set a = %s where id between %s and %s", (text, id, id + 2)),
            (f"update {table} set big = %s where id = %s", (_big(r), id)),
            (f"update {table} set big = null where id = %s", (id,)),
            (f"delete from {table} where id = %s", (id,)),
            moves.get(table, (f"update {table} set id = %s where id = %s", (new, id))),
        )
    )


def _transaction(
    r: random.Random, connection: psycopg.Connection[object], extra: list[str]
) -> None:
    with connection.transaction():
        a, b, amount = r.randint(1, 50), r.randint(1, 50), r.randint(-9, 9)
        for account, sign in sorted(((a, 1), (b, -1))):
            connection.execute(
                "update account set balance = balance + %s where id = %s", (sign * amount, account)
            )
            connection.execute(
                "insert into entry (account, amount) values (%s, %s)", (account, sign * amount)
            )
        for _ in range(r.randint(0, 6)):
            try:
                with connection.transaction(force_rollback=r.random() < 0.15):
                    connection.execute(*_statement(r))
            except psycopg.errors.IntegrityError:
                pass
        if r.random() < 0.05:
            connection.execute(
                "insert into small select i, %s from generate_series(1, 20) i"
                " on conflict (id) do update set a = excluded.a",
                (str(r.random()),),
            )
        if r.random() < 0.02:
            connection.execute(r.choice(("truncate small", "truncate part_1", "delete from small")))
        if extra and r.random() < 0.01:
            connection.execute(f"alter table {r.choice(('thing', 'whole'))} add {extra.pop()} int")
        if r.random() < 0.05:
            raise psycopg.Rollback


class Writers:
    """Threads that write until they are stopped, also across crashes of their server."""

    def __init__(self, place: Workplace, count: int) -> None:
        self.place, self.done, self.committed = place, threading.Event(), 0
        self.extra = [f"more_{i}" for i in range(6)]
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]
        for thread in self.threads:
            thread.start()

    def _run(self, seed: int) -> None:
        r = random.Random(seed)
        while not self.done.is_set():
            try:
                with psycopg.connect(self.place.core, autocommit=True) as connection:
                    while not self.done.is_set():
                        try:
                            _transaction(r, connection, self.extra)
                            self.committed += 1
                        except psycopg.errors.DeadlockDetected:
                            pass
                        time.sleep(0.002)
            except (psycopg.OperationalError, psycopg.Rollback):  # of a server that is down
                time.sleep(0.2)
            except BaseException as error:
                self.errors.append(error)
                raise

    def stop(self) -> None:
        self.done.set()
        for thread in self.threads:
            thread.join()
        assert not self.errors


class Watcher:
    """Looks at the sums as a reader of raw sees them, again and again."""

    def __init__(self, place: Workplace) -> None:
        self.place, self.done, self.looks, self.wrong = place, threading.Event(), 0, []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.done.is_set():
            try:
                with psycopg.connect(self.place.analytics, autocommit=True) as connection:
                    while not self.done.is_set():
                        row = connection.execute(
                            "select (select sum(balance) from analytics_raw.account),"
                            " (select sum(amount) from analytics_raw.entry),"
                            " (select count(*) from (select a.id from analytics_raw.account a"
                            " left join analytics_raw.entry e on e.account = a.id"
                            " group by a.id, a.balance"
                            " having a.balance <> coalesce(sum(e.amount), 0)) w)"
                        ).fetchone()
                        self.looks += 1
                        if row and (row[0] != (row[1] or 0) or row[2]):
                            self.wrong.append(row)
                        time.sleep(0.01)
            except psycopg.Error:
                time.sleep(0.2)

    def stop(self) -> None:
        self.done.set()
        self.thread.join()


@pytest.fixture
def crashing(tmp_path: Path) -> Iterator[tuple[Server, Workplace]]:
    with running_server(SETTINGS) as server:
        url = server.url("postgres")
        for place in empty_project((url, url), tmp_path):
            yield server, place


@pytest.mark.long
def test_a_loader_that_is_killed_and_servers_that_crash(
    crashing: tuple[Server, Workplace],
) -> None:
    server, place = crashing
    place.query(place.core, SCHEMA)
    define(place, *TABLES, indexed="conflict_columns: [code]")
    writers = Writers(place, 4)
    watcher = None
    r = random.Random(7)
    outcomes = {"killed": 0, "ended": 0, "crashed": 0, "failed": []}
    try:
        for number in range(ROUNDS):
            process = start_load(place)
            crash = number % 10 == 9
            wait = r.uniform(0.15, 2.0)
            try:
                out, err = process.communicate(timeout=wait)
                outcomes["ended"] += 1
                if process.returncode:
                    outcomes["failed"].append((out[-300:], err[-2000:]))
            except subprocess.TimeoutExpired:
                if crash:
                    server.stop("immediate")
                process.kill()
                process.communicate()
                outcomes["crashed" if crash else "killed"] += 1
                if crash:
                    server.start()
            wait_unlocked(place)
            if watcher is None and number > 3:
                results(place)
                watcher = Watcher(place)
    finally:
        if watcher:
            watcher.stop()
        writers.stop()
    print(outcomes, "committed", writers.committed, "looks", watcher and watcher.looks)
    assert not outcomes["failed"], outcomes["failed"][:3]
    for _ in range(3):
        done = place.run("exporter", "load", "--json")
        assert done.returncode == 0, done.stderr
    for table in TABLES:
        same(place, table)
    assert watcher is not None
    assert watcher.looks > 10
    assert not watcher.wrong, watcher.wrong[:3]
