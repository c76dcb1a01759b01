"""The sweep: what a cursor passes over comes by itself."""

from __future__ import annotations

import itertools
import json
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from exporter.config.definition import parse
from exporter.source import Table, sweep
from exporter.source.snapshot import Horizon, Server, Snapshot
from exporter.source.table import Heap
from tests.conftest import Workplace, compare
from tests.helpers.tables import ITEM

LARGE = "table: item\n          scan_below: 0 MB\n          sweep: "


def _table(place: Workplace, sweep: str, rows: int = 5000) -> None:
    place.define(ITEM.replace("table: item", LARGE + sweep))
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null default now(),"
        " v text default repeat('x', 300)); create index on item (at, id);"
        f"insert into item (id, at) select n, now() - interval '1 day' from"
        f" generate_series(1, {rows}) n; analyze item",
    )
    place.load("Item")


def _lie(place: Workplace, first: int, rows: int = 3) -> None:
    """Rows of today that carry stamps of long ago."""
    place.query(
        place.core,
        f"insert into item (id, at) select n, '2001-01-01' from"
        f" generate_series({first}, {first + rows - 1}) n;"
        "update item set v = 'changed' where id = 17",
    )


def _refused(place: Workplace, *words: str) -> str:
    done = place.run("exporter", "load", *words)
    assert done.returncode in (1, 2), done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def _missing(place: Workplace) -> int:
    (here,) = place.query(place.core, "select count(*) from item")[0]
    (there,) = place.query(place.analytics, "select count(*) from analytics_raw.item")[0]
    return int(here - there)


def test_a_round_when_it_is_due(place: Workplace) -> None:
    _table(place, "2 seconds")
    _lie(place, 9000)
    assert place.load("Item")["rows_read"] == 0
    assert _missing(place) == 3
    time.sleep(2.1)
    done = place.run("exporter", "load", "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["rows_written"], found["rows_swept"]) == (4, 4)
    assert "the sweep found 4 rows that the cursor had passed over" in done.stderr
    assert "a trigger that sets it" in done.stderr
    compare(place, "public.item", "analytics_raw.item")
    (recorded,) = place.query(
        place.analytics, "select sum(rows_swept) from analytics_raw._exporter_runs"
    )[0]
    assert recorded == 4
    time.sleep(2.1)
    done = place.run("exporter", "load")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_round_now(place: Workplace) -> None:
    _table(place, "never")
    _lie(place, 9000)
    place.load("Item")
    place.query(place.core, "update item set at = now(), v = 'of the cursor' where id = 9")
    done = place.load("Item", "--sweep")
    assert (done["rows_written"], done["rows_swept"]) == (5, 4)
    compare(place, "public.item", "analytics_raw.item")
    assert place.load("Item", "--sweep")["rows_swept"] == 0
    assert place.load("Item")["rows_read"] == 0


def test_a_log_is_not_swept(place: Workplace) -> None:
    place.define(
        ITEM.replace("table: item", LARGE + "1 second").replace(
            "conflict_columns: [id]", "mode: append"
        )
    )
    place.query(
        place.core,
        "create table item (id int, at timestamptz not null); create index on item (at, id);"
        "insert into item values (1, now() - interval '1 hour')",
    )
    place.load("Item")
    assert "append-only" in _refused(place, "Item", "--sweep")


def test_a_state_of_an_earlier_version_is_swept_from_its_snapshot_on(place: Workplace) -> None:
    _table(place, "1 second")
    place.query(place.analytics, "update analytics_raw._exporter_state set sweep = null")
    place.load("Item")
    _lie(place, 9000)
    time.sleep(1.1)
    assert place.load("Item")["rows_swept"] == 4
    compare(place, "public.item", "analytics_raw.item")


# -- what is due, by numbers


def _heaps(blocks: int, buffers: int, file: str = "1") -> Table:
    meta = {"source": {"table": "t", "cursor": {"field": "at"}}, "conflict_columns": ["id"]}
    declared = parse(meta, where="x.yml:1", source="s", table="t", schema="raw").source
    heaps = (
        Heap(1, "public", "t_1", blocks // 3, file, "r", True),
        Heap(2, "public", "t_2", blocks - blocks // 3, file, "r", True),
    )
    return Table(declared, 1, "p", (), (), -1, True, buffers, True, (), heaps=heaps)


def _moment(seconds: int, xid: int) -> tuple[Snapshot, Horizon]:
    clock = str(datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=seconds))
    server = Server("1", "5/core", 1, 1)
    return Snapshot(str(xid), str(xid + 5), None), Horizon(clock, clock, False, False, server)


@pytest.mark.parametrize("every", [60, 600, 7200, 90_000])
@pytest.mark.parametrize(("blocks", "buffers"), [(3_000_000, 4_000_000), (90_000, 16_384), (0, 9)])
def test_rounds_look_at_each_block(every: int, blocks: int, buffers: int) -> None:
    table, day = _heaps(blocks, buffers), timedelta(days=1)
    snapshot, horizon = _moment(0, 100)
    state = sweep.over(snapshot, horizon)
    looked: set[tuple[int, int]] = set()
    rounds = []
    for number in range(1, 6 * 86400 // every):
        snapshot, horizon = _moment(number * every, 100 + number)
        due = sweep.due(state, table, snapshot, horizon, day)
        if due is None:
            assert state.over
            continue
        current, end = due
        if current.place == 0:
            looked = set()
            assert current.since == (rounds[-1] if rounds else "100")
            rounds.append(current.xmin)
        whole = (current.place, end) == (0, blocks)
        assert end - current.place <= (131_072 if whole else min(131_072, buffers // 4))
        looked.add((current.place, end))
        state = sweep.ended(current, end, table)
        if state.over:
            places = sorted(looked)
            assert places[0][0] == 0
            assert places[-1][1] == blocks
            assert all(one[1] == two[0] for one, two in itertools.pairwise(places))
    assert rounds
    if every <= 600 and blocks:
        assert len(rounds) >= 5  # in 6 days


def test_a_round_begins_again_in_a_table_that_was_written_anew() -> None:
    table = _heaps(3_000_000, 4_000_000)
    state = sweep.over(*_moment(0, 100))
    current, end = sweep.due(state, table, *_moment(90_000, 200), timedelta(days=1)) or (state, 0)
    state = sweep.ended(current, end, table)
    assert (state.since, state.xmin, state.over) == ("100", "200", False)
    anew = _heaps(3_000_000, 4_000_000, file="2")
    found = sweep.due(state, anew, *_moment(90_060, 300), timedelta(days=1))
    assert found is not None
    assert (found[0].place, found[0].since, found[0].xmin) == (0, "100", "200")


def test_a_round_goes_on_in_partitions_that_grow() -> None:
    """Each load finds other sizes; begun anew each time, the last blocks would never be reached."""
    day, over = timedelta(days=1), sweep.over(*_moment(0, 100))
    table = _heaps(3_000_000, 4_000_000)
    state, loads = over, 0
    for number in range(200):
        snapshot, horizon = _moment(90_000 + 600 * number, 200 + number)
        found = sweep.due(state, table, snapshot, horizon, day)
        if found is None:
            break
        state, loads = sweep.ended(*found, table), loads + 1
        first, second = table.heaps
        grown = (first._replace(blocks=first.blocks + 7), second._replace(blocks=second.blocks + 9))
        table = table._replace(heaps=grown)
    assert state.over
    assert loads < 100


def test_blocks_of_partitions_that_changed() -> None:
    before, same = _heaps(900, 9), _heaps(900, 9)
    first, second = same.heaps
    grown = same._replace(heaps=(first._replace(blocks=310), second))
    assert [grown.moved(before.file, block) for block in (0, 299, 300, 500)] == [0, 299, 310, 510]
    shrunk = same._replace(heaps=(first._replace(blocks=100), second))
    assert [shrunk.moved(before.file, block) for block in (299, 500)] == [100, 300]
    rewritten = same._replace(heaps=(first, second._replace(file="2")))
    assert [rewritten.moved(before.file, block) for block in (299, 500)] == [299, None]
    attached = same._replace(heaps=(second._replace(file="3"), first, second))
    assert attached.moved(before.file, 299) is None
