"""Writers, and a loader that is killed again and again: a history replayed to a moment is it."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from typing import Any

import psycopg
import pytest

from tests.conftest import Workplace
from tests.helpers.changes import results
from tests.helpers.history import NEWEST, define, replayed
from tests.helpers.processes import start_load, wait_unlocked

ROUNDS = int(os.environ.get("HISTORY_ROUNDS", "40"))
TABLES = ("thing", "whole", "small")
SCHEMA = """
create table thing (id int primary key, a text, big text);
create table whole (id int primary key, a text, big text);
alter table whole replica identity full;
create table small (id int primary key, a text, big text);
create table journal (xid bigint, name text, op text, id int);
create function noted() returns trigger language plpgsql as $$ begin
    if tg_op = 'TRUNCATE' then
        execute format('insert into journal select pg_current_xact_id()::text::bigint, %L,'
            '''delete'', id from %I', tg_table_name, tg_table_name);
        return null;
    end if;
    if tg_op = 'DELETE' or tg_op = 'UPDATE' and old.id <> new.id then
        insert into journal select pg_current_xact_id()::text::bigint, tg_table_name, 'delete',
            old.id;
    end if;
    if tg_op <> 'DELETE' then
        insert into journal select pg_current_xact_id()::text::bigint, tg_table_name,
            lower(tg_op), new.id;
    end if;
    return null;
end $$;
"""
EACH = """
alter table {0} alter big set storage external;
insert into {0} select i, 'a', repeat(md5(i::text), 100) from generate_series(1, 50) i;
create trigger noted after insert or update or delete on {0} for each row execute function noted();
create trigger emptied before truncate on {0} execute function noted();
"""


def _big(r: random.Random) -> str:
    return str(r.random()) * r.choice((1, 300))


def _statement(r: random.Random) -> tuple[str, tuple[object, ...]]:
    id, new, text, table = r.randint(1, 80), r.randint(1, 80), str(r.random()), r.choice(TABLES)
    insert = f"insert into {table} (id, a, big) values (%s, %s, %s) on conflict do nothing"
    choices: tuple[tuple[str, tuple[object, ...]], ...] = (
        (insert, (id, text, _big(r))),
        (insert, (id, text, _big(r))),
        (f"update {table} set a = %s where id between %s and %s", (text, id, id + 2)),
        (f"update {table} set a = %s where id = %s", (text, id)),
        (f"update {table} set big = %s where id = %s", (_big(r), id)),
        (f"update {table} set id = %s where id = %s", (new, id)),
        (f"delete from {table} where id = %s", (id,)),
    )
    return r.choice(choices)


def _transaction(r: random.Random, connection: psycopg.Connection[Any], more: list[str]) -> None:
    with connection.transaction():
        for _ in range(r.randint(1, 6)):
            try:
                with connection.transaction(force_rollback=r.random() < 0.15):
                    connection.execute(*_statement(r))
            except psycopg.errors.IntegrityError:
                pass
        if r.random() < 0.01:
            connection.execute("truncate small")
        if more and r.random() < 0.01:
            connection.execute(f"alter table {r.choice(('thing', 'whole'))} add {more.pop()} text")
        if r.random() < 0.01:
            connection.execute("update thing set a = a; update whole set a = 'all'")
        if r.random() < 0.05:
            raise psycopg.Rollback


def _write(place: Workplace, seed: int, done: threading.Event, more: list[str]) -> None:
    r = random.Random(seed)
    with psycopg.connect(place.core, autocommit=True) as connection:
        while not done.wait(0.003):
            with contextlib.suppress(psycopg.errors.DeadlockDetected):
                _transaction(r, connection, more)


class Moment:
    """What the source was in one snapshot, which tells the transactions that it shows."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.states = {}
        with connection.transaction():
            connection.execute("set transaction isolation level repeatable read")
            # Emptied after the snapshot, a table would look so to it.
            connection.execute(f"lock table {', '.join(TABLES)} in access share mode")
            row = connection.execute("select pg_current_snapshot()::text").fetchone()
            assert row
            self.snapshot = row[0]
            for table in TABLES:
                cursor = connection.execute(f"select * from {table} order by id")
                self.states[table] = [one.name for one in cursor.description], cursor.fetchall()

    def check(self, place: Workplace) -> None:
        """Assert that the history is that, as of then."""
        seen = f"(_xid is null or pg_visible_in_snapshot(_xid::text::xid8, '{self.snapshot}'))"
        for table, (names, rows) in self.states.items():
            newest = NEWEST.format(table=table, seen=seen)
            query = f"select {', '.join(names)} from {newest} n order by id"
            assert place.query(place.analytics, query) == rows, (table, self.snapshot)


def _same_versions(place: Workplace) -> None:
    """Assert that each version is there, and none twice: the source has noted them, too."""
    for table in TABLES:
        columns = "_xid, _op, id from analytics_raw"
        found = place.query(
            place.analytics, f"select {columns}.{table} where _op <> 'copy' order by 1, 2, 3"
        )
        noted = place.query(
            place.core, f"select xid, op, id from journal where name = '{table}' order by 1, 2, 3"
        )
        assert found == noted, table


@pytest.mark.parametrize("rounds", [4, pytest.param(ROUNDS, marks=pytest.mark.long)])
def test_a_history_is_the_source_at_every_moment(place: Workplace, rounds: int) -> None:
    place.query(place.core, SCHEMA + "".join(EACH.format(table) for table in TABLES))
    define(place, *TABLES)
    results(place)
    done, more = threading.Event(), [f"more_{number}" for number in range(4)]
    place.query(place.core, "truncate journal")
    writers = [threading.Thread(target=_write, args=(place, seed, done, more)) for seed in range(3)]
    for writer in writers:
        writer.start()
    r, moments, killed, failed = random.Random(7), [], 0, []
    try:
        with psycopg.connect(place.core, autocommit=True, prepare_threshold=None) as recorder:
            longest = 60.0
            for number in range(rounds):
                process, began = start_load(place), time.monotonic()
                # All of a load's steps are hit, whatever the machine's pace.
                until = began + (60 if number % 4 == 0 else r.uniform(0.4, 1.2) * longest)
                while process.poll() is None and time.monotonic() < until:
                    with contextlib.suppress(psycopg.errors.DeadlockDetected):
                        moments.append(Moment(recorder))
                    time.sleep(0.2)
                if process.poll() is None:
                    process.kill()
                    killed += 1
                else:
                    longest = time.monotonic() - began
                said = process.communicate()
                if process.returncode not in (0, -9) or "misses" in said[1]:
                    failed.append(said)
                wait_unlocked(place)
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert not failed, failed[0]
    said = place.run("exporter", "load").stderr
    stamps = "select count(distinct _exported_at), count(*) from analytics_raw.thing"
    landed = place.query(place.analytics, stamps)
    print(f"{killed} of {rounds} killed, {len(moments)} moments, {landed}, {said}")
    for table in TABLES:
        replayed(place, table)
    _same_versions(place)
    for moment in moments:
        moment.check(place)
