"""Backfills by range, and the stored position as a person sees and sets it."""

from __future__ import annotations

import json

import psycopg
import pytest

from tests.conftest import Workplace, compare
from tests.helpers.tables import ITEM

RAW = "analytics_raw.item"
APPEND = ITEM.replace("        conflict_columns: [id]\n", "")


@pytest.fixture
def items(place: Workplace) -> Workplace:
    """Ten items, one a day from the 1st on, landed."""
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null, v int);"
        "insert into item select n, timestamptz '2026-01-01 00:00Z' + (n - 1) * interval '1 day', 0"
        " from generate_series(1, 10) n",
    )
    place.load("Item")
    return place


def _state(place: Workplace) -> object:
    return place.query(
        place.analytics,
        "select to_jsonb(s) - 'exported_at' - 'updated_at' from analytics_raw._exporter_state s",
    )


def test_backfill_lands_a_range_and_leaves_the_position(items: Workplace) -> None:
    before = _state(items)
    items.query(items.core, "update item set v = 1")  # a repair that did not touch the cursor
    span = ("--since", "2026-01-03 00:00Z", "--until", "2026-01-05 00:00Z")
    done = items.load("Item", *span)
    assert (done["rows_read"], done["rows_written"]) == (2, 2)
    assert _state(items) == before
    landed = items.query(items.analytics, f"select id from {RAW} where v = 1 order by id")
    assert landed == [(3,), (4,)]
    assert items.load("Item", *span)["rows_written"] == 0
    assert items.load("Item", "--since", "2026-01-09 00:00Z", BATCH_SIZE="1")["batches"] == 2
    assert items.load("Item", "--until", "2026-01-02")["rows_written"] == 1
    assert items.query(
        items.analytics, "select command from analytics_raw._exporter_runs order by id desc limit 1"
    ) == [("load --until 2026-01-02",)]
    items.load("Item", "--since", "2000-01-01")
    compare(items, "public.item", RAW)


def test_rows_of_a_backfill_reach_the_models(items: Workplace) -> None:
    newest = f"select max(_exported_at) from {RAW}"
    before = items.query(items.analytics, newest)
    items.query(items.core, "update item set v = 1 where id = 3")
    items.load("Item", "--until", "2026-01-04")
    between = items.query(items.analytics, newest)
    items.query(items.core, "insert into item values (11, now(), 0)")
    items.load("Item")
    assert before < between < items.query(items.analytics, newest)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--since", "2026-01-01"), "need a KEY"),
        (("Item", "--since", "yesteryear"), "--since 'yesteryear' is no timestamp with time zone"),
        (("Item", "--since", "2026-01-01", "--full-refresh"), "leave out --since"),
    ],
)
def test_backfill_refuses(items: Workplace, words: tuple[str, ...], said: str) -> None:
    done = items.run("exporter", "load", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_append_only_logs_take_no_row_twice(items: Workplace) -> None:
    items.define(APPEND.replace("- name: item", "- name: item_log"))
    items.load("Item")
    for words in (
        ("load", "Item", "--since", "2026-01-01"),
        ("state", "reset", "Item"),
        ("state", "set", "Item", "2026-01-02"),
    ):
        done = items.run("exporter", *words)
        assert done.returncode == 2, done.stderr
        assert "twice" in done.stderr
    items.run("exporter", "state", "set", "Item", "2026-01-20 00:00Z")
    items.query(items.core, "insert into item values (19, '2026-01-19'), (21, '2026-01-21')")
    assert items.load("Item")["rows_read"] == 1


def test_state_is_shown_reset_and_set(items: Workplace) -> None:
    def state(*words: str) -> dict[str, object]:
        done = items.run("exporter", "state", *words, "--json", PGTZ="UTC")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    cursor = {"value": "2026-01-10 00:00:00+00", "id": "10"}
    assert state("show")["cursor"] == cursor
    assert "2026-01-10" in items.run("exporter", "state", "show", "Item").stdout

    items.query(items.core, "update item set v = 7")
    items.query(items.analytics, f"delete from {RAW} where id > 7")
    assert state("set", "Item", "2026-01-08", "8")["watermark"] == {
        "value": "2026-01-08 00:00:00+00",
        "id": "8",
    }
    assert items.load("Item")["rows_read"] == 2
    assert items.query(items.analytics, f"select id from {RAW} where v = 7 order by id") == [
        (9,),
        (10,),
    ]
    assert state("reset", "Item")["cursor"] is None
    assert items.load("Item")["rows_read"] == 10
    compare(items, "public.item", RAW)
    assert state("show", "Item")["cursor"] == cursor


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "Itme"), "did you mean Item?"),
        (("set", "Item", "soon"), "VALUE 'soon' is no timestamp"),
        (("set", "Item", "2026-01-01", "x"), "ID 'x' is no integer"),
    ],
)
def test_state_refuses(items: Workplace, words: tuple[str, ...], said: str) -> None:
    done = items.run("exporter", "state", *words)
    assert done.returncode == 2
    assert said in done.stderr


def test_state_is_not_changed_under_a_running_load(items: Workplace) -> None:
    number = "select objid::bigint | classid::bigint << 32 from pg_locks where locktype='advisory'"
    with psycopg.connect(items.analytics, autocommit=True) as holder:
        from exporter.config.choice import choose
        from exporter.config.project import definitions
        from exporter.state import position as state

        state.lock(holder, choose(definitions(items.folder), ("Item",))[0].destination)  # type: ignore[arg-type]
        assert holder.execute(number).fetchone()
        done = items.run("exporter", "state", "reset", "Item")
    assert done.returncode == 3
    assert "another run holds the lock" in done.stderr


def test_state_before_the_first_load(place: Workplace) -> None:
    place.define(ITEM)
    shown = place.run("exporter", "state", "show")
    assert shown.stdout == "Item: nothing yet; the next load reads everything\n"
    assert place.query(place.analytics, "select to_regnamespace('analytics_raw')") == [(None,)]


def test_later_definitions_run_after_a_data_error(items: Workplace) -> None:
    items.define(ITEM, ITEM.replace("name: item", "name: other").replace("key: Item", "key: Other"))
    items.query(items.analytics, f"alter table {RAW} add check (v < 5)")
    items.query(items.core, "update item set v = 9, at = now() where id = 4")
    done = items.run("exporter", "load", "--json")
    assert done.returncode == 1
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["key"], first["status"]) == ("Item", "failed")
    assert "id=4" in first["error"]
    assert (second["key"], second["status"], second["rows_read"]) == ("Other", "ok", 10)
    recorded = "select status, error is not null from analytics_raw._exporter_runs order by id"
    assert items.query(items.analytics, recorded) == [
        ("ok", False),
        ("failed", True),
        ("ok", False),
    ]


@pytest.mark.parametrize("cursor", ["{field: at, id_field: id}", "{field: id}"])
def test_the_position_after_a_first_load_is_the_greatest(place: Workplace, cursor: str) -> None:
    place.define(ITEM.replace("{field: at, id_field: id}", cursor))
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null);"
        "insert into item select n, '2026-01-01Z' from generate_series(1, 120) n",
    )
    end = place.load("Item")["cursor"]
    assert end["id" if "id_field" in cursor else "value"] == "120"
    assert place.load("Item")["rows_read"] == 0


def test_a_refreshed_log_takes_no_row_twice(place: Workplace) -> None:
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz);"
        "insert into item select n, now() from generate_series(1, 120) n",
    )
    place.define(APPEND.replace("field: at, id_field", "field"))
    for words in (("--full-refresh",), ("--full-refresh",), ()):
        place.load("Item", *words)
    twice = f"select id from {RAW} group by id having count(*) > 1"
    assert place.query(place.analytics, twice) == []
    assert place.query(place.analytics, f"select count(*) > 100 from {RAW}") == [(True,)]
