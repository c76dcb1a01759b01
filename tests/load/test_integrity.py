"""Nothing lost, nothing twice: ties, kills, prepared transactions, duplicate keys, clocks."""

from __future__ import annotations

import subprocess
import sys
import time

import psycopg
import pytest

from tests.conftest import Workplace, compare, fill
from tests.helpers.processes import wait_unlocked
from tests.helpers.tables import EVENT, ITEM, RAW


def _kill_midway(place: Workplace, key: str, after: float, **environment: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "exporter", "load", key],
        cwd=place.folder,
        env={**place.environment, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(after)
    process.kill()
    process.wait()


@pytest.mark.parametrize("tie_breaker", [", id_field: id", ""])
def test_killed_inside_a_tie(place: Workplace, tie_breaker: str) -> None:
    place.define(ITEM.replace(", id_field: id", tie_breaker))
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null);"
        "insert into item values (0, '2020-01-01')",
    )
    place.load("Item")
    place.query(
        place.core, "insert into item select n, '2026-01-01' from generate_series(1, 50000) n"
    )
    for moment in (0.3, 0.4, 0.5):
        _kill_midway(place, "Item", moment, BATCH_SIZE="1000")
        wait_unlocked(place)
    place.load("Item", BATCH_SIZE="1000")
    compare(place, "public.item", "analytics_raw.item")


def test_prepared_transaction(place: Workplace) -> None:
    place.define(ITEM.replace("id_field: id", "id_field: id, lookback: 0 seconds"))
    place.query(place.core, "create table item (id int primary key, at timestamptz not null)")
    place.query(place.core, "insert into item values (1, now())")
    place.load("Item")
    with psycopg.connect(place.core, autocommit=True) as connection:
        connection.execute("begin")
        connection.execute("insert into item values (2, now())")
        connection.execute("prepare transaction 'late'")
        for number in (3, 4):
            place.query(place.core, f"insert into item values ({number}, now())")
            time.sleep(0.3)  # more than the margin of the horizon
            place.load("Item")
        connection.execute("commit prepared 'late'")
    assert place.load("Item")["rows_written"] == 1
    compare(place, "public.item", "analytics_raw.item")


@pytest.mark.parametrize("kind", ["timestamptz", "timestamp", "date", "bigint"])
@pytest.mark.parametrize("tie_breaker", [", id_field: id", ""])
def test_late_commit_under_every_cursor(place: Workplace, kind: str, tie_breaker: str) -> None:
    if kind != "bigint":
        tie_breaker += ", lookback: 0 seconds"  # which alone would find them again
    place.define(ITEM.replace(", id_field: id", tie_breaker))
    value = "nextval('s')" if kind == "bigint" else "now()"
    place.query(
        place.core,
        f"create sequence s; create table item (id int primary key, at {kind} not null)",
    )
    with psycopg.connect(place.core) as late:
        late.execute(f"insert into item values (1, {value})".encode())
        for number in (2, 3):
            place.query(place.core, f"insert into item values ({number}, {value})")
            time.sleep(0.15)  # more than the margin of the horizon
            place.load("Item")
        late.commit()
    place.load("Item")
    compare(place, "public.item", "analytics_raw.item")
    assert place.load("Item")["rows_written"] == 0


def test_append_holds_back_what_an_open_transaction_could_precede(place: Workplace) -> None:
    place.define(ITEM.replace("        conflict_columns: [id]\n", ""))
    place.query(place.core, "create table item (id int primary key, at timestamptz not null)")
    place.query(place.core, "insert into item values (1, now())")
    time.sleep(0.3)  # what is younger than 0.1 s is held back, too
    with psycopg.connect(place.core) as late:
        late.execute("insert into item values (2, now())")
        place.query(place.core, "insert into item values (3, now())")
        time.sleep(0.2)
        assert place.load("Item")["rows_read"] == 1
        late.commit()
    time.sleep(0.3)
    assert place.load("Item")["rows_read"] == 2
    assert place.load("Item")["rows_read"] == 0
    compare(place, "public.item", "analytics_raw.item", "id, at")


def test_stamps_grow_when_the_clock_goes_back(product: Workplace) -> None:
    fill(product.core, 1, 10)
    product.load("StatEvent")
    product.query(product.analytics, f"update {RAW} set _exported_at = '2090-01-01'")
    product.query(
        product.analytics, "update analytics_raw._exporter_state set exported_at = '2090-01-01'"
    )
    product.dbt("build", "--quiet")
    fill(product.core, 11, 12)
    product.load("StatEvent")
    product.dbt("run", "--quiet")
    assert product.query(product.analytics, "select count(*) from analytics.stat_event") == [(12,)]


@pytest.mark.parametrize("batch", ["1", "1000"])
@pytest.mark.parametrize("words", [(), ("--full-refresh",)])
def test_rows_that_share_a_key_are_refused(
    place: Workplace, batch: str, words: tuple[str, ...]
) -> None:
    place.define(ITEM.replace("conflict_columns: [id]", "conflict_columns: [k]"))
    place.query(
        place.core,
        "create table item (id int primary key, k int not null, at timestamptz not null);"
        "insert into item select n, n % 100, now() - n * interval '1 minute'"
        " from generate_series(1, 101) n",
    )
    done = place.run("exporter", "load", *words, BATCH_SIZE=batch)
    assert done.returncode == 1
    assert "two rows of the source share conflict_columns (k): k=1, at=" in done.stderr
    assert "must be unique at the source" in done.stderr
    place.query(place.core, "delete from item where id = 101")
    place.load("Item", *words)
    compare(place, "public.item", "analytics_raw.item")
    place.query(place.core, "insert into item values (200, 7, now()), (201, 7, now())")
    done = place.run("exporter", "load", *words, BATCH_SIZE=batch)
    assert done.returncode == 1
    assert "share conflict_columns (k): k=7" in done.stderr


def test_rows_of_inheriting_tables_share_a_key(place: Workplace) -> None:
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null);"
        "create table child () inherits (item);"
        "insert into item values (1, '2026-01-01'); insert into child values (1, '2026-01-02')",
    )
    done = place.run("exporter", "load")
    assert done.returncode == 1
    assert "two rows of the source share conflict_columns (id): id=1, at=2026-01-0" in done.stderr


def test_a_refused_row_is_named_whatever_its_key_is_called(place: Workplace) -> None:
    place.define(ITEM.replace("id_field: id", "id_field: '100%s'").replace("[id]", "['100%s']"))
    place.query(
        place.core,
        'create table item ("100%s" int primary key, at timestamptz not null, v int);'
        "insert into item select n, now(), n from generate_series(1, 9) n",
    )
    place.load("Item")
    place.query(place.analytics, "alter table analytics_raw.item add check (v < 100)")
    place.query(place.core, "update item set v = 100, at = clock_timestamp() where v = 7")
    done = place.run("exporter", "load")
    assert done.returncode == 1
    assert "row 100%s=7" in done.stderr


def test_a_key_that_is_null_is_refused(place: Workplace) -> None:
    place.define(ITEM.replace("conflict_columns: [id]", "conflict_columns: [k]"))
    place.query(
        place.core,
        "create table item (id int primary key, k int unique, at timestamptz not null);"
        "insert into item values (1, 1, now()), (2, null, now())",
    )
    place.query(
        place.analytics,
        "create schema analytics_raw; create table analytics_raw.item (id int, k int unique,"
        " at timestamptz, _exported_at timestamptz)",
    )
    done = place.run("exporter", "load")
    assert done.returncode == 1
    assert "a row of the source has NULL in its key: k=NULL, at=" in done.stderr
    assert "id=2" in done.stderr


def test_ties_of_an_id_that_is_not_unique_stay_together(place: Workplace) -> None:
    """A load that is stopped inside a tie goes on with all of it."""
    definition = ITEM.replace("conflict_columns: [id]", "conflict_columns: [k]")
    place.define(definition.replace("id_field: id", "id_field: g"))
    place.query(
        place.core,
        "create table item (k int primary key, g int not null, at timestamptz not null);"
        "insert into item values (0, 0, '2020-01-01')",
    )
    place.load("Item")
    place.query(place.core, "insert into item select n, n / 10, '2026-01-01'"
                " from generate_series(1, 40) n; alter table item add check (true)")  # fmt: skip
    place.query(
        place.analytics,
        "alter table analytics_raw.item add constraint low check (k < 15)",
    )
    assert place.run("exporter", "load", BATCH_SIZE="4").returncode == 1
    place.query(place.analytics, "alter table analytics_raw.item drop constraint low")
    place.load("Item", BATCH_SIZE="4")
    compare(place, "public.item", "analytics_raw.item")


def test_the_order_is_that_of_the_tables_columns(place: Workplace) -> None:
    computed = 'columns: [id, at, {name: day, expression: "at::date"}]'
    place.define(ITEM.replace("table: item", f"table: item\n          {computed}"))
    place.query(place.core, "create table item (id int primary key, at timestamptz not null);"
                "insert into item select n, now() from generate_series(1, 9) n")  # fmt: skip
    place.load("Item")
    place.query(place.core, "insert into item values (10, now())")
    assert place.load("Item")["rows_written"] == 1


def test_full_refresh_removes_what_is_gone_and_shows_no_empty_table(product: Workplace) -> None:
    fill(product.core, 1, 5000)
    product.load("StatEvent")
    product.query(product.analytics, f"create view seen as select * from {RAW}")
    product.query(product.core, "delete from \"StatEvent\" where id > 'evt_000000004000'")
    fill(product.core, 5001, 5500)
    product.query(
        product.core, "update \"StatEvent\" set tag = 'old' where id < 'evt_000000000011'"
    )
    before = product.query(product.analytics, f"select count(*) from {RAW}")
    refused = product.run("exporter", "load", "StatEvent", "--full-refresh")
    assert refused.returncode == 1
    assert "1,000 of the 5,000 rows of raw (20 %) are gone at the source" in refused.stderr
    assert "exporter load StatEvent --full-refresh --max-deletes 20" in refused.stderr
    assert product.query(product.analytics, f"select count(*) from {RAW}") == before
    counts = []
    words = ["load", "StatEvent", "--full-refresh", "--max-deletes", "20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "exporter", *words],
        cwd=product.folder,
        env=product.environment,
    )
    with psycopg.connect(product.analytics, autocommit=True) as reader:
        while process.poll() is None:
            row = reader.execute("select count(*) from seen").fetchone()
            counts.append(row[0] if row else 0)
            time.sleep(0.01)
    assert process.returncode == 0
    assert set(counts) <= {5000, 4500}
    compare(product, EVENT, RAW)
    changed = (
        f"select count(*) from {RAW} where _exported_at > (select min(_exported_at) from {RAW})"
    )
    assert product.query(product.analytics, changed) == [(510,)]
    assert product.load("StatEvent")["rows_written"] == 0


def test_full_refresh_of_an_append_only_log(place: Workplace) -> None:
    place.define(ITEM.replace("        conflict_columns: [id]\n", ""))
    place.query(place.core, "create table item (id int primary key, at timestamptz not null)")
    place.query(place.core, "insert into item select n, now() from generate_series(1, 9) n")
    time.sleep(0.3)
    assert place.load("Item")["rows_read"] == 9
    place.query(place.core, "delete from item where id > 5")
    assert place.run("exporter", "load", "Item", "--full-refresh").returncode == 1
    assert place.load("Item", "--full-refresh", "--max-deletes", "50")["rows_read"] == 5
    assert place.load("Item")["rows_read"] == 0
    compare(place, "public.item", "analytics_raw.item", "id, at")


@pytest.mark.parametrize("side", ["core", "analytics"])
def test_sessions_terminated_in_the_middle(product: Workplace, side: str) -> None:
    fill(product.core, 1, 100)
    product.load("StatEvent")
    fill(product.core, 101, 15000)
    process = subprocess.Popen(
        [sys.executable, "-m", "exporter", "load", "StatEvent"],
        cwd=product.folder,
        env={**product.environment, "BATCH_SIZE": "200"},
        stderr=subprocess.PIPE,
        text=True,
    )
    terminated = 0
    url = product.core if side == "core" else product.analytics
    with psycopg.connect(url, autocommit=True) as connection:
        while process.poll() is None and terminated < 3:
            row = connection.execute(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity where"
                " application_name = 'dbt-exporter' and datname = current_database()"
                " and query ~* '^(copy|insert into .*stat_event|release|commit)'"
            ).fetchone()
            terminated += row[0] if row else 0
            time.sleep(0.02)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert terminated
    assert "connecting again" in said
    compare(product, EVENT, RAW)
