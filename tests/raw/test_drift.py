"""The source's columns change between loads; raw tables that were there before."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from exporter.config import Destination
from exporter.errors import DriftError
from exporter.raw import drift
from exporter.source import Column
from tests.conftest import ROOT, Workplace, compare

TABLE = """
- name: thing
  config:
    meta:
      exporter:
        key: Thing
        source: {{table: thing, cursor: {{field: at, id_field: id}}{source}}}
        conflict_columns: [id]{rest}
"""
RAW = "analytics_raw.thing"
CREATE = """
create table thing (id int primary key, v varchar(5), n numeric(6,2), w int, at timestamptz(3)
    default clock_timestamp());
insert into thing (id, v, n, w) select i, 'v' || i, i / 2.0, i from generate_series(1, 100) as i;
"""
INSERT = "insert into thing (id) select 1 + max(id) from thing"


@pytest.fixture
def thing(place: Workplace) -> Workplace:
    define(place)
    place.query(place.core, CREATE)
    place.load()
    return place


def define(place: Workplace, source: str = "", rest: str = "") -> None:
    place.define(TABLE.format(source=source, rest=rest and f"\n        {rest}"))


def refused(place: Workplace) -> str:
    before = place.query(place.analytics, "select * from analytics_raw.thing order by id")
    done = place.run("exporter", "load")
    assert done.returncode == 1
    assert place.query(place.analytics, "select * from analytics_raw.thing order by id") == before
    return done.stderr


def test_new_column_is_added(thing: Workplace) -> None:
    thing.query(thing.analytics, "create view seen as select * from analytics_raw.thing")
    thing.query(thing.core, 'alter table thing add "New""one" jsonb default \'{}\'; ' + INSERT)
    said = thing.run("exporter", "load").stderr
    assert 'new column New"one jsonb' in said
    assert "--full-refresh fills them" in said
    added = 'select count(*) from analytics_raw.thing where "New""one" is not null'
    # the lookback reads all of these young rows again
    thing.load("--full-refresh")
    assert thing.query(thing.analytics, added) == [(101,)]
    compare(thing, "thing", "analytics_raw.thing", 'id, v, n, w, "New""one"')
    assert thing.query(thing.analytics, "select count(*) from seen") == [(101,)]
    assert "new column" not in thing.run("exporter", "load").stderr


def test_wider_types_are_taken_over(thing: Workplace) -> None:
    file = "select pg_relation_filenode('analytics_raw.thing')"
    before = thing.query(thing.analytics, file)
    for change, column, kind in (
        ("alter v type varchar(50)", "v", "character varying(50)"),
        ("alter v type text", "v", "text"),
        ("alter n type numeric(12,2)", "n", "numeric(12,2)"),
        ("alter n type numeric", "n", "numeric"),
        ("alter at type timestamptz", "at", "timestamp with time zone"),
    ):
        thing.query(thing.core, f"alter table thing {change}; {INSERT}")
        thing.query(thing.core, "update thing set v = repeat('x', 40), n = 1.25 where id = 3")
        if "50" in change or kind in ("text", "numeric"):
            assert f"column {column} widened" in thing.run("exporter", "load").stderr
        thing.load()
        assert thing.types(RAW)[column] == kind
        compare(thing, "thing", "analytics_raw.thing", "id, v, n, w, at")
    assert thing.query(thing.analytics, file) == before


@pytest.mark.parametrize(
    ("change", "says", "advice"),
    [
        ("alter w type text", "is text now, analytics_raw.thing has integer", "type text using"),
        ("alter n type numeric(5,3)", "is numeric(5,3) now", "type numeric(5,3) using"),
    ],
)
def test_what_would_rewrite_is_refused(
    thing: Workplace, change: str, says: str, advice: str
) -> None:
    thing.query(thing.core, f"alter table thing {change}; {INSERT}")
    said = refused(thing)
    assert says in said
    assert advice in said
    statement = said[said.index("alter table") :].splitlines()[0]
    thing.query(thing.analytics, statement)
    thing.load()
    compare(thing, "thing", "analytics_raw.thing", "id, v, n, w, at")


def test_a_wider_type_that_rewrites_a_small_table_is_followed(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "alter table thing alter w type bigint, alter n type numeric(12,5), alter id type bigint;"
        f" insert into thing (id, w, n) values (9876543210, 9876543210, 1.23456); {INSERT}",
    )
    said = thing.run("exporter", "load").stderr
    for change in ("w widened from integer to bigint", "n widened from", "id widened from integer"):
        assert f"column {change}" in said
    assert "raw was written anew in" in said
    compare(thing, "thing", "analytics_raw.thing", "id, v, n, w, at")
    assert thing.types(RAW)["id"] == "bigint"
    assert "widened" not in thing.run("exporter", "load").stderr


def test_a_large_table_is_not_written_anew() -> None:
    target = Destination("Thing", "raw", "thing", ("id",), "upsert", "evolve", "ignore")
    column = Column("w", "bigint", "bigint", "bigint", False, True)
    known: tuple[Any, ...] = (target, [column], ["w"], {"w": "integer"}, {"w": "integer"})
    assert drift.plan(*known, may_rewrite=lambda: True).changes[0].rewrites
    with pytest.raises(DriftError, match="column w was integer") as refusal:
        drift.plan(*known, may_rewrite=lambda: False)
    assert 'alter column "w" type bigint using "w"::bigint' in str(refusal.value.hint)


def test_columns_of_our_own_names_are_refused(place: Workplace) -> None:
    for name in ("_exported_at", "_exporter_beyond"):
        place.query(
            place.core,
            "drop table if exists thing; create table thing (id int primary key,"
            f" at timestamptz default now(), {name} int)",
        )
        define(place)
        done = place.run("exporter", "load")
        assert done.returncode == 1
        assert f"the source has a column {name}" in done.stderr
        assert f"exporter.source.exclude: [{name}]" in done.stderr


def test_identity_and_generated_columns_of_migrations(place: Workplace) -> None:
    define(place)
    place.query(
        place.core,
        "create table thing (id int primary key, at timestamptz not null default now(), w int,"
        " twice int); insert into thing select n, now(), n, 2 * n from generate_series(1, 20) n",
    )
    place.query(
        place.analytics,
        "create schema analytics_raw; create table analytics_raw.thing ("
        " id int generated always as identity primary key, at timestamptz, w int,"
        " twice int generated always as (w * 2) stored, _exported_at timestamptz not null)",
    )
    for _ in range(3):
        place.load("Thing")
        compare(place, "public.thing", "analytics_raw.thing", "id, at, w, twice")
        place.query(place.core, "update thing set w = w + 1, twice = twice + 2, at = now()"
                    " where id < 5; insert into thing (id, w, twice) select max(id) + 1, 1, 2"
                    " from thing")  # fmt: skip
    place.load("Thing", "--full-refresh")
    compare(place, "public.thing", "analytics_raw.thing", "id, at, w, twice")


def test_narrower_types_need_nothing(thing: Workplace) -> None:
    thing.query(
        thing.core, f"alter table thing alter v type varchar(4), alter w type smallint; {INSERT}"
    )
    thing.load()
    compare(thing, "thing", "analytics_raw.thing", "id, v, n, w, at")
    assert thing.types(RAW)["w"] == "integer"


def test_dropped_column_is_kept_and_told_once(thing: Workplace) -> None:
    thing.query(
        thing.core, f"alter table thing drop w; update thing set v = 'x' where id = 1; {INSERT}"
    )
    assert "no column w any more" in thing.run("exporter", "load").stderr
    assert "no column w" not in thing.run("exporter", "load").stderr
    gone = "select count(*) from analytics_raw.thing where w is null"
    assert thing.query(thing.analytics, gone + " and id in (1, 101)") == [(2,)]
    assert "w" in thing.types(RAW)
    thing.query(thing.core, f"alter table thing add w int default 7; {INSERT}")
    thing.load("--full-refresh")
    compare(thing, "thing", "analytics_raw.thing", "id, v, n, w, at")


@pytest.mark.parametrize("change", ["add x int", "alter v type text", "drop w"])
def test_freeze_refuses_every_change(thing: Workplace, change: str) -> None:
    define(thing, rest="schema: freeze")
    thing.load()
    thing.query(thing.core, f"alter table thing {change}; {INSERT}")
    said = refused(thing)
    assert "exporter.schema is freeze" in said
    thing.query(thing.analytics, said[said.index("alter table") :].splitlines()[0])
    thing.load()


def test_view_in_the_way_is_named(thing: Workplace) -> None:
    thing.query(thing.analytics, "create view seen as select v from analytics_raw.thing")
    thing.query(thing.core, f"alter table thing alter v type text; {INSERT}")
    said = refused(thing)
    assert "view public.seen depends on" in said
    assert 'alter column "v" type text' in said


OWNED = """
create schema analytics_raw;
create type colour as enum ('red', 'green');
create table analytics_raw.thing (
    note text default 'mine', id bigint primary key, v colour, n text, w numeric, at timestamptz{}
)
"""


@pytest.mark.parametrize(
    ("freeze", "stamp"),
    [(False, ""), (False, ", _exported_at timestamptz not null"), (True, "")],
)
def test_table_of_a_migration_is_used_as_it_is(place: Workplace, freeze: bool, stamp: str) -> None:
    define(place, rest="schema: freeze" if freeze else "")
    place.query(place.core, CREATE + "update thing set v = 'green'")
    place.query(place.analytics, OWNED.format(stamp))
    done = place.run("exporter", "load")
    assert done.returncode == 0, done.stderr
    compare(place, "thing", "analytics_raw.thing", "id, v::text, n::text, w, at")
    kept = "select count(*) from analytics_raw.thing where note = 'mine'"
    assert place.query(place.analytics, kept) == [(100,)]
    assert place.types(RAW)["v"] == "colour"
    assert ("_exported_at" in place.types(RAW)) != freeze
    assert ("no model can tell its new rows" in done.stderr) == freeze
    place.query(place.core, "update thing set v = 'red', at = clock_timestamp() where id < 5")
    assert place.load()["rows_written"] == 4


@pytest.fixture
def loader(place: Workplace) -> Iterator[str]:
    """The destination's URL for a role of the loader's own, which may use the schema."""
    name = place.analytics.rpartition("/")[2].partition("?")[0]
    place.query(
        place.analytics,
        f"create role loader_{name} login password 'x'; create schema analytics_raw;"
        f" grant usage, create on schema analytics_raw to loader_{name}",
    )
    parts = {**conninfo_to_dict(place.analytics), "user": f"loader_{name}", "password": "x"}
    yield make_conninfo(**parts)
    place.query(place.analytics, f"drop owned by loader_{name}; drop role loader_{name}")


def test_table_of_another_owner(place: Workplace, loader: str) -> None:
    define(place)
    place.query(place.core, CREATE + "update thing set v = 'green'")
    place.query(place.analytics, OWNED.replace("create schema analytics_raw;", "").format(""))
    role = conninfo_to_dict(loader)["user"]
    place.query(place.analytics, f"grant all on analytics_raw.thing to {role}")
    changed = "alter table thing add x int default 1; update thing set at = clock_timestamp()"
    for change, column in (("select 1", "_exported_at"), (changed, "x")):
        place.query(place.core, change)
        done = place.run("exporter", "load", DATABASE_URL_ANALYTICS=loader)
        assert done.returncode == 1
        assert "must be owner of table thing" in done.stderr
        statement = re.search(r'alter table "analytics_raw"[^;\n]*', done.stderr)
        assert statement
        assert column in statement[0]
        place.query(place.analytics, statement[0])
        assert place.load(DATABASE_URL_ANALYTICS=loader)["rows_read"] == 100
    compare(place, "thing", "analytics_raw.thing", "id, v::text, n::text, w, at, x")


def test_dropped_column_of_a_type_that_the_source_lacks(place: Workplace) -> None:
    define(place)
    place.query(place.core, CREATE + "update thing set v = 'green'")
    place.query(place.analytics, OWNED.format(""))
    place.load()
    place.query(place.core, "alter table thing drop v; update thing set n = 3 where id = 1")
    place.load()
    lost = "select id from analytics_raw.thing where v is null"
    assert place.query(place.analytics, lost) == [(1,)]


def test_expressions_are_computed_by_the_source(place: Workplace) -> None:
    columns = ", columns: [id, n, {name: v, expression: \"md5('salt' || v)\"}, "
    columns += "{name: double, expression: 'w::bigint * 2'}]"
    define(place, columns)
    place.query(place.core, CREATE)
    place.load()
    assert list(place.types(RAW)) == ["id", "v", "n", "double", "_exported_at"]
    assert place.types(RAW)["double"] == "bigint"
    hashed = "select id, md5('salt' || v) as v, n, w::bigint * 2 as double from thing"
    compare(place, f"({hashed}) as hashed", "analytics_raw.thing", "id, v, n, double")
    place.query(place.core, "update thing set v = 'z', at = clock_timestamp() where id = 1")
    assert place.load()["rows_written"] == 1
    compare(place, f"({hashed}) as hashed", "analytics_raw.thing", "id, v, n, double")


def test_excluded_columns_do_not_leave(place: Workplace) -> None:
    define(place, ", exclude: [v, w]")
    place.query(place.core, CREATE)
    place.load()
    assert list(place.types(RAW)) == ["id", "n", "at", "_exported_at"]


WRONG: dict[str, tuple[str, str]] = {
    "exclude": (", exclude: [vv]", "exporter.source.exclude names vv"),
    "key": (", exclude: [id]", "conflict_columns names id, which source.columns leaves out"),
    "syntax": (", columns: [id, {name: x, expression: lower(v}]", "the expression of x: syntax"),
    "column": (", columns: [id, {name: x, expression: lower(vv)}]", 'of x: column "vv" does not'),
    "shape": (", columns: [id, {nam: x}]", "must be names, or mappings with name and expression"),
    "cursor": (", columns: [id, {name: at, expression: now()}]", "which is read as the cursor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_columns_are_refused(place: Workplace, name: str) -> None:
    source, said = WRONG[name]
    define(place, source)
    place.query(place.core, CREATE)
    done = place.run("exporter", "load")
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


SOURCES = {
    "table": "",
    "view": "alter table thing rename to hidden; create view thing as select * from hidden",
    "materialized view": "alter table thing rename to hidden;"
    " create materialized view thing as select * from hidden",
}
CHANGES = {
    "table": "alter table thing add x int",
    "view": "alter table hidden add x int",
    "materialized view": "alter materialized view thing rename w to x",
}


def wait_for_lock(place: Workplace, url: str) -> None:
    """Wait until a load waits for somebody's lock."""
    found = "select count(*) from pg_stat_activity where application_name = 'dbt-exporter'"
    found += " and wait_event_type = 'Lock' and datname = current_database()"
    deadline = time.monotonic() + 30
    while place.query(url, found) == [(0,)]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_load(place: Workplace, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "exporter", "load", *words],
        cwd=place.folder,
        env={**place.environment, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("source", SOURCES)
def test_source_cannot_change_within_a_load(thing: Workplace, source: str) -> None:
    thing.query(thing.core, SOURCES[source] or "select 1")
    with psycopg.connect(thing.analytics) as holder:
        holder.execute("lock table analytics_raw.thing in access exclusive mode")
        load = start_load(thing, "--full-refresh")
        wait_for_lock(thing, thing.analytics)
        with pytest.raises(psycopg.errors.LockNotAvailable):
            thing.query(thing.core, f"set lock_timeout = 200; {CHANGES[source]}")
    assert load.wait(60) == 0
    thing.query(thing.core, CHANGES[source])
    assert thing.run("exporter", "load").returncode == 0


def test_source_that_is_being_filled_anew_is_not_taken_for_empty(thing: Workplace) -> None:
    rows = thing.query(thing.analytics, "select count(*) from analytics_raw.thing")
    with psycopg.connect(thing.core) as other:  # a snapshot from before its commit sees no row
        other.execute("create temp table kept as select * from thing")
        other.execute("truncate thing")
        other.execute("insert into thing select * from kept")
        load = start_load(thing, "--full-refresh")
        wait_for_lock(thing, thing.core)
    assert load.wait(60) == 0
    assert thing.query(thing.analytics, "select count(*) from analytics_raw.thing") == rows
    assert rows != [(0,)]


MODELS = {
    "stg_thing": "{{ config(materialized='view') }}\n"
    "select id, n, at, _exported_at from {{ source('analytics_raw', 'thing') }}",
    "things": "{{ config(materialized='incremental', incremental_strategy='upsert',"
    " unique_key='id', on_schema_change='sync_all_columns') }}\n"
    "select * from {{ source('analytics_raw', 'thing') }}"
    "{% if is_incremental() %} where {{ new_rows() }} {% endif %}",
}


@pytest.mark.long
def test_models_follow_each_kind_of_drift(bare: Workplace) -> None:
    """One life of loads, with a `dbt run` behind each change of the source."""
    define(bare)
    for name, text in MODELS.items():
        (bare.folder / "models" / f"{name}.sql").write_text(text)
    bare.query(bare.core, CREATE)

    def models_follow(columns: str) -> None:
        bare.dbt("run", "--quiet", "-s", *MODELS)
        compare(bare, "public.thing", "public.things", columns)
        assert bare.types("public.things") == bare.types(RAW)
        rows = "select count(*) from {}"
        seen = bare.query(bare.analytics, rows.format("public.stg_thing"))
        assert seen == bare.query(bare.analytics, rows.format("analytics_raw.thing"))

    bare.load()
    models_follow("id, v, n, w, at")

    # new: the models get the column at once, its older values with a full refresh
    bare.query(bare.core, "alter table thing add late int default 7; " + INSERT)
    bare.load()
    bare.load("--full-refresh")
    models_follow("id, v, n, w, at, late")

    # widened
    bare.query(bare.core, "alter table thing alter v type varchar(50);" + INSERT)
    bare.query(
        bare.core,
        "update thing set v = repeat('x', 50), at = clock_timestamp() where id = 3",
    )
    assert "column v widened" in bare.run("exporter", "load").stderr
    models_follow("id, v, n, w, at, late")

    # dropped
    bare.query(
        bare.core,
        "alter table thing drop late; update thing set v = 'd', at = clock_timestamp()"
        " where id = 4; " + INSERT,
    )
    assert "no column late any more" in bare.run("exporter", "load").stderr
    models_follow("id, v, n, w, at")
    lost = bare.query(bare.analytics, "select id from things where late is null order by id")
    assert [row for (row,) in lost] == [4, 103]

    # refused, by what would be rewritten and by a view, and mended with the statements that it says
    bare.query(
        bare.core,
        "alter table thing alter w type bigint, alter n type numeric(12,2);"
        "insert into thing (id, n, w) values (200, 1234567890.5, 9876543210)",
    )
    said = refused(bare)
    assert 'alter column "n"' in said
    statement = re.search(r'alter table "analytics_raw"[^;\n]*', said)
    assert statement
    bare.query(bare.analytics, "drop view public.stg_thing;" + statement[0])
    assert "column w widened from integer to bigint; raw was written anew in" in (
        bare.run("exporter", "load").stderr
    )
    models_follow("id, v, n, w, at")


@pytest.mark.parametrize(
    ("source", "raw", "fits", "does_not"),
    [
        ("numeric", "numeric(10,2)", "19.99", "19.9951"),
        ("numeric(12,4)", "numeric(10,2)", "19.9900", "19.9951"),
        ("numeric", "integer", "19", "19.5"),
        ("double precision", "real", "0.5", "0.1"),
        ("bigint", "integer", "7", "9876543210"),
        ("timestamptz", "timestamptz(0)", "'2026-01-01Z'", "'2026-01-01 00:00:00.5Z'"),
        ("timestamp", "date", "'2026-01-01'", "'2026-01-01 12:00'"),
        ("text", "varchar(3)", "'abc'", "'abcd'"),
    ],
)
def test_what_does_not_fit_is_refused(
    place: Workplace, source: str, raw: str, fits: str, does_not: str
) -> None:
    define(place)
    place.query(
        place.core,
        f"create table thing (id int primary key, at timestamptz default now(), v {source});"
        f"insert into thing (id, v) values (1, {fits}), (2, null)",
    )
    place.query(
        place.analytics,
        "create schema analytics_raw; create table analytics_raw.thing"
        f" (id int primary key, at timestamptz, v {raw}, _exported_at timestamptz)",
    )
    place.load()
    assert place.load()["rows_written"] == 0
    assert place.run("exporter", "verify").returncode == 0
    place.query(place.core, f"insert into thing (id, v) values (3, {does_not}), (4, null)")
    said = refused(place)
    assert "row id=3" in said
    assert does_not.strip("'") not in said.replace("numeric(", "")
    assert place.run("exporter", "verify").returncode == 0, "the row is in flight"
    place.query(place.analytics, f"alter table analytics_raw.thing alter v type {source}")
    place.load()
    compare(place, "public.thing", "analytics_raw.thing", "id, at, v")
