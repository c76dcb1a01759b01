"""Source against raw: every class of difference, seeded by hand; writers; repairs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time

import psycopg
import pytest

from tests.conftest import Workplace, compare, fill
from tests.helpers import every_type
from tests.helpers.tables import ITEM, slow_table
from tests.helpers.verdicts import named, verify

# What changed is found by the cursor alone, not by a scan as well.
BY_CURSOR = ITEM.replace("table: item", "table: item\n          read: cursor")

EVENT = 'public."StatEvent"'
RAW = "analytics_raw.stat_event"
ITEM_RAW = "analytics_raw.item"


def _items(place: Workplace, definition: str = ITEM, rows: int = 20) -> None:
    place.define(definition)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz default now(), v text, w int);"
        f"insert into item select n, now() - interval '1 day', 'v' || n, n"
        f" from generate_series(1, {rows}) n; create index on item (at, id)",
    )
    place.load("Item")


def test_every_class_of_difference_and_its_repair(product: Workplace) -> None:
    fill(product.core, 1, 3000)
    product.load("StatEvent")
    assert verify(product, "StatEvent")["status"] == "equal"
    product.query(product.analytics, f"delete from {RAW} where id = 'evt_000000000007'")
    product.query(
        product.analytics,
        f"update {RAW} set tag = null, status = 'REFUSED' where id = 'evt_000000000008'",
    )
    product.query(
        product.analytics,
        f"update {RAW} set custom_attributes = custom_attributes || '{{\"x\": 1}}'"
        " where id = 'evt_000000000009'",
    )
    product.query(  # the same values in other places
        product.analytics,
        f"update {RAW} set (host, status, click_id) = (click_id, host, status)"
        " where id = 'evt_000000000012' and status is null",
    )
    product.query(
        product.core,
        "delete from \"StatEvent\" where id = 'evt_000000000010';"
        "update \"StatEvent\" set tag = 'new', updated_at = now() at time zone 'UTC'"
        " where id = 'evt_000000000011'",  # the next load lands it
    )
    found = verify(product, "StatEvent", status=1)
    assert named(found) == [
        ("missing", "evt_000000000007", []),
        ("extra", "evt_000000000010", []),
        ("different", "evt_000000000008", ["tag", "status"]),
        ("different", "evt_000000000009", ["custom_attributes"]),
        ("different", "evt_000000000012", ["click_id", "host", "status"]),
        ("in flight", "evt_000000000011", []),
    ]
    assert (found["rows_source"], found["rows_raw"]) == (2999, 2999)
    assert [found[kind] for kind in ("missing", "extra", "different", "in_flight")] == [1, 1, 3, 1]

    said = product.run("exporter", "verify", "StatEvent")
    assert said.returncode == 1
    assert "  different  id=evt_000000000008: tag, status" in said.stdout
    assert "exporter verify StatEvent --repair" in said.stderr
    for secret in ("REFUSED", "mobile", "desktop"):  # keys only
        assert secret not in said.stdout + said.stderr
    assert all(len(line) <= 80 for line in said.stdout.splitlines())

    newest = product.query(product.analytics, f"select max(_exported_at) from {RAW}")
    repaired = verify(product, "StatEvent", "--repair", status=1)  # deletes: ignore
    assert (repaired["landed"], repaired["deleted"], repaired["status"]) == (4, 0, "different")
    assert product.query(
        product.analytics, f"select count(*) from {RAW} where _exported_at > '{newest[0][0]}'"
    ) == [(5,)]  # models see them, the one in flight included
    assert product.query(
        product.analytics,
        "select command, status, rows_written from analytics_raw._exporter_runs"
        " order by id desc limit 1",
    ) == [("verify --repair", "ok", 5)]
    assert named(verify(product, "StatEvent", status=1)) == [("extra", "evt_000000000010", [])]

    sources = product.folder / "models" / "staging" / "_sources.yml"
    text = sources.read_text()
    line = "              conflict_columns: [id]\n"
    sources.write_text(text.replace(line, line + "              deletes: remove\n"))
    assert verify(product, "StatEvent", "--repair")["status"] == "repaired"
    compare(product, EVENT, RAW)
    assert verify(product, "StatEvent")["rows"] == []


def test_a_change_that_no_load_would_see_is_different(place: Workplace) -> None:
    _items(place, BY_CURSOR)
    place.query(place.core, "update item set v = 'silent', w = null where id = 3")
    place.query(place.core, "insert into item values (90, '2020-01-01', 'dated back', 1)")
    assert place.load("Item")["rows_read"] == 0
    found = verify(place, "Item", status=1)
    assert named(found) == [("missing", "90", []), ("different", "3", ["v", "w"])]
    assert verify(place, "Item", "--repair")["status"] == "repaired"
    compare(place, "public.item", ITEM_RAW)
    assert verify(place, "Item")["status"] == "equal"


def test_a_late_commit_is_in_flight(place: Workplace) -> None:
    _items(place)
    with psycopg.connect(place.core) as late:
        late.execute("insert into item (id, v) values (50, 'late')")
        place.query(place.core, "insert into item (id, v) values (51, 'early')")
        place.load("Item")
        assert verify(place, "Item")["status"] == "equal"
        late.commit()
    found = verify(place, "Item")
    assert named(found) == [("in flight", "50", [])]
    assert found["status"] == "equal"
    place.query(place.analytics, f"delete from {ITEM_RAW} where id in (3, 51)")
    assert named(verify(place, "Item", status=1)) == [
        ("missing", "3", []),
        ("in flight", "50", []),
        ("in flight", "51", []),  # written after it: the next load looks at them both
    ]
    place.load("Item")
    assert named(verify(place, "Item", status=1)) == [("missing", "3", [])]


def test_writers_and_loads_beside_it_lose_nothing(product: Workplace) -> None:
    fill(product.core, 1, 30_000)
    product.load("StatEvent")
    until = time.monotonic() + 8
    done = []

    def write(writer: int) -> None:
        number = 0
        with psycopg.connect(product.core) as connection:
            while time.monotonic() < until:
                number += 1
                connection.execute(
                    'insert into "StatEvent" (id, type, source, updated_at) select'
                    f" 'w{writer}_{number}_' || n, 'click', 'api', now() at time zone 'UTC'"
                    " from generate_series(1, 20) n".encode()
                )
                connection.execute(
                    f"update \"StatEvent\" set tag = 'w{number}', updated_at = now() at time zone"
                    f" 'UTC' where id in (select id from \"StatEvent\" where hashtext(id) % 4 ="
                    f" {writer} order by random() limit 20)".encode()
                )
                time.sleep(0.05)
                connection.commit()
        done.append(writer)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for one in threads:
        one.start()
    loader = threading.Thread(target=lambda: [product.load("StatEvent") for _ in range(3)])
    loader.start()
    seen = 0
    while time.monotonic() < until:
        found = verify(product, "StatEvent")
        assert (found["missing"], found["extra"], found["different"]) == (0, 0, 0)
        seen += found["in_flight"]
    loader.join()
    for one in threads:
        one.join()
    assert len(done) == 4
    assert seen
    product.load("StatEvent")
    assert verify(product, "StatEvent")["in_flight"] == 0


def test_a_repair_beside_writers_ends_equal(place: Workplace) -> None:
    _items(place, rows=5000)
    place.query(place.analytics, f"delete from {ITEM_RAW} where id % 7 = 0")
    place.query(place.analytics, f"update {ITEM_RAW} set v = 'x' where id % 11 = 0")
    ended = threading.Event()

    def write() -> None:
        with psycopg.connect(place.core, autocommit=True) as connection:
            while not ended.is_set():
                connection.execute(
                    "update item set w = w + 1, at = clock_timestamp() where id in"
                    " (select id from item order by random() limit 50)"
                )

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert verify(place, "Item", "--repair")["status"] == "repaired"
    finally:
        ended.set()
        writer.join()
    place.load("Item")
    assert verify(place, "Item")["in_flight"] == 0
    compare(place, "public.item", ITEM_RAW)


def test_readers_see_no_half_of_a_repair(place: Workplace) -> None:
    _items(place, ITEM.rstrip() + "\n        deletes: remove\n", rows=20_000)
    place.query(place.analytics, f"delete from {ITEM_RAW} where id <= 1000")
    place.query(place.core, "delete from item where id > 19500")
    counts = set()
    process = subprocess.Popen(
        [sys.executable, "-m", "exporter", "verify", "Item", "--repair"],
        cwd=place.folder,
        env=place.environment,
        stdout=subprocess.PIPE,
    )
    with psycopg.connect(place.analytics, autocommit=True) as reader:
        while process.poll() is None:
            row = reader.execute(f"select count(*) from {ITEM_RAW}".encode()).fetchone()
            counts.add(row[0] if row else None)
            time.sleep(0.005)
    process.communicate()
    assert process.returncode == 0
    assert counts <= {19_000, 19_500}
    compare(place, "public.item", ITEM_RAW)


COMPOSITE = """
- name: item
  config:
    meta:
      exporter:
        key: Item
        source:
          table: Item
          read: cursor
          cursor: {field: At, lookback: 0 seconds}
          columns: [Shop, nr, At, {name: hash, expression: "md5(lower(v)) || nr % 2"}]
        conflict_columns: [Shop, nr]
"""


def test_composite_keys_expressions_and_what_stays_at_the_source(place: Workplace) -> None:
    place.define(COMPOSITE)
    place.query(
        place.core,
        """create type shop as enum ('Ünter ''den'' Linden', 'b,"');
        create table "Item" ("Shop" shop, nr numeric, "At" timestamp, v text,
            unique (nr, "Shop"));
        create index on "Item" ("At");
        insert into "Item" select s, n, timestamp '2026-01-01' + n * interval '1 hour', 'V' || n
        from generate_series(1, 30) n, unnest(enum_range(null::shop)) s""",
    )
    place.load("Item")
    assert verify(place, "Item")["status"] == "equal"
    place.query(place.core, 'update "Item" set v = \'Gone\' where nr = 3 and "Shop" = \'b,"\'')
    place.query(place.core, 'update "Item" set v = lower(v) where nr = 4')  # not in its hash
    place.query(place.analytics, f"delete from {ITEM_RAW} where nr = 5 and \"Shop\" like '%Linden'")
    assert named(verify(place, "Item", status=1)) == [
        ("missing", "Ünter 'den' Linden,5", []),
        ("different", 'b,",3', ["hash"]),
    ]
    assert verify(place, "Item", "--repair")["landed"] == 2
    assert verify(place, "Item")["status"] == "equal"


APPEND = ITEM.replace("        conflict_columns: [id]\n", "")


@pytest.mark.parametrize(
    ("definition", "key"),
    [
        (APPEND, ("at", "id")),
        (APPEND.replace(", id_field: id", ""), ("at",)),
        (APPEND.replace("cursor:", "columns: [id, v]\n          cursor:"), ("id",)),
        (APPEND.replace("cursor:", "columns: [v]\n          cursor:"), ("hash",)),
    ],
)
def test_append_only_logs(place: Workplace, definition: str, key: tuple[str, ...]) -> None:
    place.define(definition)
    place.query(
        place.core,
        "create table item (id int, at timestamptz not null, v text);"
        "insert into item select n, '2026-01-01Z', 'v' || n from generate_series(1, 20) n;"
        "insert into item select n, now(), 'v' || n from generate_series(30, 31) n",  # held back
    )
    place.load("Item")
    found = verify(place, "Item")
    assert {one["kind"] for one in found["rows"]} <= {"in flight"}
    place.query(place.analytics, f"delete from {ITEM_RAW} where v = 'v3'")
    place.query(place.analytics, f"insert into {ITEM_RAW} select * from {ITEM_RAW} where v = 'v5'")
    place.query(place.analytics, f"insert into {ITEM_RAW} select * from {ITEM_RAW} where v = 'v6'")
    found = verify(place, "Item", status=1)
    assert all(tuple(one["key"]) == key for one in found["rows"])
    if key == ("at",):  # one group of 20: one row more than there should be
        assert (found["missing"], found["extra"]) == (0, 1)
    else:
        assert (found["missing"], found["extra"]) == (1, 2)
    said = place.run("exporter", "verify", "Item")
    assert "its rows are told by " + ", ".join(key) in said.stderr
    assert "--full-refresh" in said.stderr
    refused = place.run("exporter", "verify", "Item", "--repair")
    assert refused.returncode == 2
    assert "append-only" in refused.stderr
    time.sleep(0.2)
    place.load("Item", "--full-refresh")
    assert verify(place, "Item")["status"] == "equal"


def test_before_the_first_load(place: Workplace) -> None:
    place.define(ITEM)
    place.query(place.core, "create table item (id int primary key, at timestamptz)")
    done = place.run("exporter", "verify", "Item")
    assert done.returncode == 1
    assert "there is no table analytics_raw.item yet\n  → exporter load Item" in done.stderr
    assert place.query(place.analytics, "select to_regnamespace('analytics_raw')") == [(None,)]


@pytest.mark.parametrize("nulls", ["skip", "load", "error"])
def test_rows_without_a_cursor(place: Workplace, nulls: str) -> None:
    place.define(ITEM.replace("id_field: id", f"id_field: id, nulls: {nulls}"))
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz, v text);"
        "insert into item values (1, '2026-01-01Z', 'a'), (2, '2026-01-01Z', 'b')",
    )
    place.load("Item")
    place.query(place.core, "insert into item values (3, null, 'c')")
    if nulls == "error":
        assert named(verify(place, "Item", status=1)) == [("missing", "3", [])]
        return
    assert verify(place, "Item")["in_flight"] == (1 if nulls == "load" else 0)
    place.load("Item")
    assert verify(place, "Item")["rows_raw"] == (3 if nulls == "load" else 2)
    place.query(place.analytics, f"update {ITEM_RAW} set v = 'x'")
    place.query(place.core, "update item set v = 'y' where id = 3")
    assert verify(place, "Item", "--repair")["status"] == "repaired"
    assert verify(place, "Item")["status"] == "equal"


@pytest.mark.parametrize(
    "source",
    [
        "create view item as select * from base",
        "create materialized view item as select * from base",
        "create table item (like base) partition by range (id);"
        "create table item_1 partition of item for values from (0) to (10);"
        "create table item_2 partition of item for values from (10) to (100);"
        "insert into item select * from base",
    ],
)
def test_views_and_partitioned_tables(place: Workplace, source: str) -> None:
    place.define(ITEM)
    place.query(
        place.core,
        "create table base (id int primary key, at timestamptz, v text);"
        f"insert into base select n, '2026-01-01Z', 'v' from generate_series(1, 30) n; {source}",
    )
    place.load("Item")
    assert verify(place, "Item")["status"] == "equal"
    place.query(place.analytics, f"delete from {ITEM_RAW} where id = 3")
    place.query(place.analytics, f"update {ITEM_RAW} set v = null where id = 13")
    assert named(verify(place, "Item", status=1)) == [
        ("missing", "3", []),
        ("different", "13", ["v"]),
    ]
    assert verify(place, "Item", "--repair")["status"] == "repaired"
    assert verify(place, "Item")["status"] == "equal"


def test_rows_that_share_a_key_are_not_equal(place: Workplace) -> None:
    place.define(BY_CURSOR.replace("conflict_columns: [id]", "conflict_columns: [k]"))
    place.query(
        place.core,
        "create table item (id int primary key, k int not null, at timestamptz, v text);"
        "create index on item (at, id);"
        "insert into item select n, n, timestamptz '2026-01-01Z' + n * interval '1 hour', 'v'"
        " from generate_series(1, 20) n",
    )
    place.load("Item")
    assert verify(place, "Item")["status"] == "equal"
    place.query(place.core, "insert into item values (21, 5, '2025-01-01Z', 'w')")
    found = verify(place, "Item", status=1)
    assert (found["rows_source"], found["rows_raw"]) == (21, 20)
    assert named(found) == [("missing", "5", [])]


def test_a_raw_table_of_migrations_keeps_its_types(place: Workplace) -> None:
    place.define(ITEM)
    place.query(
        place.core,
        "create type mood as enum ('sad', 'ok'); create table item (id int primary key,"
        " at timestamp, flag boolean, m mood, n numeric, c char(5), t timestamp, a text[]);"
        "insert into item select n, '2026-01-01', n % 2 = 0, 'ok', n / 2.0, 'c',"
        " date_trunc('second', now()), '{a,NULL}'"
        " from generate_series(1, 40) n",
    )
    place.query(
        place.analytics,
        "create schema analytics_raw; create type mood as enum ('ok', 'sad');"
        f"create table {ITEM_RAW} (id bigint primary key, at timestamptz, flag text, m mood,"
        " n numeric(10, 1), c text, t timestamptz(0), a varchar(9)[],"
        " _exported_at timestamptz not null)",
    )
    place.load("Item")
    assert verify(place, "Item")["status"] == "equal"
    place.query(place.analytics, f"update {ITEM_RAW} set m = 'sad', flag = null where id = 7")
    assert named(verify(place, "Item", status=1)) == [("different", "7", ["flag", "m"])]
    assert verify(place, "Item", "--repair")["status"] == "repaired"


def test_columns_that_came_and_went(place: Workplace) -> None:
    _items(place)
    place.query(place.core, "alter table item drop column w, add column x int default 7")
    done = place.run("exporter", "verify", "Item")
    assert done.returncode == 0, done.stdout
    assert "raw does not have x yet" in done.stderr
    place.load("Item")
    found = verify(place, "Item", status=1)  # rows that landed before have NULL in it
    assert (found["different"], found["rows"][0]["columns"]) == (20, ["x"])
    assert verify(place, "Item", "--repair")["landed"] == 20
    assert verify(place, "Item")["status"] == "equal"
    assert place.query(place.analytics, f"select count(w) from {ITEM_RAW}") == [(0,)]
    place.query(place.core, "alter table item add column y int default 8")
    place.query(place.analytics, f"delete from {ITEM_RAW} where id = 3")
    assert verify(place, "Item", "--repair")["landed"] == 20  # y is compared once raw has it
    assert verify(place, "Item")["status"] == "equal"


def test_another_encoding(place: Workplace) -> None:
    place.define(ITEM)
    with psycopg.connect(place.core, autocommit=True) as connection:
        name = connection.info.dbname + "_latin"
        connection.execute(
            f"create database {name} encoding latin1 template template0 locale 'C'".encode()
        )
    utf8 = place.core
    place.core = utf8.replace(name.removesuffix("_latin"), name)
    try:
        place.query(
            place.core,
            "create table item (id text primary key, at timestamptz, v text);"
            "insert into item select chr(233) || n, '2026-01-01Z', chr(252) || n"
            " from generate_series(1, 9) n",
        )
        place.load("Item")
        assert verify(place, "Item")["status"] == "equal"
        place.query(place.analytics, f"update {ITEM_RAW} set v = 'ä' where id like '%3'")
        assert named(verify(place, "Item", status=1)) == [("different", "é3", ["v"])]
    finally:
        place.core = utf8
        place.query(place.core, f"drop database {name} with (force)")


def test_a_running_load_keeps_a_repair_away(place: Workplace) -> None:
    from exporter.config.choice import choose
    from exporter.config.project import definitions
    from exporter.state import position as state

    _items(place)
    place.query(place.analytics, f"delete from {ITEM_RAW} where id = 3")
    with psycopg.connect(place.analytics, autocommit=True) as holder:
        state.lock(holder, choose(definitions(place.folder), ("Item",))[0].destination)  # type: ignore[arg-type]
        assert named(verify(place, "Item", status=1)) == [("missing", "3", [])]  # needs no lock
        assert verify(place, "Item", "--repair", status=3)["status"] == "locked"
    assert verify(place, "Item", "--repair")["status"] == "repaired"


def test_more_than_is_named(place: Workplace) -> None:
    _items(place, rows=301)
    place.query(place.analytics, f"delete from {ITEM_RAW} where id <= 300")
    found = verify(place, "Item", status=1)
    assert (found["missing"], len(found["rows"])) == (300, 100)
    assert "  missing    … and 200 more" in place.run("exporter", "verify", "Item").stdout
    assert verify(place, "Item", "--repair")["landed"] == 300


def test_values_of_every_type_are_compared(place: Workplace) -> None:
    """Equal as they landed; and one NULL in each column is found."""
    columns = every_type.make(place)
    place.define(ITEM.replace("item", "typed").replace("Item", "Typed"))
    place.load()
    assert verify(place)["status"] == "equal"
    filled = [
        name
        for name in columns
        if place.query(place.core, f"select {name} is not null from typed where id = 3")
        == [(True,)]
    ]
    assert len(filled) > 100
    nulls = ", ".join(f"{name} = null" for name in filled)
    place.query(place.analytics, f"update analytics_raw.typed set {nulls} where id = 3")
    found = verify(place, status=1)["rows"]
    assert [one["key"]["id"] for one in found] == ["3"]
    assert len(found[0]["columns"]) == len(filled)


READING = (
    "select count(*) from pg_stat_activity where state = 'active' and query ~ '{}.*pg_sleep'"
    " and application_name = 'dbt-exporter' and datname = current_database()"
)


def _started(place: Workplace, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "exporter", "verify", "Slow", *words],
        cwd=place.folder,
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _until(place: Workplace, process: subprocess.Popen[str], query: str) -> None:
    while place.query(place.core, query) == [(0,)]:
        assert process.poll() is None
        time.sleep(0.02)


def test_raw_and_position_are_of_one_moment(place: Workplace) -> None:
    slow_table(place, 60)
    place.load("Slow")
    place.query(place.analytics, "update analytics_raw.slow set at = at - interval '1 day'")
    process = _started(place, "--json")
    _until(place, process, READING.format("copy"))  # the second look
    place.query(place.analytics, "update analytics_raw.slow set at = at + interval '1 day'")
    assert json.loads(process.communicate()[0])["different"] == 60
    assert verify(place, "Slow")["status"] == "equal"


@pytest.mark.parametrize("words", [(), ("--repair",)])
def test_ctrl_c_ends_it(place: Workplace, words: tuple[str, ...]) -> None:
    slow_table(place, 8)
    place.load("Slow")
    if words:
        place.query(place.analytics, "delete from analytics_raw.slow where id = 3")
    place.query(place.core, "insert into slow select n, now() from generate_series(9, 2000) n")
    process = _started(place, *words)
    _until(place, process, READING.format("select"))
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    told = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert (process.returncode, *told) == (130, "", "exporter: Slow: interrupted\n")
    assert place.query(place.core, READING.format("select")) == [(0,)]
