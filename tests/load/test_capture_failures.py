"""How change capture fails elsewhere, and what would make a load of ours say what is not so."""

from __future__ import annotations

import json
import os
import signal
import time

import psycopg
import pytest

from exporter.wire.replication import lsn_number
from tests.conftest import Workplace, as_role, compare
from tests.helpers.changes import define, refused, results, same, slots
from tests.helpers.history import replayed
from tests.helpers.processes import start_load, until, wait_unlocked
from tests.load.test_changes import start_receiver

THING = """
create table thing (id int primary key, a text, big text);
alter table thing alter big set storage external;
insert into thing select i, 'a' || i, repeat(md5(i::text), 200) from generate_series(1, 100) i;
"""
BACKLOG = """
do $$ begin for i in 1..{0} loop
    insert into thing select 1000 * i + n, 'n', repeat(md5(n::text), 60)
    from generate_series(1, 400) n;
    commit;
end loop; end $$
"""
STORED = "select lsn::text from analytics_raw._exporter_slots"
CONFIRMED = (
    "select confirmed_flush_lsn::text from pg_replication_slots where database = current_database()"
)


@pytest.fixture
def thing(place: Workplace) -> Workplace:
    """A table of 100 rows whose copy is made."""
    place.query(place.core, THING)
    define(place, "thing")
    results(place)
    return place


def _by_ranges(place: Workplace) -> None:
    if place.query(place.core, "select current_setting('server_version_num')::int < 140000")[0][0]:
        pytest.skip("first loads are resumed since PostgreSQL 14")


def number(place: Workplace, url: str, statement: str) -> int:
    """A WAL position that a statement asks for."""
    return lsn_number(place.query(url, statement)[0][0])


# -- what is reported of other tools


def test_a_backlog_is_not_read_again_by_the_load_after_one_that_was_killed(
    thing: Workplace,
) -> None:
    """Progress is kept chunk by chunk; nothing looks at all of it beforehand."""
    thing.query(thing.core, BACKLOG.format(40))
    before = number(thing, thing.core, CONFIRMED)
    process = start_load(thing)
    count = "select count(*) from analytics_raw.thing"
    until(lambda: bool(thing.query(thing.analytics, count)[0][0] > 100))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_unlocked(thing)
    landed = thing.query(thing.analytics, count)[0][0] - 100
    stored = number(thing, thing.analytics, STORED)
    assert stored > before
    found = results(thing)["thing"]
    assert found["rows_read"] == 16_000 - landed
    same(thing, "thing")


def test_a_landing_that_takes_long(thing: Workplace) -> None:
    """The source hears of us, and may forget no more than what is in raw."""
    name = thing.core.rpartition("/")[2].partition("?")[0]
    thing.query(thing.core, f"alter database {name} set wal_sender_timeout = '2s'")
    thing.query(thing.core, BACKLOG.format(40))
    with psycopg.connect(thing.analytics) as blocker:
        blocker.execute("lock table analytics_raw.thing in share mode")
        process = start_load(thing)
        waits = "select count(*) from pg_locks where not granted"
        until(lambda: thing.query(thing.analytics, waits) != [(0,)])
        time.sleep(4)
        stored = number(thing, thing.analytics, STORED)
        assert number(thing, thing.core, CONFIRMED) <= stored
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "connecting again" not in said
    same(thing, "thing")


def test_a_long_silence_is_no_end(thing: Workplace) -> None:
    """The server scans what other tables wrote, and sends nothing: here for 6 seconds more."""
    if os.environ.get("DATABASE_URL_CORE"):
        pytest.skip("stops a process of its own server")
    thing.query(
        thing.core,
        "create table others (id int, a text);"
        "insert into others select i, md5(i::text) from generate_series(1, 300000) i",
    )
    thing.query(thing.core, "delete from thing where id = 1")
    stored = number(thing, thing.analytics, STORED)
    process = start_load(thing)
    sender = "select pid from pg_stat_replication where state in ('catchup', 'streaming')"
    until(lambda: bool(thing.query(thing.core, sender)))
    ((pid,),) = thing.query(thing.core, sender)
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(6)
        assert process.poll() is None
        assert number(thing, thing.analytics, STORED) == stored
    finally:
        os.kill(pid, signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode == 0
    same(thing, "thing")
    assert number(thing, thing.analytics, STORED) > stored + 20_000_000
    until(lambda: number(thing, thing.core, CONFIRMED) > stored + 20_000_000)


def test_a_load_that_ends_at_once_confirms(thing: Workplace) -> None:
    thing.query(thing.core, "update thing set a = 'x' where id = 1")
    results(thing)
    stored = number(thing, thing.analytics, STORED)
    until(lambda: number(thing, thing.core, CONFIRMED) >= stored)


def test_an_altered_publication_has_not_sent_all(thing: Workplace) -> None:
    """It is as it was when a load looks, and was not in between."""
    name = slots(thing)[0][0]
    for away, back in (
        ("drop table thing", "add table thing"),
        ("set (publish = 'insert')", "set (publish = 'insert, update, delete, truncate')"),
    ):
        thing.query(thing.core, f"alter publication {name} {away}")
        thing.query(
            thing.core,
            "update thing set a = a || 'x' where id = 2;"
            "delete from thing where id = (select max(id) from thing)",
        )
        thing.query(thing.core, f"alter publication {name} {back}")
        done = thing.run("exporter", "load")
        assert done.returncode == 0, done.stderr
        assert "was not in the publication" in done.stderr
        same(thing, "thing")
    assert results(thing)["thing"]["rows_read"] == 0


def test_a_publication_that_somebody_dropped(thing: Workplace) -> None:
    name = slots(thing)[0][0]
    drop = f"update thing set a = 'x' where id = 1; drop publication {name};"
    change = "update thing set a = a || 'x' where id = 2; delete from thing where id = {}"
    thing.query(thing.core, drop)
    thing.query(thing.core, change.format(3))
    done = thing.run("exporter", "load")
    assert done.returncode == 0, done.stderr
    assert "has lost its publication" in done.stderr
    same(thing, "thing")
    # and made again by somebody: PostgreSQL reads the changes between as of their time
    name = slots(thing)[0][0]
    thing.query(thing.core, f"drop publication {name}")
    thing.query(thing.core, change.format(4))
    thing.query(
        thing.core,
        f"create publication {name} for table thing with (publish_via_partition_root)",
    )
    done = thing.run("exporter", "load")
    if done.returncode:  # PostgreSQL 18 passes over a publication that was not there
        assert f"exporter slots drop {name}" in done.stderr
        thing.run("exporter", "slots", "drop", name)
        results(thing)
    same(thing, "thing")


@pytest.mark.parametrize(
    "change",
    ["delete from thing where id = 7", "update thing set id = 1000, big = '' where id = 8"],
)
def test_a_replica_identity_that_was_another_one_meanwhile(thing: Workplace, change: str) -> None:
    thing.query(
        thing.core,
        "alter table thing add code int; update thing set code = id;"
        "alter table thing alter code set not null; create unique index by_code on thing (code)",
    )
    results(thing)
    thing.query(
        thing.core,
        "alter table thing replica identity using index by_code;"
        f"{change}; alter table thing replica identity default",
    )
    status, said = refused(thing)
    assert status == 1
    assert "the changes lack id" in said
    results(thing, "--full-refresh", "thing")
    same(thing, "thing")


def test_a_key_that_is_not_unique_any_more(thing: Workplace) -> None:
    define(thing, "thing", thing="conflict_columns: [id]")
    thing.query(
        thing.core,
        "alter table thing replica identity full; alter table thing drop constraint thing_pkey;"
        "insert into thing values (5, 'again')",
    )
    status, said = refused(thing)
    assert status == 1
    assert "id has no unique index there" in said


def test_a_table_that_is_declared_twice(place: Workplace) -> None:
    place.query(place.core, THING)
    define(place, "thing", "copy")
    file = place.folder / "models" / "sources.yml"
    file.write_text(file.read_text().replace("table: copy", "table: thing"))
    results(place)
    place.query(
        place.core, "delete from thing where id < 3; update thing set a = 'new' where id = 4"
    )
    assert [one["rows_deleted"] for one in results(place).values()] == [2, 2]
    for name in ("thing", "copy"):
        compare(place, "public.thing", f"(select id, a, big from analytics_raw.{name}) r")


def test_a_partition_beside_its_table(place: Workplace) -> None:
    place.query(
        place.core,
        "create table part (id int, kind int, primary key (id, kind)) partition by list (kind);"
        "create table part_1 partition of part for values in (1)",
    )
    define(place, "part", "part_1")
    status, said = refused(place)
    assert status == 1
    assert "public.part_1 is a partition of public.part" in said
    assert slots(place) == []


def test_a_first_copy_that_fails_while_others_go_on(place: Workplace) -> None:
    """What the others got meanwhile, it has missed: it does not go on where it stopped."""
    _by_ranges(place)
    place.query(place.core, THING.replace("100", "3000"))
    place.query(place.core, "create table other (id int primary key); analyze thing")
    place.query(
        place.analytics,
        "create schema analytics_raw; create table analytics_raw.thing (id int primary key"
        " check (id <> 2500), a text, big text, _exported_at timestamptz not null)",
    )
    define(place, "thing", "other")
    said = place.run("exporter", "load", BATCH_SIZE="1000").stderr
    assert "violates check constraint" in said
    assert place.query(place.analytics, "select count(*) from analytics_raw.thing")[0][0] > 500
    place.query(place.core, "delete from thing where id < 5")
    assert place.run("exporter", "load", BATCH_SIZE="1000").returncode == 1
    place.query(place.analytics, "alter table analytics_raw.thing drop constraint thing_id_check")
    results(place)
    same(place, "thing")


def test_a_refused_change_is_named_by_its_key(thing: Workplace) -> None:
    thing.query(
        thing.analytics,
        "alter table analytics_raw.thing add check (a <> 'bad'), add unique (a)",
    )
    thing.query(thing.core, BACKLOG.format(1).replace("'n'", "n::text"))
    thing.query(
        thing.core,
        "update thing set a = 'good' where id = 5; update thing set a = 'bad' where id = 77;"
        "insert into thing values (300, 'fine')",
    )
    stored = thing.query(thing.analytics, STORED)
    status, said = refused(thing)
    assert status == 1
    assert "the change of row id=77 is refused: new row for relation" in said
    assert "bad" not in said
    assert thing.query(thing.analytics, STORED) == stored
    assert thing.query(thing.analytics, "select count(*) from analytics_raw.thing") == [(100,)]
    thing.query(thing.analytics, "alter table analytics_raw.thing drop constraint thing_a_check")
    assert results(thing)["thing"]["rows_read"] == 403
    same(thing, "thing")


def test_what_landed_before_a_refused_change_stays(thing: Workplace) -> None:
    thing.query(thing.analytics, "alter table analytics_raw.thing add check (a <> 'bad')")
    thing.query(thing.core, BACKLOG.format(10))
    thing.query(thing.core, "update thing set a = 'bad' where id = 77")
    before = number(thing, thing.analytics, STORED)
    assert "the change of row id=77 is refused" in refused(thing)[1]
    landed = thing.query(thing.analytics, "select count(*) from analytics_raw.thing")[0][0] - 100
    assert 0 < landed < 4000
    assert landed % 400 == 0  # of whole transactions
    assert before < number(thing, thing.analytics, STORED)
    thing.query(thing.analytics, "alter table analytics_raw.thing drop constraint thing_a_check")
    assert results(thing)["thing"]["rows_read"] == 4001 - landed
    same(thing, "thing")


@pytest.mark.parametrize("mode", ["upsert", "history"])
def test_a_character_that_the_destination_lacks(place: Workplace, mode: str) -> None:
    name = place.analytics.rpartition("/")[2].partition("?")[0]
    place.query(place.core, f"drop database {name}")
    latin1 = "encoding 'LATIN1' lc_collate 'C' lc_ctype 'C' template template0"
    place.query(place.core, f"create database {name} {latin1}")
    place.query(place.core, THING)
    define(place, "thing", thing=f"mode: {mode}")
    place.query(place.core, "insert into thing values (0, '\u6f22')")
    status, said = refused(place)  # the first copy, of which ranges are not read once more
    assert status == 1
    assert 'column a: a character of it has no equivalent in encoding "LATIN1"' in said
    assert "0x" not in said
    place.query(place.core, "delete from thing where id = 0")
    results(place)
    place.query(place.core, "insert into thing values (200, 'fine'), (201, '\u6f22')")
    status, said = refused(place)
    assert status == 1
    assert (
        "the change of row id=201, column a is refused: a character of it has no equivalent in"
        ' encoding "LATIN1"'
    ) in said
    assert "0x" not in said
    place.query(place.core, "delete from thing where id = 201")
    if mode == "history":
        assert refused(place)[0] == 1
    else:  # the row has no value any more
        assert results(place)["thing"]["rows_read"] == 1


# -- a copy that would empty raw


def test_a_source_that_lost_its_rows_does_not_empty_raw(thing: Workplace) -> None:
    """A copy that a load makes by itself removes no more than one that was asked for."""
    rows = "select count(*) from analytics_raw.thing"
    (name,) = slots(thing)[0]
    thing.query(thing.core, f"select pg_drop_replication_slot('{name}'); delete from thing")
    for words in ((), ("--full-refresh", "thing"), ()):
        status, said = refused(thing, *words)
        assert status == 1
        assert "100 of the 100 rows of raw (100 %) are gone at the source" in said
        assert "exporter load thing --full-refresh --max-deletes 100" in said
        assert thing.query(thing.analytics, rows) == [(100,)]
    results(thing, "thing", "--full-refresh", "--max-deletes", "100")
    assert thing.query(thing.analytics, rows) == [(0,)]
    thing.query(thing.core, "insert into thing values (1, 'again')")
    results(thing)
    same(thing, "thing")
    thing.query(thing.core, "drop table thing;" + THING)
    results(thing)
    thing.query(
        thing.core,
        "create table new (like thing including all); drop table thing;"
        " alter table new rename to thing",
    )
    assert "(100 %) are gone at the source" in refused(thing)[1]
    assert thing.query(thing.analytics, rows) == [(100,)]


def test_a_refused_refresh_leaves_the_table_as_it_was(thing: Workplace) -> None:
    thing.query(
        thing.analytics,
        "insert into analytics_raw.thing (id, _exported_at)"
        " select -i, now() from generate_series(1, 50) i",
    )
    thing.query(thing.core, "update thing set a = 'x' where id = 1")
    status, said = refused(thing, "thing", "--full-refresh")
    assert status == 1
    assert "50 of the 150 rows of raw (33 %)" in said
    thing.query(thing.core, "update thing set a = 'x' where id = 2; delete from thing where id = 3")
    found = results(thing)["thing"]
    assert (found["rows_read"], found["rows_deleted"]) == (1, 1)
    results(thing, "thing", "--full-refresh", "--max-deletes", "34")
    same(thing, "thing")


def test_what_comes_as_a_change_removes_all(thing: Workplace) -> None:
    thing.query(thing.core, "truncate thing; insert into thing values (1, 'one')")
    results(thing)
    same(thing, "thing")
    thing.query(thing.core, "delete from thing")
    results(thing)
    same(thing, "thing")


def test_readers_see_the_old_rows_until_a_lost_slot_is_made_up_for(thing: Workplace) -> None:
    (name,) = slots(thing)[0]
    thing.query(thing.core, "insert into thing select i, 'more' from generate_series(101, 4000) i")
    thing.query(thing.core, f"select pg_drop_replication_slot('{name}')")
    seen = set()
    process = start_load(thing)
    with psycopg.connect(thing.analytics, autocommit=True) as reader:
        while process.poll() is None:
            seen.update(reader.execute("select count(*) from analytics_raw.thing"))
    process.communicate()
    assert process.returncode == 0
    assert seen <= {(100,), (4000,)}
    same(thing, "thing")


def test_row_security_does_not_hide_rows_from_a_copy(place: Workplace) -> None:
    """It does not hold for what a slot sends: of a table with it, a copy is whole or refused."""
    role = place.core.rpartition("/")[2].partition("?")[0]
    place.query(place.core, THING + f"create role {role} login password 'secret' replication")
    try:
        place.query(
            place.core,
            f"grant create on database {role} to {role}; alter table thing owner to {role};"
            "alter table thing enable row level security; create policy few on thing"
            " using (id < 9)",
        )
        define(place, "thing")
        core = as_role(place.core, role)
        done = place.run("exporter", "load", DATABASE_URL_CORE=core)  # its owner sees all
        assert done.returncode == 0, done.stderr
        same(place, "thing")
        place.query(place.core, "alter table thing force row level security; delete from thing")
        for words in ((), ("--full-refresh", "thing")):
            done = place.run("exporter", "load", *words, DATABASE_URL_CORE=core)
            assert done.returncode == 1
            assert "row security hides rows of public.thing" in done.stderr
        assert place.query(place.analytics, "select count(*) from analytics_raw.thing") == [(100,)]
    finally:
        place.query(place.core, f"drop owned by {role} cascade; drop role {role}")


def test_what_the_slot_still_holds_is_no_difference(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "delete from thing where id < 4;"
        "update thing set id = 1000 + id where id between 10 and 12;"
        "update thing set a = 'x' where id = 20; insert into thing values (200, 'new');"
        "alter table thing drop a; delete from thing where id = 30",
    )
    done = thing.run("exporter", "verify", "--json")
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert (found["in_flight"], found["missing"], found["extra"]) == (11, 0, 0)
    thing.query(thing.analytics, "delete from analytics_raw.thing where id in (2, 50)")
    done = thing.run("exporter", "verify", "--json")
    found = json.loads(done.stdout)
    assert [row["key"] for row in found["rows"] if row["kind"] == "missing"] == [{"id": "50"}]
    assert found["extra"] == 0
    done = thing.run("exporter", "verify", "--repair")
    assert done.returncode == 2
    assert "exporter load thing --full-refresh" in done.stderr
    thing.query(thing.core, "truncate thing")
    assert json.loads(thing.run("exporter", "verify", "--json").stdout)["extra"] == 0
    results(thing)
    assert thing.run("exporter", "verify").returncode == 0


def test_deletes_that_cannot_be_told_from_extra_rows_are_said(thing: Workplace) -> None:
    thing.query(thing.core, "delete from thing where id < 4")
    receiver = start_receiver(thing, slots(thing)[0][0])
    try:
        done = thing.run("exporter", "verify")
        assert done.returncode == 1
        assert "the slot cannot be read now: rows that were deleted" in done.stderr
        assert "3 extra" in done.stdout
    finally:
        receiver.finish()


def test_keys_that_move_while_a_first_copy_is_stopped(place: Workplace) -> None:
    """What such a change keeps of its row, a copy of two moments cannot tell."""
    _by_ranges(place)
    place.query(place.core, THING.replace("100", "3000") + "analyze thing")
    place.query(
        place.analytics,
        "create schema analytics_raw; create table analytics_raw.thing (id int primary key,"
        " a text, big text, _exported_at timestamptz not null);"
        "create function nap() returns trigger language plpgsql as"
        " 'begin perform pg_sleep(100); return new; end';"
        "create trigger nap before insert on analytics_raw.thing for each row"
        " when (new.id = 2500) execute function nap()",
    )
    define(place, "thing")
    process = start_load(place, BATCH_SIZE="1000")
    asleep = "select pid from pg_stat_activity where wait_event = 'PgSleep'"
    until(lambda: bool(place.query(place.analytics, asleep)))
    process.kill()
    process.communicate()
    ((pid,),) = place.query(place.analytics, asleep)
    place.query(place.analytics, f"select pg_terminate_backend({pid})")
    until(lambda: not place.query(place.analytics, asleep))
    place.query(place.analytics, "drop trigger nap on analytics_raw.thing")
    wait_unlocked(place)
    assert place.query(place.analytics, "select count(*) from analytics_raw.thing")[0][0] > 500
    place.query(
        place.core,
        "update thing set id = -1 where id = 1; update thing set id = 1 where id = 2;"
        "update thing set id = 2 where id = -1; delete from thing where id = 3",
    )
    results(place)
    same(place, "thing")


def test_a_table_that_is_emptied_filled_and_written_anew_at_once(thing: Workplace) -> None:
    """The file that it has then is not the one that TRUNCATE gave it."""
    thing.query(
        thing.core,
        "create table old (id int primary key, a text);"
        "insert into old select i, 'a' from generate_series(1, 9) i",
    )
    define(thing, "thing", "old", old="mode: history")
    results(thing)
    for table in ("thing", "old"):
        thing.query(
            thing.core,
            f"begin; truncate {table}; insert into {table} select i, 'b'"
            f" from generate_series(1, 9) i;"
            f"alter table {table} alter a type text using 'twice ' || a; commit",
        )
    results(thing)
    same(thing, "thing")
    replayed(thing, "old")


def test_a_table_that_is_written_anew_while_a_history_follows(thing: Workplace) -> None:
    """Its copy is not of the file that a later look finds."""
    thing.query(
        thing.core,
        "create table old (id int primary key, a text);"
        "insert into old select i, 'a' from generate_series(1, 9) i",
    )
    define(thing, "thing", "old", old="mode: history")
    results(thing)
    thing.query(
        thing.core,
        "update old set a = 'b'; alter table old alter a type text using 'twice ' || a",
    )
    with psycopg.connect(thing.analytics) as blocker:
        blocker.execute("lock table analytics_raw.old in share mode")
        process = start_load(thing)
        waits = "select count(*) from pg_locks where not granted"
        until(lambda: thing.query(thing.analytics, waits) != [(0,)])
        thing.query(thing.core, "alter table thing alter a type text using 'twice ' || a")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    results(thing)
    same(thing, "thing")


def test_a_column_that_comes_while_a_load_copies_another_table(thing: Workplace) -> None:
    """The changes have it, and the table had not when the load looked at it."""
    thing.query(thing.core, "create table other (id int primary key, a text)")
    define(thing, "thing", "other")
    with psycopg.connect(thing.core) as writer:
        writer.execute("insert into other values (1, 'open')")
        process = start_load(thing)
        assert process.stderr
        assert "waits for process" in process.stderr.readline()
        thing.query(
            thing.core,
            "alter table thing add more int; insert into thing (id, more) values (200, 7)",
        )
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    same(thing, "thing", "other")


def test_a_publication_of_all_tables_does_not_tell_who_was_away(thing: Workplace) -> None:
    ((name,),) = set(slots(thing))
    thing.query(thing.core, "create table other (id int primary key, a text)")
    thing.query(thing.core, f"select pg_drop_replication_slot('{name}'); drop publication {name}")
    thing.query(
        thing.core,
        f"create publication {name} for all tables with (publish_via_partition_root)",
    )
    define(thing, "thing", "other")
    results(thing)
    assert set(slots(thing)) == {(name,)}
    define(thing, "thing")
    thing.query(thing.core, "insert into other values (1, 'missed')")
    results(thing)
    define(thing, "thing", "other")
    results(thing)
    same(thing, "thing", "other")


def test_a_table_that_is_written_anew_after_its_copy(place: Workplace) -> None:
    """The load that copied it ends well, and the next one copies it again."""
    place.query(
        place.core,
        THING + "create table thing_2 (id int primary key, a text); insert into thing_2 values (1)",
    )
    place.query(
        place.analytics,
        "create schema analytics_raw; create table analytics_raw.thing_2"
        " (id int primary key, a text, _exported_at timestamptz not null)",
    )
    define(place, "thing", "thing_2")
    with psycopg.connect(place.analytics) as blocker:
        blocker.execute("lock table analytics_raw.thing_2 in share mode")
        process = start_load(place)
        waits = "select count(*) from pg_locks where not granted"
        until(lambda: place.query(place.analytics, waits) != [(0,)])
        assert place.query(place.analytics, "select count(*) from analytics_raw.thing") == [(100,)]
        place.query(place.core, "alter table thing alter a type text using 'twice ' || a")
        place.query(place.core, "delete from thing where id = 1")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert place.query(place.analytics, "select count(*) from analytics_raw.thing") == [(99,)]
    results(place)
    same(place, "thing", "thing_2")
    assert results(place)["thing"]["rows_read"] == 0
