"""Rows that are gone at the source: marked or removed, and alive again when they come back."""

from __future__ import annotations

import pytest

from tests.conftest import Workplace, compare
from tests.test_integrity import ITEM

RAW = "analytics_raw.item"
MARK = ITEM.rstrip() + "\n        deletes: mark\n"
REMOVE = ITEM.rstrip() + "\n        deletes: remove\n"
FREEZE = "        schema: freeze\n"


def _items(place: Workplace, definition: str, rows: int = 20) -> Workplace:
    place.define(definition)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null default now(), v text);"
        f"insert into item (id, v) select n, 'v' || n from generate_series(1, {rows}) n",
    )
    place.load("Item")
    return place


def _marked(place: Workplace) -> list[int]:
    found = place.query(
        place.analytics,
        f"select id, _deleted_at = _exported_at from {RAW} where _deleted_at is not null"
        " order by id",
    )
    assert all(same for _, same in found)
    return [id for id, _ in found]


def test_a_row_that_comes_back_is_alive_again(place: Workplace) -> None:
    _items(place, MARK)
    place.query(place.analytics, f"update {RAW} set _deleted_at = _exported_at where id in (3, 4)")
    before = place.query(place.analytics, f"select max(_exported_at) from {RAW}")
    place.query(place.core, "update item set at = now() where id = 3")  # an ordinary load sees it
    place.load("Item")
    assert _marked(place) == [4]
    assert place.load("Item", "--since", "2000-01-01")["rows_written"] == 1
    assert _marked(place) == []
    assert place.query(place.analytics, f"select max(_exported_at) from {RAW}") > before


def test_a_full_refresh_marks_what_is_gone(place: Workplace) -> None:
    _items(place, MARK)
    place.query(place.analytics, f"update {RAW} set _deleted_at = _exported_at where id = 9")
    place.query(place.core, "delete from item where id in (1, 2)")
    assert place.load("Item", "--full-refresh")["rows_deleted"] == 2
    assert _marked(place) == [1, 2]
    stamps = f"select _deleted_at from {RAW} where id = 1"
    first = place.query(place.analytics, stamps)
    assert place.load("Item", "--full-refresh")["rows_deleted"] == 0
    assert place.query(place.analytics, stamps) == first
    place.query(place.core, "insert into item values (1, now(), 'back')")
    place.load("Item", "--full-refresh")
    assert _marked(place) == [2]


def test_the_column_is_added_when_it_is_asked_for(place: Workplace) -> None:
    _items(place, ITEM)
    place.define(MARK + FREEZE)
    done = place.run("exporter", "load", "Item")
    assert done.returncode == 1
    assert 'alter table "analytics_raw"."item" add column "_deleted_at" timestamptz' in done.stderr
    place.define(MARK)
    done = place.run("exporter", "load", "Item")
    assert "has _deleted_at from now on" in done.stderr
    assert "_deleted_at" not in place.run("exporter", "load", "Item").stderr
    place.query(place.analytics, f"update {RAW} set _deleted_at = now() where id = 3")
    place.define(ITEM)  # what is left of it does not hide a row that is there
    place.query(place.core, "update item set at = now() where id = 3")
    place.load("Item")
    assert _marked(place) == []


def test_a_source_with_a_column_of_that_name(place: Workplace) -> None:
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null, _deleted_at timestamptz);"
        "insert into item values (1, now(), '2020-01-01')",
    )
    place.load("Item")
    place.query(place.core, "update item set at = now()")
    place.load("Item")
    compare(place, "public.item", RAW, "id, at, _deleted_at")
    place.define(MARK)
    done = place.run("exporter", "load", "Item")
    assert done.returncode == 1
    assert "exporter.source.exclude: [_deleted_at]" in done.stderr


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        (MARK.replace("mark", "maybe"), "exporter.deletes must be one of ignore, mark, remove"),
        (MARK.replace("        conflict_columns: [id]\n", ""), "exporter.deletes must be ignore"),
    ],
)
def test_a_wrong_key_is_refused(place: Workplace, definition: str, said: str) -> None:
    place.define(definition)
    done = place.run("exporter", "load")
    assert done.returncode == 2
    assert said in done.stderr
