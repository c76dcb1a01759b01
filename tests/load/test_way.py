"""Loads that are in somebody's way at the source, or wait for somebody."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import psycopg
import pytest

from exporter.config.project import definitions
from exporter.errors import DatabaseError
from exporter.load.ranges import FirstLoad, shared_snapshot
from exporter.raw import RawTable
from exporter.source import Blocks, find_table
from exporter.wire import connect
from tests.conftest import ROOT, Workplace, as_role, compare
from tests.helpers.processes import start_load, until
from tests.helpers.tables import ITEM

MOST = 4.0  # seconds that somebody at the source waits for a load
ITEMS, RAW = "public.item", "analytics_raw.item"
RUNS = "analytics_raw._exporter_runs"


def _slow(place: Workplace, rows: int = 3_000, *, nap: float = 0.2) -> None:
    """A table in some 30 ranges, and a raw table that takes its time at each statement."""
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null default now(),"
        " pad text default repeat('x', 1500));"
        f"insert into item select n from generate_series(1, {rows}) n; analyze item",
    )
    place.query(
        place.analytics,
        "create schema analytics_raw; create table analytics_raw.item (id int primary key,"
        " at timestamptz not null, pad text, _exported_at timestamptz not null);"
        "create function analytics_raw.nap() returns trigger language plpgsql as"
        f" 'begin perform pg_sleep({nap}); return null; end';"
        "create trigger nap after insert on analytics_raw.item"
        " for each statement execute function analytics_raw.nap()",
    )


@contextlib.contextmanager
def _plain_role(place: Workplace) -> Iterator[Workplace]:
    """Load as a role that sees of other sessions only what everybody sees."""
    role = f"reader_{uuid.uuid4().hex[:8]}"
    place.query(place.core, f"create role {role} login password 'secret'")
    place.query(place.core, f"grant select on item to {role}")
    yield Workplace(place.folder, as_role(place.core, role), place.analytics)
    place.query(place.core, f"drop owned by {role}; drop role {role}")


def _batches(place: Workplace) -> int:
    if place.query(place.analytics, f"select to_regclass('{RUNS}')") == [(None,)]:
        return 0
    return int(place.query(place.analytics, f"select coalesce(max(batches), 0) from {RUNS}")[0][0])


def _seconds(place: Workplace, statement: str) -> float:
    """How long it takes to have the source do something."""
    with psycopg.connect(place.core, autocommit=True, application_name="psql") as somebody:
        began = time.monotonic()
        somebody.execute(statement.encode())
        return time.monotonic() - began


def _ended(process: subprocess.Popen[str]) -> tuple[dict[str, object], str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return dict(json.loads(out.splitlines()[-1])), err


@pytest.mark.parametrize("words", [pytest.param((), marks=pytest.mark.long), ("-j", "2")])
def test_a_first_load_makes_way_and_goes_on(place: Workplace, words: tuple[str, ...]) -> None:
    _slow(place)
    with _plain_role(place) as plain:
        process = start_load(plain, *words, BATCH_SIZE="100")
        until(lambda: _batches(place) > 4)
        before = _batches(place)
        assert _seconds(place, "alter table item add extra int") < MOST
        result, told = _ended(process)
    assert "(psql), which waits for a lock on public.item; goes on after it" in told
    assert 0 < before < result["batches"]
    assert result["rows_read"] == 3_000, "it goes on from the range that it had reached"
    compare(place, ITEMS, RAW, "id, at, pad, extra")


def test_an_increment_makes_way_and_goes_on(place: Workplace) -> None:
    _slow(place, 10)
    place.define(ITEM.replace("table: item", "table: item\n          read: cursor"))
    place.load()
    place.query(
        place.core,
        "insert into item select n, now() + n * interval '1 us' from generate_series(11, 3000) n",
    )
    process = start_load(place, BATCH_SIZE="100")
    until(lambda: _batches(place) > 4)
    assert _seconds(place, "alter table item add extra int") < MOST
    place.query(place.core, "update item set extra = 8, at = now() + interval '1 s' where id < 9")
    result, told = _ended(process)
    assert "makes way for session" in told
    assert isinstance(result["rows_read"], int)
    assert result["rows_read"] < 3_200, "it goes on from the batch that it had reached"
    compare(place, ITEMS, RAW, "id, at, pad, extra")


def test_the_source_is_let_go_while_raw_is_locked(place: Workplace) -> None:
    _slow(place, nap=0)
    held = (
        "select count(*) from pg_locks where relation = 'item'::regclass and granted"
        " and database = (select oid from pg_database where datname = current_database())"
    )
    with psycopg.connect(place.analytics) as other:
        other.execute("set application_name = 'somebody'")
        other.execute("lock table analytics_raw.item in share mode")
        process = start_load(place, "-j", "2", BATCH_SIZE="100")
        until(lambda: place.query(place.core, held)[0][0] > 0)
        time.sleep(MOST)
        assert place.query(place.core, held) == [(0,)], "with nobody waiting"
        assert _seconds(place, "alter table item add extra int") < 0.5
        time.sleep(7 - MOST)
        pid = other.info.backend_pid
        other.rollback()
    _, told = _ended(process)
    assert f"lets go of the source while it waits for session {pid} (somebody)" in told
    waits = f"waits at the destination for session {pid} (somebody) that holds a lock on"
    assert told.count(f"{waits} analytics_raw.item, since 20") == 1
    compare(place, ITEMS, RAW, "id, at, pad, extra")


def test_whom_a_load_waits_for_at_the_source(place: Workplace) -> None:
    _slow(place, 10, nap=0)
    with psycopg.connect(place.core) as other:
        other.execute("lock table item")
        process = start_load(place)
        waits = "select count(*) from pg_locks where relation = 'item'::regclass and not granted"
        until(lambda: place.query(place.core, waits) == [(1,)])
        time.sleep(6.5)
        pid = other.info.backend_pid
        other.rollback()
    _, told = _ended(process)
    assert f"waits at the source for session {pid} (?) that holds a lock on public.item" in told
    compare(place, ITEMS, RAW, "id, at, pad")


@pytest.mark.parametrize("words", [(), pytest.param(("-j", "2"), marks=pytest.mark.long)])
def test_a_table_that_is_written_anew_meanwhile(place: Workplace, words: tuple[str, ...]) -> None:
    """It looks empty to a snapshot that was taken before, and to who would import that one."""
    _slow(place)
    process = start_load(place, *words, BATCH_SIZE="100")
    until(lambda: _batches(place) > 4)
    assert _seconds(place, "alter table item alter id type bigint") < MOST
    _, told = _ended(process)
    assert "makes way for session" in told
    compare(place, ITEMS, RAW, "id, at, pad")


def test_who_shares_a_snapshot_keeps_the_table_as_it_shows(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow(place, 10)
    monkeypatch.setenv("DATABASE_URL_CORE", place.core)
    (definition,) = definitions(place.folder)
    with connect("DATABASE_URL_CORE") as first, connect("DATABASE_URL_CORE") as helper:
        first.execute("begin isolation level repeatable read; lock table public.item in share mode")
        (snapshot,) = first.execute("select pg_export_snapshot()").fetchone() or ("",)
        table = find_table(first, definition.source, None)
        blocks = Blocks(table, table.landed, False, 0, 1)
        raw = RawTable(definition.destination, table.landed, True, True, True, False)
        load = FirstLoad(blocks, raw, table.landed, "", "", 0, snapshot)
        with shared_snapshot(helper, load):
            first.rollback()
            with pytest.raises(psycopg.errors.LockNotAvailable):
                place.query(
                    place.core, "set lock_timeout = 100; alter table item alter id type bigint"
                )
            assert helper.execute("select count(*) from public.item").fetchone() == (10,)
        with pytest.raises(DatabaseError, match="is gone"), shared_snapshot(helper, load):
            pass


def test_a_full_refresh_makes_way_but_not_for_ever(place: Workplace) -> None:
    _slow(place, nap=0)
    place.load()
    nap = """\n          columns: [id, at, pad, {name: nap, expression: "pg_sleep(0.002)::text"}]"""
    place.define(ITEM.replace("table: item", f"table: item{nap}"))
    code = (
        "from exporter.load import way; way._MOST_LOST = 1;"
        " from exporter.__main__ import main; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "load", "--full-refresh", "--json"],
        cwd=place.folder,
        env={**place.environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(2):
            time.sleep(3)
            place.query(place.core, "alter table item add if not exists extra int")
        _, told = _ended(process)
    assert told.count("makes way for session") == 1
    assert told.count("does not make way for session") == 1
    compare(place, ITEMS, RAW, "id, at, pad")


@pytest.mark.parametrize(
    "statement",
    [
        "create index concurrently on other (id)",
        pytest.param("drop index item_at", marks=pytest.mark.long),
    ],
)
def test_who_else_is_let_through(place: Workplace, statement: str) -> None:
    """Also who waits for the end of all transactions, or for the lock on an index."""
    _slow(place)
    place.query(place.core, "create table other (id int); create index item_at on item (at)")
    process = start_load(place, BATCH_SIZE="100")
    until(lambda: _batches(place) > 4)
    assert _seconds(place, statement) < MOST
    _, told = _ended(process)
    assert "makes way for session" in told
    compare(place, ITEMS, RAW, "id, at, pad")
