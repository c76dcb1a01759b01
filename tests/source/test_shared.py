"""Rows that share a key, of which a load brings one: the source is asked for the other."""

from __future__ import annotations

import pytest

from tests.conftest import Workplace
from tests.helpers.tables import ITEM

_TABLE = (
    "create table item (id int not null, tenant int not null default 1,"
    " at timestamptz not null default clock_timestamp());"
    "create index on item (at); create index on item (id);"
    "insert into item (id, at) select n, now() - interval '2 days' from generate_series(1, 50) n"
)
WAYS = {
    "cursor": "cursor: {field: at}\n          read: cursor",
    "scan": "read: scan",
    "both": "cursor: {field: at}",
}


@pytest.fixture(params=WAYS)
def items(place: Workplace, request: pytest.FixtureRequest) -> Workplace:
    place.define(ITEM.replace("cursor: {field: at, id_field: id}", WAYS[request.param]))
    place.query(place.core, _TABLE)
    assert place.load()["rows_written"] == 50
    return place


def _refused(place: Workplace, *words: str, of: str = "public.item") -> None:
    before = place.query(place.analytics, "select * from analytics_raw.item order by id")
    for _ in range(2):  # the second load does not pass over it, either
        done = place.run("exporter", "load", "Item", *words)
        assert done.returncode == 1
        assert f"two rows of {of} share conflict_columns (id): id=7" in done.stderr
    assert place.query(place.analytics, "select * from analytics_raw.item order by id") == before


def test_only_the_second_row_is_new(items: Workplace) -> None:
    items.query(items.core, "insert into item (id, tenant) values (7, 2), (100, 1)")
    _refused(items)
    items.query(
        items.core, "delete from item where tenant = 2; update item set at = now() where id < 4"
    )
    assert items.load()["rows_written"] == 4


def test_a_row_of_a_table_that_inherits(items: Workplace) -> None:
    items.query(
        items.core,
        "alter table item add primary key (id); create table more () inherits (item)",
    )
    items.load()
    items.query(items.core, "insert into more (id) values (7)")
    _refused(items)


def test_what_a_sweep_brings(place: Workplace) -> None:
    place.define(ITEM.replace("cursor: {field: at, id_field: id}", WAYS["cursor"]))
    place.query(place.core, _TABLE)
    place.load()
    late = "now() - interval '3 days'"  # behind the position: no increment finds it
    place.query(place.core, f"insert into item (id, tenant, at) values (7, 2, {late})")
    _refused(place, "--sweep")


def test_a_view(place: Workplace) -> None:
    place.define(ITEM.replace("id_field: id", "").replace("table: item", "table: items"))
    place.query(place.core, f"{_TABLE}; create view items as select * from item")
    place.load()
    place.query(place.core, "insert into item (id, tenant) values (7, 2)")
    _refused(place, of="public.items")


def test_a_load_that_reads_everything_again(place: Workplace) -> None:
    place.define(ITEM.replace("cursor: {field: at, id_field: id}", WAYS["cursor"]))
    place.query(place.core, _TABLE)
    place.load()
    place.query(place.analytics, "delete from analytics_raw._exporter_state")
    place.query(place.core, "insert into item (id, tenant) values (7, 2)")
    _refused(place)
