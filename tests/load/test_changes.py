"""Tables that are read by their changes: raw is what the source is, after each load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from exporter.demo.embedded import running_server
from tests.conftest import Workplace, as_role, empty_project
from tests.helpers.changes import define, refused, results, same, slots, start_receiver
from tests.helpers.processes import start_load, until

THING = """
create table thing (id int primary key, a text, big text, n numeric(9,3), at timestamptz);
alter table thing alter big set storage external;
insert into thing select i, 'a' || i, repeat(md5(i::text), 400), i / 7.0, now()
from generate_series(1, 100) i;
"""


@pytest.fixture
def thing(place: Workplace) -> Workplace:
    """A table whose copy is made."""
    place.query(place.core, THING)
    define(place, "thing")
    assert results(place)["thing"]["rows_written"] == 100
    same(place, "thing")
    return place


def test_each_kind_of_change_lands(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "insert into thing values (101, 'new', null, 1, null);"
        "update thing set a = 'changed' where id between 1 and 10;"  # big is stored apart
        "update thing set big = 'now small' where id = 5;"
        "update thing set id = 1000 + id where id between 20 and 25;"
        "delete from thing where id between 40 and 50;"
        "update thing set a = null, n = 'NaN' where id = 60",
    )
    found = results(thing)["thing"]
    assert found["rows_deleted"] == 17
    same(thing, "thing")
    found = results(thing)["thing"]
    assert (found["rows_read"], found["rows_deleted"]) == (0, 0)


def test_a_key_that_moves_on_keeps_what_is_stored_apart(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "update thing set a = 'before' where id = 1; update thing set id = 201 where id = 1;"
        "update thing set id = 202 where id = 201; update thing set a = 'after' where id = 202;"
        # a swap, by way of a third
        "update thing set id = -1 where id = 2; update thing set id = 2 where id = 3;"
        "update thing set id = 3 where id = -1;"
        # gone, and there again
        "delete from thing where id = 4; insert into thing values (4, 'again');"
        "update thing set id = 5000 where id = 5; delete from thing where id = 5000",
    )
    results(thing)
    same(thing, "thing")


def test_a_transaction_larger_than_a_chunk_lands_at_once(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "begin; insert into thing select i, 'n', repeat(md5(i::text), 50)"
        " from generate_series(1000, 12000) i;"
        "update thing set a = 'later' where id > 500;"
        "update thing set id = id + 100000 where id % 3 = 0;"
        "delete from thing where id % 7 = 0; commit",
    )
    found = results(thing)["thing"]
    assert found["batches"] == 1
    same(thing, "thing")
    stamps = "select count(distinct _exported_at) from analytics_raw.thing where id > 500"
    assert thing.query(thing.analytics, stamps) == [(1,)]


def test_many_transactions_land_in_several_steps(thing: Workplace) -> None:
    for begin in range(1000, 13000, 2000):
        thing.query(
            thing.core,
            "insert into thing select i, 'n', repeat(md5(i::text), 50)"
            f" from generate_series({begin}, {begin + 1999}) i",
        )
    assert results(thing)["thing"]["batches"] > 1
    same(thing, "thing")


def test_marked_rows(place: Workplace) -> None:
    place.query(place.core, THING)
    define(place, "thing", thing="deletes: mark")
    results(place)
    place.query(place.core, "delete from thing where id <= 10")
    assert results(place)["thing"]["rows_deleted"] == 10
    marked = (
        "select count(*), min(id), max(id) from analytics_raw.thing where _deleted_at is not null"
    )
    assert place.query(place.analytics, marked) == [(10, 1, 10)]
    place.query(place.core, "insert into thing values (3, 'again')")
    results(place)
    assert place.query(place.analytics, marked) == [(9, 1, 10)]


def test_columns_come_and_go(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "update thing set a = 'old shape' where id < 5; alter table thing add more int;"
        "update thing set more = id where id between 3 and 8; alter table thing drop n;"
        "update thing set a = 'new shape' where id between 7 and 12;"
        "insert into thing (id, more) values (500, 1)",
    )
    results(thing)
    same(thing, "thing")
    assert thing.query(
        thing.analytics, "select count(n) from analytics_raw.thing where id between 7 and 12"
    ) == [(0,)]


def test_truncate_and_a_table_that_is_written_anew(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "update thing set a = 'x'; truncate thing; insert into thing (id, a) values (1, 'one')",
    )
    results(thing)
    same(thing, "thing")
    thing.query(thing.core, "alter table thing alter a type text using 'twice ' || a")
    results(thing)
    same(thing, "thing")
    thing.query(thing.core, "delete from thing")
    results(thing)
    same(thing, "thing")
    thing.query(thing.core, "insert into thing (id, a) values (7, 'again')")
    assert results(thing)["thing"]["rows_read"] == 1
    same(thing, "thing")


def test_partitions(place: Workplace) -> None:
    place.query(
        place.core,
        "create table part (id int, kind int, a text, primary key (id, kind))"
        " partition by list (kind);"
        "create table part_1 partition of part for values in (1);"
        "create table part_2 partition of part for values in (2);"
        "insert into part select i, 1 + i % 2, 'a' from generate_series(1, 50) i",
    )
    define(place, "part")
    results(place)
    same(place, "part")
    place.query(
        place.core,
        "update part set kind = 3 - kind where id < 10; truncate part_2;"
        "insert into part values (100, 2, 'new')",
    )
    results(place)
    same(place, "part")
    # Rows that come with a partition, or go with it, send no changes.
    place.query(
        place.core,
        "create table part_3 (like part including all); insert into part_3 values (1, 3, 'came');"
        "alter table part attach partition part_3 for values in (3)",
    )
    results(place)
    same(place, "part")
    place.query(place.core, "alter table part detach partition part_1")
    results(place)
    same(place, "part")
    place.query(place.core, "create table part_4 partition of part for values in (4)")
    results(place)
    place.query(place.core, "insert into part values (9, 4, 'x')")
    assert results(place)["part"]["rows_read"] == 1
    same(place, "part")


def test_tables_join_and_leave_a_slot(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "create table other (id int primary key, a text); insert into other values (1, 'a')",
    )
    define(thing, "thing", "other")
    thing.query(thing.core, "update thing set a = 'meanwhile' where id = 1")
    assert results(thing)["other"]["rows_written"] == 1
    same(thing, "thing", "other")
    define(thing, "thing")
    done = thing.run("exporter", "load")
    assert "public.other is not read by its changes any more" in done.stderr
    thing.query(thing.core, "update other set a = 'missed'; insert into other values (2, 'b')")
    results(thing)
    define(thing, "thing", "other")
    results(thing)
    same(thing, "thing", "other")


def test_one_key_loads_all_of_its_slot(thing: Workplace) -> None:
    thing.query(thing.core, "create table other (id int primary key, a text)")
    define(thing, "thing", "other")
    thing.query(thing.core, "insert into other values (1, 'a'); delete from thing where id = 1")
    assert set(results(thing, "other")) == {"thing", "other"}
    same(thing, "thing", "other")


def test_a_full_refresh_of_one_table(thing: Workplace) -> None:
    thing.query(thing.analytics, "update analytics_raw.thing set a = 'wrong' where id = 7")
    thing.query(thing.core, "update thing set a = 'right' where id = 8")
    assert results(thing, "--full-refresh", "thing")["thing"]["rows_written"] >= 1
    same(thing, "thing")


def test_a_slot_that_is_gone_is_made_anew(thing: Workplace) -> None:
    (name,) = thing.query(
        thing.core, "select slot_name from pg_replication_slots where database = current_database()"
    )[0]
    thing.query(thing.core, f"select pg_drop_replication_slot('{name}')")
    thing.query(thing.core, "delete from thing where id = 1; update thing set a = 'x' where id = 2")
    done = thing.run("exporter", "load")
    assert done.returncode == 0, done.stderr
    assert f"the slot {name} is not at the source any more" in done.stderr
    same(thing, "thing")
    assert len(slots(thing)) == 2


def test_a_destination_that_went_back(thing: Workplace) -> None:
    old = thing.query(thing.analytics, "select lsn::text from analytics_raw._exporter_slots")
    thing.query(thing.core, "delete from thing where id = 1")
    results(thing)
    lsn = old[0][0]
    thing.query(
        thing.analytics,
        "insert into analytics_raw.thing (id, _exported_at)"
        " values (1, now());"
        f"update analytics_raw._exporter_slots set lsn = '{lsn}'",
    )
    done = thing.run("exporter", "load")
    assert "was read further by somebody else, or the destination is an older one" in done.stderr
    same(thing, "thing")


def test_raw_that_lacks_a_row(thing: Workplace) -> None:
    thing.query(thing.analytics, "delete from analytics_raw.thing where id = 3")
    thing.query(thing.core, "update thing set a = 'part' where id = 3")
    status, said = refused(thing)
    assert status == 1
    assert "raw lacks row id=3" in said
    results(thing, "--full-refresh", "thing")
    same(thing, "thing")


def test_raw_that_was_written_to(thing: Workplace) -> None:
    """Rows are inserted and updated as the source says, which is cheap; raw may know better."""
    thing.query(thing.analytics, "delete from analytics_raw.thing where id = 3")
    thing.query(
        thing.core,
        "update thing set a = 'whole', big = 'small' where id between 3 and 5;"
        " update thing set a = a, big = 'b' where id = 6; update thing set n = n where id = 7",
    )
    assert results(thing)["thing"]["rows_written"] == 4
    same(thing, "thing")
    thing.query(
        thing.analytics,
        "insert into analytics_raw.thing (id, a, _exported_at) values (200, 'ours', now())",
    )
    thing.query(thing.core, "insert into thing (id, a) values (200, 'theirs'), (201, 'more')")
    assert results(thing)["thing"]["rows_written"] == 2
    same(thing, "thing")


@pytest.mark.parametrize(
    ("declared", "statement", "said"),
    [
        ("", "alter table thing replica identity nothing", "replica identity of public.thing"),
        ("", "alter table thing drop constraint thing_pkey", "has no primary key"),
        ("conflict_columns: [a]", "select", "replica identity of public.thing does not have a"),
        ("", "alter table thing add double int generated always as (id * 2) stored", "computes"),
        ("", "alter table thing set unlogged", "is unlogged"),
        ("mode: append", "select", "must be upsert or history with read: changes"),
        ("deletes: ignore", "select", "must be remove or mark"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    place: Workplace, declared: str, statement: str, said: str
) -> None:
    place.query(place.core, THING)
    place.query(place.core, statement)
    define(place, "thing", thing=declared)
    assert said in refused(place)[1]
    assert slots(place) == []


def test_rights_that_are_missing_are_named(place: Workplace) -> None:
    place.query(place.core, THING)
    role = place.core.rpartition("/")[2].partition("?")[0]
    place.query(place.core, f"create role {role} login password 'secret'")
    try:
        define(place, "thing")
        core = as_role(place.core, role)
        done = place.run("exporter", "load", DATABASE_URL_CORE=core)
        assert done.returncode == 1
        assert f"the role {role} must not read a replication slot" in done.stderr
        place.query(place.core, f"alter role {role} replication; grant select on thing to {role}")
        done = place.run("exporter", "load", DATABASE_URL_CORE=core)
        assert done.returncode == 1
        assert "as the owner of the tables: create publication" in done.stderr
        assert slots(place) == []
    finally:
        place.query(place.core, f"drop owned by {role}; drop role {role}")


def test_slots_are_shown_and_dropped(thing: Workplace) -> None:
    shown = thing.run("exporter", "slots", "show")
    assert shown.returncode == 0, shown.stderr
    assert "public.thing" in shown.stdout
    name = slots(thing)[0][0]
    assert thing.run("exporter", "slots", "drop", "exporter_nothing").returncode == 2
    done = thing.run("exporter", "slots", "drop", name)
    assert done.returncode == 0, done.stderr
    assert slots(thing) == []
    assert thing.run("exporter", "check").returncode == 0
    thing.query(thing.core, "delete from thing where id = 1")
    results(thing)
    same(thing, "thing")
    checked = thing.run("exporter", "check")
    assert checked.returncode == 0, checked.stdout
    assert "holds back" in checked.stdout
    assert thing.run("exporter", "status").returncode == 0
    verified = thing.run("exporter", "verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_what_has_no_meaning_is_refused(thing: Workplace) -> None:
    for words in (
        ("--since", "2026-01-01", "thing"),
        ("--sweep", "thing"),
        ("--reconcile", "thing"),
        ("--dry-run", "--sweep", "thing"),
    ):
        assert refused(thing, *words)[0] == 2, words
    done = thing.run("exporter", "state", "set", "thing", "5")
    assert done.returncode == 2, done.stderr


def test_a_publication_that_somebody_has_changed(thing: Workplace) -> None:
    name = slots(thing)[0][0]
    thing.query(thing.core, f"alter publication {name} drop table thing")
    thing.query(thing.core, "update thing set a = 'missed'; delete from thing where id = 1")
    results(thing)
    same(thing, "thing")
    thing.query(thing.core, f"alter publication {name} set (publish = 'insert')")
    thing.query(thing.core, "update thing set a = 'missed again'; delete from thing where id = 2")
    results(thing)
    same(thing, "thing")
    thing.query(thing.core, "update thing set a = 'seen'; delete from thing where id = 3")
    assert results(thing)["thing"]["rows_read"] == 97
    same(thing, "thing")


def test_a_copy_waits_for_who_writes(thing: Workplace) -> None:
    """What was begun before the publication had the table could be in neither of the two."""
    thing.query(thing.core, "create table other (id int primary key, a text)")
    define(thing, "thing", "other")
    with psycopg.connect(thing.core) as writer:
        writer.execute("insert into other values (1, 'open')")
        process = start_load(thing)
        assert process.stderr
        assert "waits for process" in process.stderr.readline()
        writer.execute("insert into other values (2, 'open still')")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert '"rows_written": 2' in out
    same(thing, "thing", "other")
    results(thing)
    same(thing, "thing", "other")


def test_idle_tables_hold_nothing_back(thing: Workplace) -> None:
    (name,) = thing.query(
        thing.core, "select slot_name from pg_replication_slots where database = current_database()"
    )[0]
    held = (
        "select pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::bigint"
        f" from pg_replication_slots where slot_name = '{name}'"
    )
    thing.query(
        thing.core,
        "create table foreign_to_us as select md5(i::text) from generate_series(1, 200000) i",
    )
    assert thing.query(thing.core, held)[0][0] > 10_000_000
    assert results(thing)["thing"]["rows_read"] == 0
    until(lambda: bool(thing.query(thing.core, held)[0][0] < 1_000_000))


def test_a_slot_in_use_is_named(thing: Workplace) -> None:
    name = slots(thing)[0][0]
    subscriber = start_receiver(thing, name)
    try:
        status, said = refused(thing)
        assert status == 1
        assert f'replication slot "{name}" is active' in said
    finally:
        subscriber.finish()
    results(thing)
    same(thing, "thing")


@pytest.fixture
def small_wal(tmp_path: Path) -> Iterator[Workplace]:
    """A server that soon gives up a slot which nobody reads."""
    settings = {
        "wal_level": "logical",
        "max_slot_wal_keep_size": "20MB",
        "max_wal_size": "40MB",
        "min_wal_size": "32MB",
        "fsync": "off",
    }
    with running_server(settings) as server:
        url = server.url("postgres")
        yield from empty_project((url, url), tmp_path)


def test_a_slot_that_was_given_up(small_wal: Workplace) -> None:
    place = small_wal
    place.query(place.core, THING)
    define(place, "thing")
    results(place)
    place.query(place.core, "delete from thing where id < 5")
    for _ in range(4):
        place.query(
            place.core,
            "create table filler as select repeat(md5(i::text), 9) as a"
            " from generate_series(1, 90000) i; drop table filler; checkpoint",
        )
    done = place.run("exporter", "load")
    assert done.returncode == 0, done.stderr
    assert "is lost: the source has removed WAL" in done.stderr
    same(place, "thing")


def test_a_source_without_logical_wal(tmp_path: Path) -> None:
    with running_server({"wal_level": "replica", "fsync": "off"}) as server:
        url = server.url("postgres")
        for place in empty_project((url, url), tmp_path):
            place.query(place.core, THING)
            define(place, "thing")
            assert "wal_level = replica, and changes need logical" in refused(place)[1]
            checked = place.run("exporter", "check")
            assert checked.returncode == 1
            assert "changes need logical" in " ".join(checked.stdout.split())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("lsn = 'FF/0'", "was read further than the source has WAL"),
        ("timeline = 77", "is of timeline 77, and the source is on 1"),
    ],
)
def test_a_source_that_went_back_or_failed_over(thing: Workplace, changed: str, said: str) -> None:
    thing.query(thing.analytics, f"update analytics_raw._exporter_slots set {changed}")
    thing.query(thing.core, "delete from thing where id = 1")
    done = thing.run("exporter", "load", "-j", "2")
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    same(thing, "thing")
    thing.query(thing.core, "delete from thing where id = 2")
    results(thing)
    same(thing, "thing")
