"""What stands in the way at the destination: check foresees it, and the load says it plainly."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Workplace, compare
from tests.helpers.tables import ITEM, forget_everything

RAW = "create schema if not exists analytics_raw; "
STAMP = "_exported_at timestamptz not null default now()"
MADE = f"create table analytics_raw.item (id int, at timestamptz not null, {STAMP}"
PARTITIONED = "create table analytics_raw.item_1 partition of analytics_raw.item default"
# What is there, what is said of it, and what the hint is to have if it is a statement.
IN_THE_WAY = {
    "an extra column": (
        f"{MADE}, site text not null, primary key (id))",
        "NOT NULL and have no default, of which the source has none: site",
    ),
    "a view": (
        "create table analytics_raw.kept (id int primary key, at timestamptz);"
        "create view analytics_raw.item as select * from analytics_raw.kept",
        "analytics_raw.item is a view, and rows land in tables alone",
    ),
    "a materialized view": (
        "create materialized view analytics_raw.item as select 1 as id, now() as at",
        "analytics_raw.item is a materialized view",
    ),
    "a deferrable key": (f"{MADE}, primary key (id) deferrable)", "(id), which is deferrable,"),
    "another key": (f"{MADE}, primary key (at))", "its primary key (at) cannot serve"),
    "partitions without their column": (
        f"{MADE}) partition by range (at); {PARTITIONED}",
        "is partitioned by at, which conflict_columns",
    ),
}


@pytest.fixture
def items(place: Workplace) -> Workplace:
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null);"
        "create index on item (at, id); insert into item"
        " select n, now() + n * interval '1 second' from generate_series(1, 9) n",
    )
    return place


def _finding(place: Workplace, status: int, name: str = "drift") -> tuple[str, str]:
    done = place.run("exporter", "check", "--json", "Item")
    assert (done.returncode, done.stderr) == (status, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    (one,) = [one for one in found if (one["subject"], one["check"]) == ("Item", name)]
    return one["message"], " ".join(one["fix"])


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_raw_that_can_take_no_row(items: Workplace, what: str) -> None:
    made, said = IN_THE_WAY[what]
    items.query(items.analytics, RAW + made)
    message, fix = _finding(items, 1)
    assert said in message
    for words in (["Item"], ["Item", "--full-refresh"], ["Item", "--dry-run"]):
        done = items.run("exporter", "load", *words)
        assert done.returncode == 1
        assert message in done.stderr
        assert "connecting again" not in done.stderr
    if fix.startswith(("create", "alter")):
        items.query(items.analytics, fix)
        items.load("Item")
        compare(items, "public.item", "analytics_raw.item", "id, at")
        assert _finding(items, 0)


def test_what_a_row_may_break_is_told(items: Workplace) -> None:
    items.query(items.analytics, f"{RAW}{MADE}, primary key (id), unique (at))")
    assert "another unique index, item_at_key" in _finding(items, 0)[0]
    items.query(items.core, "update item set at = now()")
    done = items.run("exporter", "load", "Item")
    assert (done.returncode, "row of blocks 0 to" in done.stderr) == (1, True)
    items.query(items.core, "update item set at = now() + id * interval '1 second'")
    items.load("Item")
    items.query(items.core, "insert into item select id + 20, at from item")
    done = items.run("exporter", "load", "Item")
    assert (done.returncode, "row id=2" in done.stderr) == (1, True)
    items.query(items.core, "delete from item where id > 20")
    items.query(items.analytics, "drop table analytics_raw.item")
    items.query(items.core, "alter table item add price numeric(12, 4)")
    items.query(items.analytics, f"{RAW}{MADE}, price numeric(12, 2), primary key (id))")
    assert "column price is numeric(12,2) in raw and wider" in _finding(items, 0)[0]


def test_columns_that_raw_makes_itself_are_in_nobodys_way(items: Workplace) -> None:
    items.query(
        items.analytics,
        f"{RAW}create table analytics_raw.item (id int generated always as identity primary key,"
        f" at timestamptz not null, twice int generated always as (id * 2) stored, {STAMP})",
    )
    for n in (10, 11):
        assert _finding(items, 0)
        items.query(items.core, f"insert into item values ({n}, now())")
        items.load("Item")
    compare(items, "public.item", "analytics_raw.item", "id, at")


@pytest.mark.parametrize("extra", [1597, 1598])
def test_as_many_columns_as_a_table_can_have(items: Workplace, extra: int) -> None:
    columns = ", ".join(f"add c{n} bool" for n in range(extra))
    items.query(items.core, f"alter table item {columns}")
    if extra == 1597:
        assert items.load("Item")["rows_written"] == 9
        items.query(items.core, "alter table item drop c0, add more bool")
    message, fix = _finding(items, 1)
    done = items.run("exporter", "load", "Item")
    assert (done.returncode, message in done.stderr) == (1, True)
    assert "would have 1,601 columns" in message
    assert "connecting again" not in done.stderr
    assert "exclude" in fix
    left = "more, c9" if extra == 1597 else "c8, c9"
    items.define(ITEM.replace("table: item", f"table: item\n          exclude: [{left}]"))
    assert items.run("exporter", "load", "Item").returncode == 0


def test_rows_without_the_key(items: Workplace) -> None:
    items.query(
        items.analytics, f"{RAW}{MADE}); insert into analytics_raw.item (at) values (now())"
    )
    done = items.run("exporter", "load", "Item")
    assert done.returncode == 1
    assert "holds rows that have NULL in conflict_columns (id)" in done.stderr


def test_the_state_and_the_source_stand_in_the_way(items: Workplace) -> None:
    items.load("Item")
    items.query(
        items.analytics,
        "update analytics_raw._exporter_state set binding ="
        " jsonb_set(binding::jsonb, '{source,database}', '\"1/other\"')",
    )
    message, fix = _finding(items, 1, "load")
    assert "the position is that of database 1/other" in message
    assert "exporter state adopt Item" in fix
    forget_everything(items)
    items.query(items.core, "alter table item alter at drop not null; insert into item values (0)")
    assert "1 rows have no at" in _finding(items, 1, "load")[0]
