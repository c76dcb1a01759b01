"""What a position is worth when its tables are no longer what they were."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from exporter.state import Binding, Reading, Source, Worth, judge
from tests.conftest import Workplace, compare

ITEM = """
- name: item
  config:
    meta:
      exporter:
        key: Item
        source: {table: Item, cursor: {field: at, id_field: id}}
        conflict_columns: [id]
"""
LOG = ITEM.replace("        conflict_columns: [id]\n", "").replace(", id_field: id", "")
SCHEMA = """
create table "Item" (id int primary key, at timestamptz not null default clock_timestamp(),
    v text, n bigint);
insert into "Item" select n, now() - interval '1 day' + n * interval '1 second', 'v' || n, n
from generate_series(1, 1000) n
"""


@pytest.fixture
def items(place: Workplace) -> Workplace:
    place.define(ITEM)
    place.query(place.core, SCHEMA)
    place.load()
    return place


def _loads(place: Workplace, *words: str) -> str:
    """Load, find raw equal to the source, and return what was told."""
    done = place.run("exporter", "load", *words)
    assert done.returncode == 0, done.stderr
    compare(place, 'public."Item"', "analytics_raw.item")
    return done.stderr


def _equal_again(place: Workplace) -> None:
    """The load after has nothing to say."""
    assert "exporter:" not in _loads(place)


@pytest.mark.parametrize(
    "loss",
    [
        "drop table analytics_raw.item",
        "truncate analytics_raw.item",
        "delete from analytics_raw.item",
    ],
)
def test_raw_that_is_gone_is_loaded_anew(items: Workplace, loss: str) -> None:
    items.query(items.analytics, loss)
    items.query(items.core, 'insert into "Item" (id) values (1001)')
    assert "the load begins anew" in _loads(items)
    _equal_again(items)


def test_raw_that_is_another_table_is_compared(items: Workplace) -> None:
    items.query(
        items.analytics,
        "alter table analytics_raw.item rename to old;"
        "create table analytics_raw.item as select * from analytics_raw.old where id < 500;"
        "drop table analytics_raw.old",
    )
    assert "raw is another table" in _loads(items)
    _equal_again(items)


def test_a_source_table_that_was_swapped(items: Workplace) -> None:
    items.query(
        items.core,
        'create table next (like "Item" including all); insert into next select id, at, v, n + 1'
        ' from "Item"; alter table "Item" rename to old; alter table next rename to "Item"',
    )
    assert "another table than the one that was read" in _loads(items)
    _equal_again(items)


def test_a_swapped_source_reconciles_where_deletes_are_followed(items: Workplace) -> None:
    items.define(ITEM + "        deletes: remove\n")
    _loads(items)
    items.query(
        items.core,
        'create table next (like "Item" including all); insert into next select * from "Item"'
        ' where id <= 950; drop table "Item"; alter table next rename to "Item"',
    )
    _loads(items)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("field: at", "field: n", "source.cursor.field was at and is n"),
        (", id_field: id", "", "source.cursor.id_field was id and is not set"),
        ("id_field: id", "id_field: id, nulls: load", "source.cursor.nulls was error and is load"),
    ],
)
def test_a_definition_that_reads_otherwise(items: Workplace, old: str, new: str, said: str) -> None:
    items.query(items.core, "insert into \"Item\" values (2000, '2020-01-01', 'old', 1)")
    assert old in ITEM
    items.define(ITEM.replace(old, new))
    assert said in _loads(items)
    _equal_again(items)


@pytest.mark.parametrize("words", [(), ("--full-refresh",)])
def test_another_key(items: Workplace, words: tuple[str, ...]) -> None:
    items.define(ITEM.replace("[id]", "[n, id]"))
    done = items.run("exporter", "load", *words)
    assert done.returncode == 0, done.stderr
    if not words:
        assert "conflict_columns was id and is n, id" in done.stderr
    items.query(
        items.core,
        'alter table "Item" drop constraint "Item_pkey", add primary key (n, id);'
        'insert into "Item" (id, n) values (1, 2000)',
    )
    _loads(items)


def test_a_key_that_raw_does_not_keep(items: Workplace) -> None:
    items.query(items.core, 'update "Item" set n = n % 10, at = now()')
    items.load()
    items.define(ITEM.replace("[id]", "[n]"))
    done = items.run("exporter", "load")
    assert done.returncode == 1
    assert "analytics_raw.item holds rows that share conflict_columns (n)" in done.stderr


def test_a_table_that_another_definition_had_read(items: Workplace) -> None:
    items.query(
        items.core, 'create table other as select id + 5000 as id, at, v, n from "Item" limit 101'
    )
    items.define(ITEM.replace("table: Item", "table: other"))
    done = items.run("exporter", "load")
    assert done.returncode == 0
    assert "another table" in done.stderr
    found = items.query(items.analytics, "select count(*) from analytics_raw.item where id > 5000")
    assert found == [(101,)]


def test_two_raw_schemas_of_one_key_have_positions_of_their_own(items: Workplace) -> None:
    schema = "{{ env_var('RAW_SCHEMA', 'analytics_raw') }}"
    file = items.folder / "models" / "sources.yml"
    file.write_text(
        file.read_text().replace("    tables:", f'    schema: "{schema}"\n    tables:', 1)
    )
    done = items.run("exporter", "load", RAW_SCHEMA="second")
    assert done.returncode == 0, done.stderr
    items.query(items.core, 'insert into "Item" (id) values (1001)')
    assert items.run("exporter", "load", RAW_SCHEMA="second").returncode == 0
    compare(items, 'public."Item"', "second.item")
    _loads(items)


def test_a_log_goes_on_under_another_key_and_after_it_was_emptied(place: Workplace) -> None:
    place.define(LOG)
    place.query(place.core, SCHEMA)
    place.load()
    place.define(LOG.replace("key: Item", "key: Other"))
    assert _loads(place) == ""
    place.query(place.analytics, "truncate analytics_raw.item")
    place.query(
        place.core, "insert into \"Item\" (id, at) values (1001, now() - interval '1 second')"
    )
    done = place.run("exporter", "load")
    assert done.returncode == 0
    assert "raw has no row" in done.stderr
    assert place.query(place.analytics, "select id from analytics_raw.item") == [(1001,)]


def test_a_log_is_never_read_twice(place: Workplace) -> None:
    place.define(LOG)
    place.query(place.core, SCHEMA)
    place.load()
    place.query(
        place.core,
        'create table next (like "Item" including all); insert into next select * from "Item";'
        'drop table "Item"; alter table next rename to "Item"',
    )
    done = place.run("exporter", "load")
    assert done.returncode == 1
    assert "another table" in done.stderr
    assert "state adopt Item" in done.stderr
    assert place.run("exporter", "state", "adopt", "Item").returncode == 0
    assert "exporter:" not in _loads(place)


def test_another_database_is_refused_until_it_is_adopted(items: Workplace) -> None:
    other = items.core.rpartition("/")[2].partition("?")[0] + "_moved"
    with psycopg.connect(items.analytics, autocommit=True) as connection:
        connection.execute(f"create database {other}".encode())
    moved = items.core.replace(other.removesuffix("_moved"), other)
    try:
        items.query(moved, SCHEMA)
        items.query(moved, 'insert into "Item" (id) values (1001)')
        items.core, before = moved, items.core
        for words in ((), ("--dry-run",), ("--since", "2020-01-01")):
            done = items.run("exporter", "load", "Item", *words)
            assert done.returncode == 1, done.stderr
            assert "state adopt Item" in done.stderr
        assert "--full-refresh" in done.stderr
        assert items.query(items.analytics, "select count(*) from analytics_raw.item") == [(1000,)]
        assert items.run("exporter", "state", "adopt", "Item").returncode == 0
        items.load("Item")
        new = "select count(*) from analytics_raw.item where id = 1001"
        assert items.query(items.analytics, new) == [(1,)]
        items.core = before
        assert items.run("exporter", "load", "Item").returncode == 1
        assert items.run("exporter", "load", "--full-refresh", "Item").returncode == 0
        compare(items, 'public."Item"', "analytics_raw.item")
    finally:
        with psycopg.connect(items.analytics, autocommit=True) as connection:
            connection.execute(f"drop database {other} with (force)".encode())


def test_numbers_that_began_anew(place: Workplace) -> None:
    place.define(
        ITEM.replace("cursor: {field: at, id_field: id}", "read: cursor, cursor: {field: id}")
    )
    place.query(
        place.core,
        SCHEMA + ';create sequence s owned by "Item".id;'
        " alter table \"Item\" alter id set default nextval('s')",
    )
    place.load()
    place.query(
        place.core,
        'truncate "Item" restart identity;'
        "insert into \"Item\" (v) select 'new' || n from generate_series(1, 50) n",
    )
    done = place.run("exporter", "load")
    assert done.returncode == 0
    assert "lies behind the position" in done.stderr
    new = "select count(*) from analytics_raw.item where v like 'new%'"
    assert place.query(place.analytics, new) == [(50,)]
    place.query(place.core, "insert into \"Item\" (v) values ('new again')")
    assert "exporter:" not in place.run("exporter", "load").stderr
    assert place.query(place.analytics, new) == [(51,)]


def test_a_partition_with_old_rows_is_attached(place: Workplace) -> None:
    place.define(ITEM.replace("[id]", "[id, at]"))
    place.query(
        place.core,
        'create table "Item" (id int, at timestamptz, v text, primary key (id, at))'
        " partition by range (at);"
        "create table y26 partition of \"Item\" for values from ('2026-01-01') to ('2027-01-01');"
        "insert into \"Item\" select n, '2026-06-01', 'v' from generate_series(1, 100) n",
    )
    _loads(place)
    place.query(
        place.core,
        "create table y24 (like y26 including all);"
        "insert into y24 select n, '2024-06-01', 'v' from generate_series(1, 10) n;"
        'alter table "Item" attach partition y24'
        " for values from ('2024-01-01') to ('2025-01-01');"
        "create table y27 partition of \"Item\" for values from ('2027-01-01') to ('2028-01-01')",
    )
    assert "new partition" in _loads(place)
    _equal_again(place)


def test_an_expression_that_changed_is_told(items: Workplace) -> None:
    one = "cursor: {field: at, id_field: id}, columns: [id, at, {name: v, expression: upper(v)}]"
    two = one.replace("upper", "lower")
    items.define(ITEM.replace("cursor: {field: at, id_field: id}", one))
    items.run("exporter", "load", "--full-refresh", "Item")
    items.define(ITEM.replace("cursor: {field: at, id_field: id}", two))
    done = items.run("exporter", "load")
    assert done.returncode == 0
    assert "the expression of v has changed" in done.stderr
    assert "--full-refresh" in done.stderr


def test_a_state_of_the_first_edition_is_taken_over(items: Workplace) -> None:
    items.query(
        items.analytics,
        "alter table analytics_raw._exporter_state drop column relation, drop column binding,"
        " drop column sweep, drop column slot,"
        " add primary key (key)",
    )
    items.query(items.core, 'insert into "Item" (id) values (1001)')
    assert _loads(items) == ""
    found = items.query(
        items.analytics, "select relation, key, binding->'raw' from analytics_raw._exporter_state"
    )
    assert [row[:2] for row in found] == [("analytics_raw.item", "Item")]
    assert found[0][2] > 0


SOURCE = Source("1", "5/core", 1, 1000, 500, False, "2026-01-01 00:00:00+00", "public.item", 7, ())
READING = Reading("cursor", "at", "id", "error", {"id": ""}, ("id",))


@pytest.mark.parametrize(
    ("changed", "worth", "said"),
    [
        ({}, Worth.ONWARD, ""),
        ({"lsn": 2000, "next_xid": 600}, Worth.ONWARD, ""),
        ({"timeline": 2}, Worth.REREAD, "the source is on timeline 2, and was on 1"),
        ({"lsn": 900}, Worth.REREAD, "it has lost commits"),
        ({"next_xid": 400}, Worth.REREAD, "it has lost commits"),
        ({"lsn": 900, "next_xid": 400, "standby": True}, Worth.ONWARD, ""),  # it lags
        ({"cluster": None, "timeline": None, "lsn": None}, Worth.ONWARD, ""),  # may not ask
        ({"clock": "2025-12-31 23:00:00+00"}, Worth.SWEEP, "the source's clock went back"),
    ],
)
def test_a_source_that_was_restored_or_failed_over(
    changed: dict[str, Any], worth: Worth, said: str
) -> None:
    before = Binding(SOURCE, 9, READING)
    found = judge(before, before._replace(source=SOURCE._replace(**changed)), raw_is_empty=False)
    assert found.worth is worth
    assert said in found.reason
