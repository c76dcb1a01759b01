"""A slot whose source fails over, is restored or gives it up; several sources and destinations."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from exporter.demo.embedded import Server, running_server
from tests.conftest import Workplace, empty_project
from tests.helpers.changes import define, refused, results, same, slots
from tests.helpers.history import declared, replayed, versions
from tests.helpers.processes import start_load, started, until, wait_unlocked
from tests.helpers.versions import (
    LOGICAL,
    caught_up,
    copied,
    cut_off,
    programs,
    run,
    server_of,
    standby_of,
)
from tests.load.test_changes import start_receiver

THING = (
    "create table thing (id int primary key, a text);"
    "insert into thing select i, 'a' from generate_series(1, 100) i;"
    "create table other (like thing including all); insert into other values (1, 'o')"
)
ANEW = "it is made anew, and its tables copied"


def _loaded(place: Workplace) -> str:
    """Load; return what was said."""
    done = place.run("exporter", "load")
    assert done.returncode == 0, done.stderr
    return done.stderr


def _promote(primary: Server, standby: Server, place: Workplace) -> None:
    primary.stop("immediate")
    run(standby, "select pg_promote()")
    place.core = standby.url("postgres")


@pytest.fixture
def followed(place: Workplace) -> Iterator[tuple[Server, Server]]:
    """A primary whose slot is kept on its standby, too; what the standby has has landed."""
    newest = max(programs())
    if newest < 17:
        pytest.skip("slots are kept on standbys since PostgreSQL 17")
    with server_of(newest, LOGICAL) as primary:
        run(primary, THING)
        run(primary, "select pg_create_physical_replication_slot('standby')")
        kept = {"primary_slot_name": "standby", "hot_standby_feedback": "on"}
        with standby_of(primary, **kept) as standby:
            place.core = primary.url("postgres")
            place.define(declared("thing", ""), declared("past", "mode: history", "thing"))
            results(place)
            run(primary, "update thing set a = 'landed' where id = 1")
            _keep(place, primary, standby)
            yield primary, standby


def _keep(place: Workplace, primary: Server, standby: Server) -> None:
    """Bring the slot to the standby, as its worker does now and then."""
    with psycopg.connect(standby.url("postgres"), autocommit=True) as session:
        for _ in range(20):
            run(primary, "select pg_log_standby_snapshot()")
            results(place)
            caught_up(primary, standby)
            session.execute("select pg_sync_replication_slots()")
            found = run(standby, "select temporary from pg_replication_slots where synced")
            if found == [(False,)]:
                return
    raise AssertionError("the slot did not come to the standby")


def test_a_failover_that_lost_nothing_goes_on(
    place: Workplace, followed: tuple[Server, Server]
) -> None:
    primary, standby = followed
    run(primary, "delete from thing where id = 2")
    results(place)  # further than the standby knows
    run(primary, "update thing set a = 'not yet' where id < 10")
    caught_up(primary, standby)
    _promote(primary, standby, place)
    run(standby, "delete from thing where id = 3; insert into thing values (200, 'new')")
    done = place.run("exporter", "load", "--json")
    assert done.returncode == 0, done.stderr
    assert ANEW not in done.stderr
    found = {one["key"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert (found["thing"]["rows_read"], found["past"]["rows_read"]) == (8, 9)
    same(place, "thing")
    replayed(place, "past", "thing")
    assert len(versions(place, "past", "_op = 'copy'")) == 100  # the first one alone
    run(standby, "delete from thing where id = 4")
    assert results(place)["thing"]["rows_deleted"] == 1
    same(place, "thing")


def test_a_failover_that_lost_what_has_landed(
    place: Workplace, followed: tuple[Server, Server]
) -> None:
    primary, standby = followed
    cut_off(standby)
    run(primary, "insert into thing values (300, 'lost'); delete from thing where id = 5")
    results(place)
    _promote(primary, standby, place)
    run(standby, "update thing set a = 'new' where id between 6 and 90")
    said = _loaded(place)
    assert "does not have all that has landed: it is made anew" in said
    assert "its history misses but for the last version of each row" in said
    same(place, "thing")
    replayed(place, "past", "thing")


@pytest.mark.long
def test_a_failover_that_lost_what_a_copy_has(
    place: Workplace, followed: tuple[Server, Server]
) -> None:
    """Written before the table was published, it is in its copy and in no change."""
    primary, standby = followed
    define(place, "thing", "other")
    with psycopg.connect(place.core) as writer:
        writer.execute("insert into other values (2, 'lost')")
        process = start_load(place)
        assert process.stderr
        assert "waits for process" in process.stderr.readline()
        caught_up(primary, standby)
        cut_off(standby)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    same(place, "thing", "other")
    _promote(primary, standby, place)
    said = _loaded(place)
    assert ANEW not in said
    same(place, "thing", "other")


@pytest.mark.long
def test_a_standby_that_must_have_the_changes_first(
    place: Workplace, followed: tuple[Server, Server]
) -> None:
    primary, standby = followed
    run(primary, "alter system set synchronized_standby_slots = 'standby'")
    run(primary, "select pg_reload_conf()")
    run(primary, "delete from thing where id = 7")
    results(place)
    standby.stop()
    run(primary, "delete from thing where id = 8")
    status, said = refused(place)
    assert status == 1
    assert "none reads standby" in said
    standby.start()
    reads = "select active from pg_replication_slots where slot_name = 'standby'"
    until(lambda: run(primary, reads) == [(True,)])
    results(place)
    same(place, "thing")


def test_a_failover_without_the_slot(place: Workplace) -> None:
    with running_server({**LOGICAL, "fsync": "off"}) as primary:
        run(primary, THING)
        with standby_of(primary) as standby:
            place.core = primary.url("postgres")
            define(place, "thing")
            results(place)
            caught_up(primary, standby)
            cut_off(standby)
            run(primary, "insert into thing values (300, 'lost'); delete from thing where id = 5")
            results(place)
            _promote(primary, standby, place)
            said = _loaded(place)
            assert "is of timeline 1, and the source is on 2, and is not at the source any" in said
            same(place, "thing")


@pytest.fixture
def source(place: Workplace) -> Iterator[Server]:
    """A source of its own, whose table has its copy."""
    with running_server({**LOGICAL, "fsync": "off"}) as server:
        place.core = server.url("postgres")
        run(server, THING)
        define(place, "thing")
        results(place)
        run(server, "update thing set a = 'landed' where id = 1")
        results(place)
        yield server


def test_a_crash_that_has_the_slot_further_back(place: Workplace, source: Server) -> None:
    told = "select confirmed_flush_lsn - '0/0' from pg_replication_slots"
    run(source, "delete from thing where id = 2")
    results(place)
    before = run(source, told)[0]
    source.stop("immediate")
    source.start()
    assert run(source, told)[0] < before
    run(source, "insert into thing values (4000, 'new')")
    done = place.run("exporter", "load", "--json")
    assert done.returncode == 0, done.stderr
    assert ANEW not in done.stderr
    found = json.loads(done.stdout)
    assert (found["rows_read"], found["rows_deleted"]) == (1, 0)
    same(place, "thing")


def test_a_source_that_was_restored(place: Workplace, source: Server) -> None:
    """From a copy of its disk it comes with its slot, on the timeline that it had."""
    older = copied(source, "backup", source.settings)
    run(source, "insert into thing values (300, 'lost'); delete from thing where id = 5")
    results(place)
    source.stop()
    older.start()
    try:
        place.core = older.url("postgres")
        run(older, "update thing set a = 'new' where id = 6")
        # The positions are given out again.
        run(older, "create table filler as select md5(i::text) from generate_series(1, 9000) i")
        run(older, "update thing set a = 'newer' where id = 7")
        assert f"it has lost commits: {ANEW}" in _loaded(place)
        same(place, "thing")
    finally:
        older.stop()


def test_a_slot_that_nobody_has_read_for_too_long(tmp_path: Path) -> None:
    if max(programs()) < 18:
        pytest.skip("slots that nobody reads end since PostgreSQL 18")
    settings = {**LOGICAL, "idle_replication_slot_timeout": "1s"}
    with server_of(max(programs()), settings) as server:
        url = server.url("postgres")
        for place in empty_project((url, url), tmp_path):
            place.query(place.core, THING)
            define(place, "thing")
            results(place)
            place.query(place.core, "delete from thing where id = 1")
            time.sleep(1.5)
            place.query(place.core, "checkpoint")
            assert "is lost: nobody has read it for so long (idle_repl" in _loaded(place)
            same(place, "thing")


def test_two_destinations_of_a_source(place: Workplace, tmp_path: Path) -> None:
    place.query(place.core, THING)
    define(place, "thing")
    results(place)
    first, theirs = place.analytics, f"{place.analytics.rpartition('/')[2].partition('?')[0]}_two"
    place.query(first, f"create database {theirs}")
    second = first.replace(theirs.removesuffix("_two"), theirs)
    try:
        place.analytics = second
        results(place)
        place.query(place.core, "delete from thing where id = 1; update thing set a = 'x'")
        for place.analytics in (first, second, first):
            results(place)
            same(place, "thing")
        assert len(slots(place)) == 4
        shown = place.run("exporter", "slots", "show")
        assert shown.returncode == 0, shown.stderr
        for name, *_ in slots(place):
            assert name in shown.stdout
        assert "of another destination" in shown.stdout
    finally:
        place.analytics = first
        place.query(first, f"drop database {theirs} with (force)")


def test_two_clusters_with_one_destination(place: Workplace) -> None:
    with running_server({**LOGICAL, "fsync": "off"}) as server:
        parts = {"thing": place.core, "other": server.url("postgres")}
        for url in parts.values():
            place.query(url, THING)
        for text in ("first", "second", "third"):
            for table, place.core in parts.items():
                define(place, table)
                place.query(
                    place.core,
                    f"update {table} set a = '{text}'; delete from {table} where id % 7 = 3",
                )
                results(place)
                same(place, table)
        known = "select count(distinct slot), count(distinct cluster)"
        known += " from analytics_raw._exporter_slots"
        assert place.query(place.analytics, known) == [(2, 2)]


def test_who_wrote_while_the_owner_published_is_waited_for(
    place: Workplace, source: Server
) -> None:
    """Its id is a later one than that of the publishing, and it wrote before that was done."""
    publication = slots(place)[1][0]
    define(place, "thing", "other")
    with psycopg.connect(place.core) as owner, psycopg.connect(place.core) as writer:
        owner.execute(f"alter publication {publication} add table other".encode())
        writer.execute("insert into other values (2, 'early')")
        owner.commit()
        process = start_load(place)
        assert process.stderr
        assert "waits for process" in process.stderr.readline()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    same(place, "thing", "other")


@pytest.mark.long
def test_a_key_that_was_taken_over_while_a_copy_was_interrupted(place: Workplace) -> None:
    """The copy has both rows as they are now: under the old key a change would find the other."""
    if place.query(place.core, "show server_version_num")[0][0] < "140000":
        pytest.skip("a copy that was interrupted goes on since PostgreSQL 14")
    place.query(
        place.core,
        "create table thing (id int primary key, a text, big text);"
        "alter table thing alter big set storage external;"
        "insert into thing select i, repeat('a', 900),"
        " case when i < 9 then repeat(md5(i::text), 300) end from generate_series(1, 8000) i;"
        "analyze thing",
    )
    define(place, "thing")
    begun = "select count(*) from analytics_raw._exporter_state where next_block > 0"

    def copying() -> bool:
        assert process.poll() is None
        with contextlib.suppress(psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            return place.query(place.analytics, begun) == [(1,)]
        return False

    with started(place, "load", BATCH_SIZE="100") as process:
        until(copying)
    wait_unlocked(place)
    assert place.query(place.analytics, begun) == [(1,)]
    place.query(
        place.core,
        "update thing set id = -1 where id = 1;"
        "insert into thing values (1, 'b', repeat(md5('other'), 300))",
    )
    receiver = start_receiver(place, slots(place)[0][0])
    try:
        assert "is active" in refused(place)[1]
    finally:
        receiver.finish()
    assert results(place)["thing"]["rows_read"] >= 8000  # copied once more, from the start
    same(place, "thing")
