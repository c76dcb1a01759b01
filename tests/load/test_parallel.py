"""Several definitions, and several ranges of one, side by side: `exporter load -j N`."""

from __future__ import annotations

import json
import threading
import time

import psycopg
import pytest

from exporter.wire.connection import Sessions
from tests.conftest import Workplace, compare, fill
from tests.helpers.processes import start_load, wait_unlocked
from tests.helpers.tables import EVENT, ITEM, RAW, forget_everything

RUNS = "analytics_raw._exporter_runs"


def _items(place: Workplace, count: int) -> list[str]:
    names = [f"item_{number:02}" for number in range(count)]
    place.define(
        *(
            ITEM.replace("name: item", f"name: {name}")
            .replace("key: Item", f"key: {name}")
            .replace("table: item", f"table: {name}")
            for name in names
        )
    )
    for number, name in enumerate(names):
        place.query(
            place.core,
            f"create table {name} (id int primary key, at timestamptz not null);"
            f"insert into {name} select n, now() from generate_series(1, {10 * number + 10}) n",
        )
    return names


def test_definitions_side_by_side_the_largest_first(place: Workplace) -> None:
    names = _items(place, 12)
    place.query(
        place.core,
        "insert into item_05 select n, now() from generate_series(1000, 40000) n; analyze item_05;"
        "insert into item_07 select n, now() from generate_series(1000, 20000) n; analyze item_07",
    )
    done = place.run("exporter", "load", "-j", "2", "--json")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(result["key"] for result in results) == names
    assert {result["status"] for result in results} == {"ok"}
    for name in names:
        compare(place, f"public.{name}", f"analytics_raw.{name}")
    began = place.query(place.analytics, f"select key from {RUNS} order by started_at limit 2")
    assert {key for (key,) in began} == {"item_05", "item_07"}


def test_sessions_are_kept_from_one_definition_to_the_next(place: Workplace) -> None:
    names = _items(place, 20)
    assert place.run("exporter", "load").returncode == 0
    place.query(
        place.analytics,
        f"alter table {RUNS} add session int;"
        f"alter table {RUNS} alter session set default pg_backend_pid()",
    )
    for name in names:
        place.query(place.core, f"insert into {name} values (0, now())")
    place.query(place.core, "alter table item_02 alter id type text")
    done = place.run("exporter", "load")
    assert done.returncode == 1
    assert "item_02: column id was integer" in done.stderr
    sessions = place.query(
        place.analytics,
        f"select session from {RUNS} where session is not null and status = 'ok' order by key",
    )
    first, second, fourth, *others = (session for (session,) in sessions)
    assert first == second
    assert second != fourth  # of what has failed nothing is used again
    assert others == [fourth] * 16
    for name in set(names) - {"item_02"}:
        compare(place, f"public.{name}", f"analytics_raw.{name}")


def test_a_lock_is_held_no_longer_than_its_load(place: Workplace) -> None:
    _items(place, 2)
    with psycopg.connect(place.core) as other:
        other.execute("lock table item_01 in access exclusive mode")
        both = start_load(place)
        done = f"select 1 from {RUNS} where key = 'item_00' and status = 'ok'"
        while not place.query(place.analytics, f"select to_regclass('{RUNS}')")[0][0]:
            time.sleep(0.02)
        while not place.query(place.analytics, done):
            time.sleep(0.02)
        time.sleep(0.2)
        assert place.load("item_00")["status"] == "ok"
        other.rollback()
    both.communicate(timeout=60)
    assert both.returncode == 0


def test_a_kept_session_that_has_ended_is_not_used(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL_CORE", place.core)
    monkeypatch.setenv("DATABASE_URL_ANALYTICS", place.analytics)
    with Sessions() as sessions:
        with sessions.pair() as (destination, source):
            first = source.info.backend_pid
        place.query(place.core, f"select pg_terminate_backend({first})")
        with sessions.pair() as (destination, source):
            assert source.execute("select pg_backend_pid()").fetchone() != (first,)
            second = destination.info.backend_pid
        with sessions.pair() as (destination, source):
            assert destination.info.backend_pid == second


def test_a_failure_leaves_the_others_alone(place: Workplace) -> None:
    names = _items(place, 6)
    sources = place.folder / "models" / "sources.yml"  # all create this schema
    text = sources.read_text().replace("name: analytics_raw", "name: raw\n    schema: elsewhere")
    sources.write_text(text)
    place.query(place.core, "drop table item_03")
    done = place.run("exporter", "load", "-j", "6", "--json")
    assert done.returncode == 1, done.stderr
    results = {result["key"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert {key for key, result in results.items() if result["error"]} == {"item_03"}
    assert sorted(results) == names


def _most_sessions(place: Workplace, *words: str) -> dict[str, int]:
    """The most sessions that a load has had at once, on each database."""
    most = {"core": 0, "analytics": 0}
    process = start_load(place, *words, BATCH_SIZE="3000")
    seen = (
        "select count(*) from pg_stat_activity where application_name = 'dbt-exporter'"
        " and backend_type = 'client backend'"  # the server's own parallel workers bear the name
    )
    with (
        psycopg.connect(place.core, autocommit=True) as core,
        psycopg.connect(place.analytics, autocommit=True) as analytics,
    ):
        while process.poll() is None:
            for name, connection in (("core", core), ("analytics", analytics)):
                row = connection.execute(f"{seen} and datname = current_database()").fetchone()
                most[name] = max(most[name], row[0] if row else 0)
    assert process.returncode == 0, process.communicate()[1]
    process.communicate()
    return most


def test_one_first_load_is_shared(product: Workplace) -> None:
    fill(product.core, 1, 60_000)
    assert _most_sessions(product, "-j", "4") == {"core": 4, "analytics": 4}
    compare(product, EVENT, RAW)
    assert product.query(product.analytics, f"select rows_read, rows_written from {RUNS}") == [
        (60_000, 60_000)
    ]
    forget_everything(product)
    most = _most_sessions(product, "-j", "4", "--max-connections", "2")
    assert most == {"core": 2, "analytics": 2}
    compare(product, EVENT, RAW)


def test_who_joins_late_sees_the_same_snapshot(place: Workplace) -> None:
    _items(place, 2)
    place.query(
        place.core,
        "alter table item_01 add pad text not null default repeat('x', 1500);"
        "insert into item_01 select n, '2020-01-01' from generate_series(1000, 12000) n;"
        "analyze item_01",  # more than is read ahead
    )
    place.query(
        place.analytics,
        "create schema analytics_raw; create table analytics_raw.item_01"
        " (id int primary key, at timestamptz not null, pad text,"
        " _exported_at timestamptz not null)",
    )
    ((before,),) = place.query(place.core, "select count(*) from item_01")
    waiting = (
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
        " and datname = current_database()"
    )
    with psycopg.connect(place.analytics) as raw, psycopg.connect(place.core) as other:
        raw.execute("lock table analytics_raw.item_01 in share mode")
        other.execute("lock table item_00")
        process = start_load(place, "-j", "2", "--max-connections", "2", BATCH_SIZE="500")
        while [place.query(url, waiting) for url in (place.core, place.analytics)] != [[(1,)]] * 2:
            assert process.poll() is None, process.communicate()
        place.query(place.core, "update item_01 set at = at")  # all rows move
        other.rollback()
        ended = "select status from analytics_raw._exporter_runs where key = 'item_00'"
        while place.query(place.analytics, ended) != [("ok",)]:
            time.sleep(0.05)
        while place.query(place.analytics, waiting) != [(2,)]:  # the other thread has joined in
            time.sleep(0.05)
        raw.rollback()
    assert process.wait() == 0, process.communicate()
    process.communicate()
    assert place.query(place.analytics, "select count(*) from analytics_raw.item_01") == [(before,)]
    place.load("item_01")
    compare(place, "public.item_01", "analytics_raw.item_01", "id, at")


def _grown_stamps(place: Workplace, ended: threading.Event, lost: list[int]) -> None:
    """Read as an incremental model does: only what is newer than the newest it has seen."""
    with psycopg.connect(place.analytics, autocommit=True) as model:
        model.execute("create temp table model (id text primary key, _exported_at timestamptz)")
        while True:
            last = ended.is_set()
            row = model.execute(f"select to_regclass('{RAW}')").fetchone()
            if row and row[0]:
                model.execute(
                    f"insert into model select id, _exported_at from {RAW} where _exported_at >"
                    " (select coalesce(max(_exported_at), '-infinity') from model)"
                    " on conflict (id) do update set _exported_at = excluded._exported_at"
                )
            if last:
                row = model.execute(
                    f"select count(*) from {RAW} r where not exists (select from model m"
                    " where m.id = r.id and m._exported_at = r._exported_at)"
                ).fetchone()
                lost.append(row[0] if row else -1)
                return


def _move(place: Workplace, ended: threading.Event) -> None:
    """Give rows a place in other blocks, again and again: one snapshot sees them once."""
    with psycopg.connect(place.core, autocommit=True) as writer:
        for number in range(10_000):
            writer.execute(
                "update \"StatEvent\" set tag = 'moved', updated_at = now() at time zone 'UTC'"
                f" where hashtext(id) % 100 = {number % 100}".encode()
            )
            if ended.wait(0.01):
                return


def test_a_model_that_reads_meanwhile_misses_nothing(product: Workplace) -> None:
    fill(product.core, 1, 60_000)
    ended = threading.Event()
    lost: list[int] = []
    threads = [
        threading.Thread(target=_grown_stamps, args=(product, ended, lost)),
        threading.Thread(target=_move, args=(product, ended)),
    ]
    for thread in threads:
        thread.start()
    try:
        product.load("-j", "4", "StatEvent", BATCH_SIZE="500")
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert lost == [0]
    product.load("StatEvent")
    compare(product, EVENT, RAW)


@pytest.mark.parametrize("side", [pytest.param("core", marks=pytest.mark.long), "analytics"])
def test_a_session_terminated_while_sharing(product: Workplace, side: str) -> None:
    fill(product.core, 1, 30_000)
    process = start_load(product, "-j", "4", "StatEvent", BATCH_SIZE="300")
    terminated = 0
    url = product.core if side == "core" else product.analytics
    with psycopg.connect(url, autocommit=True) as connection:
        while process.poll() is None and terminated < 3:
            row = connection.execute(
                "select count(pg_terminate_backend(pid)) from (select pid from pg_stat_activity"
                " where application_name = 'dbt-exporter' and datname = current_database()"
                " and query ~* '^copy' order by random() limit 1) one"
            ).fetchone()
            found = row[0] if row else 0
            terminated += found
            time.sleep(0.1 if found else 0.005)  # a copy is soon over
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert terminated
    assert "connecting again" in said
    compare(product, EVENT, RAW)
    assert product.query(product.analytics, f"select sum(rows_written) from {RUNS}") == [(30_000,)]


def test_resumed_it_copies_on_and_takes_what_moved(product: Workplace) -> None:
    """Rows that move behind the position, or in front of it, while nobody loads."""
    fill(product.core, 1, 20_000)
    process = start_load(product, "-j", "2", "StatEvent", BATCH_SIZE="200")
    while process.poll() is None:
        there = product.query(product.analytics, f"select to_regclass('{RAW}') is not null")
        if there == [(True,)] and product.query(
            product.analytics, f"select count(*) > 3000 from {RAW}"
        ) == [(True,)]:
            break
    process.kill()
    process.communicate()
    wait_unlocked(product)
    ((before,),) = product.query(product.analytics, f"select count(*) from {RAW}")
    assert 3000 < before < 20_000
    product.query(product.core, "update \"StatEvent\" set tag = 'moved' where hashtext(id) % 7 = 0")
    product.query(product.core, 'vacuum "StatEvent"')
    fill(product.core, 20_001, 21_000)  # into the room that the vacuum made, at the front
    told = product.run("exporter", "load", "-v", "-j", "2", "StatEvent").stderr
    assert "binary, straight into raw" in told
    assert "from block 0 " not in told
    compare(product, EVENT, RAW)
    assert product.load("StatEvent")["rows_written"] == 0


def test_an_old_form_of_the_tables_is_brought_up_to_date(product: Workplace) -> None:
    fill(product.core, 1, 10)
    product.load("StatEvent")
    product.query(
        product.analytics,
        "alter table analytics_raw._exporter_state drop column run, drop column slot;"
        f"alter table {RUNS} drop column rows_deleted, drop column rows_swept",
    )
    fill(product.core, 11, 20)
    assert product.load("StatEvent")["rows_written"] == 10
