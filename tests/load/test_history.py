"""Tables of which every version is kept: raw replayed to a moment is what the source was then."""

from __future__ import annotations

import psycopg
import pytest

from tests.conftest import Workplace
from tests.helpers.changes import refused, results, same, slots, start_receiver
from tests.helpers.history import declared, define, replayed, versions
from tests.helpers.processes import start_load

THING = """
create table thing (id int primary key, a text, big text, n numeric(9,3));
alter table thing alter big set storage external;
insert into thing select i, 'a' || i, repeat(md5(i::text), 400), i / 7.0
from generate_series(1, 20) i;
"""


@pytest.fixture
def thing(place: Workplace) -> Workplace:
    """A table whose copy is made."""
    place.query(place.core, THING)
    define(place, "thing")
    assert results(place)["thing"]["rows_written"] == 20
    replayed(place, "thing")
    return place


def test_every_version_is_there_in_its_order(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "begin; insert into thing values (101, 'new'); update thing set a = 'newer' where id = 101;"
        "commit; update thing set id = 102 where id = 101; delete from thing where id = 102;"
        "insert into thing values (101, 'again')",
    )
    found = results(thing)["thing"]
    assert (found["rows_read"], found["rows_written"], found["rows_deleted"]) == (4, 4, 2)
    assert versions(thing, "thing", "id in (101, 102)", "id, a, _op") == [
        (101, "new", "insert"),
        (101, "newer", "update"),
        (101, None, "delete"),
        (102, "newer", "update"),
        (102, None, "delete"),
        (101, "again", "insert"),
    ]
    replayed(thing, "thing")


def test_what_is_stored_apart_is_in_every_version(thing: Workplace) -> None:
    for statement in (
        "update thing set a = 'twice' where id = 1; update thing set a = 'thrice' where id = 1",
        "update thing set id = 201 where id = 2; update thing set id = 202 where id = 201",
        "update thing set big = 'small' where id = 3; update thing set a = 'x' where id = 3",
        # a swap, by way of a third
        "update thing set id = -1 where id = 4; update thing set id = 4 where id = 5;"
        "update thing set id = 5 where id = -1; update thing set a = 'swapped' where id in (4, 5)",
    ):
        thing.query(thing.core, f"begin; {statement}; commit")
        thing.query(thing.core, statement.replace("'x'", "'y'"))
    results(thing)
    replayed(thing, "thing")
    thing.query(thing.core, "update thing set a = 'later' where id in (1, 202, 3, 4, 5)")
    results(thing)
    replayed(thing, "thing")
    lengths = (
        "select distinct length(big) from analytics_raw.thing where _op <> 'delete' and id <> 3"
    )
    assert thing.query(thing.analytics, lengths) == [(12800,)]
    big = "select big from analytics_raw.thing where id = 4 and _op <> 'delete' order by _lsn, _seq"
    four, five = (f"repeat(md5('{i}'), 400)" for i in (4, 5))
    whose = f"select array_agg(case big when {four} then 4 when {five} then 5 end) from ({big}) b"
    assert thing.query(thing.analytics, whose) == [([4, 5, 5, 4, 4, 4],)]


def test_a_replica_identity_that_is_full(place: Workplace) -> None:
    place.query(place.core, THING + "alter table thing replica identity full")
    define(place, "thing")
    results(place)
    place.query(
        place.core,
        "update thing set a = 'b' where id = 1; delete from thing where id = 1;"
        "update thing set id = 102 where id = 2",
    )
    results(place)
    replayed(place, "thing")
    found = versions(place, "thing", "id in (1, 2, 102)", "id, a, _op, length(big)")
    assert found[2:] == [
        (1, "b", "update", 12800),
        (1, "b", "delete", 12800),
        (2, "a2", "delete", 12800),
        (102, "a2", "update", 12800),
    ]


def test_a_transaction_larger_than_a_chunk_lands_at_once(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "begin; insert into thing select i, 'n', repeat(md5(i::text), 50)"
        " from generate_series(1000, 9000) i;"
        "update thing set a = 'later';"
        "update thing set id = id + 100000 where id % 3 = 0;"
        "delete from thing where id % 7 = 0; commit",
    )
    assert results(thing)["thing"]["batches"] == 1
    replayed(thing, "thing")
    one = (
        "select count(distinct _exported_at), count(distinct _lsn), count(distinct _xid),"
        " count(*) - count(distinct _seq), min(_seq) from analytics_raw.thing where _op <> 'copy'"
    )
    assert thing.query(thing.analytics, one) == [(1, 1, 1, 0, 1)]


def test_truncate(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "update thing set a = 'seen' where id = 1; begin; insert into thing values (50, 'a');"
        "truncate thing; insert into thing values (1, 'one'); commit;"
        "update thing set a = 'two' where id = 1; truncate thing; insert into thing values (9)",
    )
    done = thing.run("exporter", "load")
    assert done.returncode == 0, done.stderr
    assert "copy" not in done.stderr  # nothing has to be
    replayed(thing, "thing")
    of_one = versions(thing, "thing", "id = 1", "a, _op")
    assert of_one == [
        ("a1", "copy"),
        ("seen", "update"),
        (None, "delete"),
        ("one", "insert"),
        ("two", "update"),
        (None, "delete"),
    ]
    assert len(versions(thing, "thing", "id = 50")) == 2
    assert results(thing)["thing"]["rows_read"] == 0


def test_a_table_that_is_written_anew(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "update thing set a = 'seen' where id = 1;"
        "alter table thing alter a type text using 'twice ' || a",
    )
    done = thing.run("exporter", "load")
    assert done.returncode == 0, done.stderr
    assert "was written anew" in done.stderr
    assert "its history misses" in done.stderr
    replayed(thing, "thing")
    assert versions(thing, "thing", "id = 1", "a, _op") == [
        ("a1", "copy"),
        ("seen", "update"),  # committed before, it is not missed
        ("twice seen", "copy"),
    ]
    thing.query(thing.core, "update thing set n = 1 where id = 2; delete from thing where id = 3")
    thing.query(thing.core, "vacuum full thing")
    results(thing)
    replayed(thing, "thing")
    assert len(versions(thing, "thing", "_op = 'copy'")) == 40  # not a third time


def test_columns_come_and_go(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "update thing set a = 'old shape', n = 5 where id < 5; alter table thing add more int;"
        "update thing set more = id where id between 3 and 8; alter table thing drop n;"
        "update thing set a = 'new shape' where id between 7 and 12;"
        "alter table thing add gone int; update thing set gone = 1 where id = 1;"
        "alter table thing drop gone; insert into thing (id, more) values (500, 1)",
    )
    results(thing)
    replayed(thing, "thing")
    assert versions(thing, "thing", "id = 3", "n::int, more") == [(0, None), (5, None), (5, 3)]
    assert versions(thing, "thing", "id = 8", "n::int, more, a") == [
        (1, None, "a8"),
        (1, 8, "a8"),
        (None, 8, "new shape"),
    ]


def test_a_slot_that_is_gone_leaves_a_gap_that_is_told(thing: Workplace) -> None:
    (name,) = thing.query(
        thing.core, "select slot_name from pg_replication_slots where database = current_database()"
    )[0]
    thing.query(thing.core, f"select pg_drop_replication_slot('{name}')")
    thing.query(thing.core, "update thing set a = 'missed' where id = 2")
    thing.query(thing.core, "delete from thing where id = 1; update thing set a = 'x' where id = 2")
    done = thing.run("exporter", "load")
    assert done.returncode == 0, done.stderr
    assert f"the slot {name} is not at the source any more" in done.stderr
    assert "its history misses but for the last version" in done.stderr
    replayed(thing, "thing")
    assert versions(thing, "thing", "id < 4", "id, a, _op") == [
        *((i, f"a{i}", "copy") for i in (1, 2, 3)),
        (1, None, "delete"),
        (2, "x", "copy"),
    ]
    thing.query(thing.core, "update thing set a = 'on' where id = 2")
    results(thing)
    replayed(thing, "thing")


def test_a_full_refresh_keeps_the_versions(thing: Workplace) -> None:
    thing.query(thing.core, "update thing set a = 'b' where id = 1; delete from thing where id = 2")
    results(thing)
    before = versions(thing, "thing")
    thing.query(thing.core, "update thing set a = 'c' where id = 1")
    for _ in range(2):
        results(thing, "--full-refresh", "thing")
        replayed(thing, "thing")
        after = versions(thing, "thing")
        assert after[: len(before)] == before
        assert [one[1] for one in after[len(before) :]] == ["c"]
    thing.query(thing.core, "update thing set a = 'd' where id = 1")
    results(thing)
    replayed(thing, "thing")


def test_a_second_copy_at_one_position_comes_behind_the_first(thing: Workplace) -> None:
    thing.query(thing.core, "update thing set a = 'b' where id = 1")
    receiver = start_receiver(thing, slots(thing)[0][0])  # the changes cannot land
    try:
        assert "is active" in refused(thing, "--full-refresh", "thing")[1]
    finally:
        receiver.finish()
    assert versions(thing, "thing", "id = 1", "a") == [("a1",), ("b",)]
    thing.query(thing.core, "update thing set a = 'c' where id = 1; delete from thing where id = 2")
    results(thing, "--full-refresh", "thing")
    replayed(thing, "thing")
    first, second = versions(thing, "thing", "id = 1 and a <> 'a1'", "a, _lsn, _seq")
    assert (first[0], second[0]) == ("b", "c")
    assert first[1] == second[1]


def test_what_the_copy_shows_makes_no_version(thing: Workplace) -> None:
    """What an open transaction wrote is in the copy, which waits for it, and in the changes."""
    thing.query(thing.core, "create table other (id int primary key, a text)")
    define(thing, "thing", "other")
    with psycopg.connect(thing.core) as writer:
        writer.execute("insert into other values (1, 'open')")
        process = start_load(thing)
        assert process.stderr
        assert "waits for process" in process.stderr.readline()
        writer.execute("insert into other values (2, 'open still')")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    thing.query(thing.core, "update other set a = 'later'")
    results(thing)
    replayed(thing, "other")
    found = versions(thing, "other", columns="id, _op, a")
    assert found == [
        (1, "copy", "open"),
        (2, "copy", "open still"),
        (1, "update", "later"),
        (2, "update", "later"),
    ]


def test_a_history_that_lacks_a_version(thing: Workplace) -> None:
    thing.query(thing.analytics, "delete from analytics_raw.thing where id = 3")
    thing.query(thing.core, "update thing set a = 'part' where id = 3")
    status, said = refused(thing)
    assert status == 1
    assert "lacks the version before of row id=3" in said
    results(thing, "--full-refresh", "thing")
    replayed(thing, "thing")


def test_a_copy_that_did_not_end_is_made_anew(place: Workplace) -> None:
    """Its half is of another moment: the rest must not be put beside it as if it were of one."""
    place.query(
        place.core,
        THING + "insert into thing select i, 'a', repeat(md5(i::text), 30)"
        " from generate_series(1000, 3000) i; analyze thing",
    )
    define(place, "thing")
    place.query(
        place.analytics,
        "create schema analytics_raw; create table analytics_raw.thing (id int, a text, big text,"
        " n numeric(9,3), _op text, _lsn pg_lsn, _seq bigint, _committed_at timestamptz,"
        " _xid bigint, _exported_at timestamptz, constraint refuses check (id < 2500))",
    )
    done = place.run("exporter", "load", BATCH_SIZE="200")
    assert done.returncode == 1, done.stderr
    by_ranges = "select current_setting('server_version_num')::int >= 140000"
    if place.query(place.core, by_ranges) == [(True,)]:  # else it is one transaction
        assert len(versions(place, "thing", "id = 5")) == 1
    place.query(place.analytics, "alter table analytics_raw.thing drop constraint refuses")
    place.query(place.core, "update thing set a = 'between'; delete from thing where id = 5")
    results(place)
    replayed(place, "thing")
    place.query(place.core, "update thing set a = 'later' where id = 7")
    results(place)
    replayed(place, "thing")
    of_one = versions(place, "thing", "id = 7", "a, _op")[-2:]
    assert of_one == [("between", "copy"), ("later", "update")]


def test_a_mirror_and_a_history_of_one_table(place: Workplace) -> None:
    place.query(place.core, THING)
    both = [declared("thing", ""), declared("thing_history", "mode: history", "thing")]
    place.define(*both)
    results(place)
    place.query(
        place.core, "update thing set a = 'b' where id < 5; update thing set a = 'c' where id = 1"
    )
    results(place)
    same(place, "thing")  # the mirror is not copied anew
    replayed(place, "thing_history", "thing")
    place.query(place.core, "truncate thing; insert into thing values (1, 'one'), (2, 'two')")
    place.query(place.core, "update thing set a = 'd' where id = 1; delete from thing where id = 2")
    results(place)
    same(place, "thing")
    replayed(place, "thing_history", "thing")
    of_one = versions(place, "thing_history", "id = 1", "a")
    assert of_one == [("a1",), ("b",), ("c",), (None,), ("one",), ("d",)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("mode: history\n        deletes: mark", "deletes has no place with mode: history"),
        ("mode: history\n        conflict_columns: [a]", "replica identity of public.thing"),
    ],
)
def test_what_a_history_does_not_have(place: Workplace, more: str, said: str) -> None:
    place.query(place.core, THING)
    define(place, "thing", thing=more)
    assert said in refused(place)[1]


def test_a_history_needs_the_changes(place: Workplace) -> None:
    place.query(place.core, THING)
    place.define(declared("thing", "mode: history").replace("read: changes", "read: scan"))
    assert "mode can be history with source.read: changes alone" in refused(place)[1]


def test_names_that_are_taken(place: Workplace) -> None:
    place.query(place.core, "create table thing (id int primary key, _op text)")
    define(place, "thing")
    assert "a column _op, a name that exporter.mode: history needs" in refused(place)[1]


def test_raw_of_another_kind(thing: Workplace) -> None:
    define(thing, "thing", thing="")
    assert "has the versions of rows: it is a history" in refused(thing)[1]
    thing.query(thing.analytics, "drop table analytics_raw.thing")
    results(thing)
    define(thing, "thing")
    assert "it is no history, and exporter.mode is history" in refused(thing)[1]


def test_other_keys(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "alter table thing alter a set not null; create unique index other on thing (a);"
        "alter table thing replica identity full",
    )
    define(thing, "thing", thing="mode: history\n        conflict_columns: [a]")
    assert "are those of id, and conflict_columns is a" in refused(thing)[1]


def test_a_source_whose_wal_lies_behind(thing: Workplace) -> None:
    thing.query(thing.analytics, "update analytics_raw.thing set _lsn = 'FFF/0' where id = 1")
    thing.query(thing.analytics, "update analytics_raw._exporter_slots set lsn = 'FF/0'")
    assert "has versions up to FFF/0 of the WAL" in refused(thing)[1]


def test_commands_know_of_histories(thing: Workplace) -> None:
    thing.query(thing.core, "update thing set a = 'b' where id = 1; delete from thing where id = 2")
    pending = thing.run("exporter", "verify")
    assert pending.returncode in (0, 1), pending.stderr
    results(thing)
    for words in (("verify",), ("status",), ("check",), ("state", "show"), ("load", "--dry-run")):
        done = thing.run("exporter", *words)
        assert done.returncode == 0, done.stdout + done.stderr
    thing.query(thing.analytics, "update analytics_raw.thing set a = 'wrong' where id = 7")
    done = thing.run("exporter", "verify")
    assert done.returncode == 1
    assert "exporter load thing --full-refresh makes it so" in done.stderr
    assert thing.run("exporter", "verify", "--repair", "thing").returncode == 2
    results(thing, "--full-refresh", "thing")
    assert thing.run("exporter", "verify").returncode == 0
    assert thing.run("exporter", "state", "reset", "thing").returncode == 0
    results(thing)
    assert len(versions(thing, "thing", "id = 7")) == 2


def test_histories_beside_mirrors_by_several_sessions(place: Workplace) -> None:
    for table in ("h1", "m1", "m2"):
        place.query(
            place.core,
            f"create table {table} (id int primary key, a text);"
            f" insert into {table} select i, 'x' from generate_series(1, 500) i",
        )
    place.define(declared("h1", "mode: history"), declared("m1", ""), declared("m2", ""))
    results(place, "-j", "3")
    place.query(place.core, "update h1 set id = id + 1000 where id < 20; update m1 set a = 'b'")
    results(place, "-j", "3")
    same(place, "m1", "m2")
    replayed(place, "h1")
