"""Stamps of any zone, dated ahead, behind the clock: no row is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from tests.conftest import Workplace, compare
from tests.helpers.tables import ITEM as SMALL

# What a scan would find, whatever its stamp is, the cursor has to find here.
ITEM = SMALL.replace("table: item", "table: item\n          read: cursor\n          sweep: never")

ZONES = ("Pacific/Honolulu", "America/New_York", "UTC", "Asia/Tokyo")


def _table(place: Workplace, kind: str, stamp: str, index: str, rows: int = 3000) -> None:
    place.define(ITEM)
    place.query(
        place.core,
        f"create table item (id serial primary key, at {kind} not null, v int default 0); {index};"
        f"insert into item (at) select {stamp} - n * interval '1 second'"
        f" from generate_series({rows}, 1, -1) n; analyze item",
    )


@contextmanager
def _open(place: Workplace, statement: str) -> Iterator[None]:
    """Run a statement in a transaction that is committed at the end."""
    with psycopg.connect(place.core) as late:
        late.execute(statement.encode())
        yield
        late.commit()


INDEX = "create index on item (at, id)"


def _cases() -> Iterator[Any]:
    """Every combination; `make test` takes one zone on either side, and what differs most."""
    for zone in ZONES:
        for ahead in ("", "20 minutes", "1 year", "infinity"):
            for index in (INDEX, ""):
                short = zone == "Pacific/Honolulu" or (zone == "Asia/Tokyo" and ahead == "1 year")
                yield pytest.param(zone, ahead, index, marks=() if short else pytest.mark.long)


@pytest.mark.parametrize(("zone", "ahead", "index"), [*_cases()])
def test_local_times_of_any_zone(place: Workplace, zone: str, ahead: str, index: str) -> None:
    now = f"(now() at time zone '{zone}')"
    _table(place, "timestamp", now, index)
    if ahead:
        stamp = "'infinity'" if ahead == "infinity" else f"{now} + interval '{ahead}'"
        place.query(place.core, f"insert into item (at) values ({stamp})")
    with _open(place, f"insert into item (at) select {now} from generate_series(1, 5)"):
        place.query(place.core, f"insert into item (at) values ({now})")
        place.load("Item")
    place.load("Item")
    compare(place, "public.item", "analytics_raw.item")
    with _open(place, f"update item set v = 1, at = {now} where id % 500 = 0"):
        place.query(place.core, f"insert into item (at) select {now} from generate_series(1, 100)")
        place.load("Item")
    place.load("Item")
    compare(place, "public.item", "analytics_raw.item")
    assert place.load("Item")["rows_written"] == 0


@pytest.mark.parametrize("zone", ZONES)
def test_rows_of_a_day_that_is_not_over(place: Workplace, zone: str) -> None:
    now = f"(now() at time zone '{zone}')"
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int primary key, at date not null);"
        f"insert into item select n, {now}::date from generate_series(100, 200) n",
    )
    place.load("Item")
    place.query(place.core, f"insert into item select n, {now}::date from generate_series(1, 9) n")
    place.load("Item")
    compare(place, "public.item", "analytics_raw.item")


def test_a_lookback_counts_from_the_newest_row(place: Workplace) -> None:
    """A table that another pipeline feeds, hours behind the clock."""
    stamp = "clock_timestamp() - interval '5 hours'"
    _table(place, "timestamptz", stamp, INDEX)
    place.define(ITEM.replace("id_field: id", "id_field: id, lookback: 1 minute"))
    place.load("Item")
    place.query(place.core, f"insert into item (at) values ({stamp} - interval '10 seconds')")
    place.load("Item")
    compare(place, "public.item", "analytics_raw.item")


def test_a_clock_that_went_back(place: Workplace) -> None:
    _table(place, "timestamptz", "now()", INDEX)
    place.load("Item")
    place.query(
        place.analytics,
        "update analytics_raw._exporter_state set binding = jsonb_set(binding,"
        " '{source,clock}', to_jsonb((now() + interval '2 hours')::text))",
    )
    place.query(
        place.core, "insert into item (at) values (clock_timestamp() - interval '90 minutes')"
    )
    done = place.run("exporter", "load")
    assert done.returncode == 0
    assert "the source's clock went back" in done.stderr
    compare(place, "public.item", "analytics_raw.item")
    assert place.run("exporter", "load").stderr == ""


def test_newest_rows_that_are_gone(place: Workplace) -> None:
    _table(place, "timestamptz", "now()", INDEX)
    place.load("Item")
    place.query(
        place.core,
        "delete from item where at > now() - interval '20 minutes';"
        "insert into item (at) values (now() - interval '25 minutes')",
    )
    done = place.run("exporter", "load")
    assert done.returncode == 0
    assert "lies behind the position" in done.stderr
    found = place.query(place.analytics, "select count(*) from analytics_raw.item where id > 3000")
    assert found == [(1,)]
    assert place.run("exporter", "load").stderr == ""


def test_writers_that_cannot_be_seen_are_told_of(place: Workplace) -> None:
    place.query(
        place.core,
        "create extension postgres_fdw; create schema far;"
        "create table far.item (id int primary key, at timestamptz default now());"
        "insert into far.item values (1);"
        "do $$ begin execute format('create server loop foreign data wrapper postgres_fdw options"
        " (dbname %L, host %L)', current_database(), current_setting('unix_socket_directories'));"
        " end $$; create user mapping for public server loop options (user 'postgres');"
        "create foreign table item (id int not null, at timestamptz not null) server loop"
        " options (schema_name 'far')",
    )
    place.define(ITEM)
    done = place.run("exporter", "load")
    assert done.returncode == 0, done.stderr
    assert "public.item is a foreign table" in done.stderr
    assert "only the lookback covers them" in done.stderr


def test_a_log_whose_newest_rows_are_removed_at_the_source(place: Workplace) -> None:
    _table(place, "timestamptz", "now() - interval '1 hour'", INDEX, rows=20)
    place.define(ITEM.replace("        conflict_columns: [id]\n", ""))
    assert place.load("Item")["rows_written"] == 20
    place.query(place.core, "delete from item where id > 15")
    assert place.run("exporter", "load").stderr == ""
    place.query(
        place.core, "insert into item (at) values (now() - interval '2 hours' - interval '1 s')"
    )
    done = place.run("exporter", "load")
    assert done.returncode == 1
    assert "lies behind the position" in done.stderr
    assert "state adopt Item" in done.stderr
    assert place.run("exporter", "state", "adopt", "Item").returncode == 0
    assert place.run("exporter", "load").returncode == 0
