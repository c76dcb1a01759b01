"""Changes that are read from a standby: what its copies show, its slot, its promotion."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import psycopg
import pytest

from exporter.demo.embedded import Server
from tests.conftest import Workplace
from tests.helpers.changes import define, refused, results
from tests.helpers.processes import started, until
from tests.helpers.versions import LOGICAL, caught_up, programs, run, server_of, standby_of
from tests.load.test_changes_servers import ANEW

BIG = "(select string_agg(md5((i * n)::text), '') from generate_series(1, 400) n)"  # stored apart
TABLES = f"""
create table thing (id int primary key, a text, big text);
alter table thing alter big set storage external;
insert into thing select i, 'a', {BIG} from generate_series(1, 20) i;
create table account (id int primary key, sum int not null);
insert into account select i, 0 from generate_series(1, 5) i;
create table entry (id int primary key, account int not null, sum int not null)
"""
COLUMNS = {"thing": "id, a, big", "account": "id, sum", "entry": "id, account, sum"}
NAMES = tuple(COLUMNS)


class Pair(NamedTuple):
    """A primary, its standby, which is the source, and a session on each."""

    primary: Server
    standby: Server
    place: Workplace

    def same(self) -> None:
        """Assert that raw is what the primary has."""
        for name, columns in COLUMNS.items():
            statement = (
                "select md5(coalesce(string_agg(t::text, ',' order by id), ''))"
                f" from (select {columns} from {{}}{name}) t"
            )
            ours = run(self.primary, statement.format(""))
            place = self.place
            assert place.query(place.analytics, statement.format("analytics_raw.")) == ours, name


@contextlib.contextmanager
def _telling(primary: Server) -> Iterator[None]:
    """Let the primary tell its standby now and then which transactions run, as it does itself."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(0.2):
            run(primary, "select pg_log_standby_snapshot()")

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _publish(pair: Pair) -> None:
    """Run at the primary what a load on the standby asks for."""
    status, said = refused(pair.place)
    assert status == 1
    assert "leads to a standby, where the publication cannot be changed" in said
    statement = said.partition("on the primary, as the owner of the tables: ")[2].splitlines()[0]
    run(pair.primary, statement)
    caught_up(pair.primary, pair.standby)


@pytest.fixture
def pair(place: Workplace) -> Iterator[Pair]:
    newest = max(programs())
    if newest < 16:
        pytest.skip("standbys decode since PostgreSQL 16")
    with server_of(newest, LOGICAL) as primary:
        run(primary, TABLES)
        run(primary, "select pg_create_physical_replication_slot('standby')")
        kept = {"primary_slot_name": "standby", "hot_standby_feedback": "on"}
        with standby_of(primary, **kept) as standby:
            place.core = standby.url("postgres")
            define(place, *NAMES)
            yield Pair(primary, standby, place)


@pytest.fixture
def read(pair: Pair) -> Pair:
    """The same, whose tables have been copied."""
    done = pair.place.run("exporter", "check")
    assert done.returncode == 1
    assert "is made by the first load, which a standby cannot do" in done.stdout
    _publish(pair)
    with _telling(pair.primary):
        results(pair.place)
    pair.same()
    return pair


def test_it_is_read_and_promoted(read: Pair) -> None:
    primary, standby, place = read
    run(primary, "update thing set id = 100 where id = 1; delete from thing where id = 2")
    run(primary, "insert into entry values (1, 1, 5); update account set sum = 5 where id = 1")
    caught_up(primary, standby)
    found = results(place)
    assert {name: found[name]["rows_read"] for name in NAMES} == dict.fromkeys(NAMES, 1)
    read.same()
    for words in (["slots", "show"], ["status"], ["load", "--dry-run"], ["verify"], ["check"]):
        done = place.run("exporter", *words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    run(primary, "delete from thing where id = 3; insert into thing values (101, 'new')")
    caught_up(primary, standby)
    run(standby, "select pg_wal_replay_pause()")
    assert "the standby's replay is paused" in place.run("exporter", "load").stderr
    run(standby, "select pg_wal_replay_resume()")
    primary.stop("immediate")
    run(standby, "select pg_promote()")
    run(standby, "delete from thing where id = 4; insert into entry values (2, 1, 7)")
    done = place.run("exporter", "load")
    assert done.returncode == 0, done.stderr
    assert ANEW not in done.stderr
    Pair(standby, standby, place).same()


def test_another_server_of_the_cluster_has_another_slot(read: Pair) -> None:
    primary, standby, place = read
    run(
        primary,
        "update thing set id = 100 where id = 1;"
        f"insert into thing select 1, 'other', {BIG} from generate_series(77, 77) i",
    )
    caught_up(primary, standby)
    place.core = primary.url("postgres")
    done = place.run("exporter", "load")
    assert done.returncode == 0, done.stderr
    assert f"is not at the source any more: {ANEW}" in done.stderr
    read.same()
    place.core = standby.url("postgres")  # whose slot has not sent that yet
    caught_up(primary, standby)
    results(place)
    read.same()


def test_what_a_copy_may_show_is_not_applied_to_another_row(read: Pair) -> None:
    """A key that moves without its large value, amid a copy: another row has the key by then."""
    primary, standby, place = read
    url = primary.url("postgres")
    with (
        psycopg.connect(url) as writer,
        psycopg.connect(url) as mover,
        started(place, "load", "thing", "--full-refresh") as process,
    ):
        writer.execute("insert into entry values (50, 1, 0)")
        run(primary, "insert into entry values (51, 1, 0)")  # it is sent to the standby
        assert process.stderr
        while "waits for" not in process.stderr.readline():
            assert process.poll() is None
        mover.execute("lock table thing in access exclusive mode")
        run(primary, "insert into entry values (52, 1, 0)")
        locked = "select count(*) from pg_locks where mode = 'AccessExclusiveLock' and granted"
        until(lambda: run(standby, locked) == [(1,)])
        writer.commit()
        waits = "select count(*) from pg_locks where not granted"
        until(lambda: run(standby, waits) == [(1,)])
        mover.execute("update thing set id = 1000 where id = 1")
        mover.execute(f"insert into thing select 1, 'other', {BIG} from generate_series(77, 77) i")
        mover.commit()
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 0, said
    read.same()


def test_keys_that_move_all_the_time_stop_no_load_for_ever(read: Pair) -> None:
    primary, standby, place = read
    ended = threading.Event()
    limit = threading.Timer(40, ended.set)  # a load without an end would go on until then

    def move() -> None:
        with psycopg.connect(primary.url("postgres"), autocommit=True) as session:
            while not ended.is_set():
                session.execute("update thing set id = 500 where id = 1")
                session.execute("update thing set id = 1 where id = 500")

    mover = threading.Thread(target=move)
    mover.start()
    limit.start()
    try:
        done = place.run("exporter", "load", "thing", "--full-refresh")
        assert not ended.is_set()
    finally:
        limit.cancel()
        ended.set()
        mover.join()
    assert done.returncode == 0 or "each time keys moved amid the copy" in done.stderr
    caught_up(primary, standby)
    with _telling(primary):
        results(place)
    read.same()


@pytest.mark.parametrize("rounds", [2, pytest.param(25, marks=pytest.mark.long)])
def test_copies_beside_writers(read: Pair, rounds: int) -> None:
    primary, standby, place = read
    ended = threading.Event()
    failed: list[BaseException] = []

    def write(seed: int) -> None:
        random_ = random.Random(seed)
        with psycopg.connect(primary.url("postgres")) as session:
            number = seed
            while not ended.is_set():
                key, other = random_.randint(1, 25), random_.randint(1, 25)
                number += 10
                with contextlib.suppress(psycopg.errors.IntegrityError), session.transaction():
                    session.execute("update thing set id = %s where id = %s", (other, key))
                with contextlib.suppress(psycopg.errors.IntegrityError), session.transaction():
                    if random_.random() < 0.4:
                        session.execute("delete from thing where id = %s", (key,))
                    session.execute(
                        f"insert into thing select i, 'w', {BIG} from (values (%s::int)) v (i)",
                        (key,),
                    )
                with session.transaction():
                    session.execute("insert into entry values (%s, %s, 1)", (number, seed))
                    session.execute("update account set sum = sum + 1 where id = %s", (seed,))

    def look() -> None:
        try:
            with psycopg.connect(place.analytics, autocommit=True) as session:
                while not ended.wait(0.05):
                    row = session.execute(
                        "select (select sum(sum) from analytics_raw.account),"
                        " (select coalesce(sum(sum), 0) from analytics_raw.entry)"
                    ).fetchone()
                    assert row is not None
                    assert row[0] == row[1]
        except BaseException as error:  # noqa: BLE001  told below
            failed.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2, 3)]
    threads.append(threading.Thread(target=look))
    for thread in threads:
        thread.start()
    try:
        for number in range(rounds):
            results(place, *(["thing", "--full-refresh"] if number % 2 else []))
            time.sleep(0.1)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not failed
    caught_up(primary, standby)
    results(place)
    read.same()


def test_what_a_standby_cannot_give(pair: Pair) -> None:
    primary, _, place = pair
    _publish(pair)
    define(place, "thing", thing="mode: history")
    status, said = refused(place)
    assert status == 1
    assert "the moment of a copy is not known, by which a history begins" in said
    define(place, *NAMES)
    _publish(pair)
    run(primary, "alter system set wal_level = replica")
    primary.stop()
    primary.settings.pop("wal_level")
    primary.start()
    status, said = refused(place)
    assert status == 1
    assert "wal_level" in said
    ours = "select count(*) from pg_replication_slots where slot_type = 'logical'"
    assert run(pair.standby, ours) == [(0,)]
