"""--dry-run says what a load then does, and touches nothing."""

from __future__ import annotations

import json
import re
from typing import Any

import psycopg
import pytest

from exporter.config.project import definitions
from exporter.state.position import lock_number
from tests.conftest import Workplace, fill

RAW = "analytics_raw.stat_event"
STAMP = r"'20\d\d-[^']+'::timestamptz"


def _rehearse(place: Workplace, *words: str) -> dict[str, Any]:
    done = place.run("exporter", "load", "--dry-run", "--json", *words)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def _everything(place: Workplace) -> list[tuple[Any, ...]]:
    """What a load could leave in the destination: relations, columns, rows, locks."""
    found = place.query(
        place.analytics,
        "select attrelid::regclass::text, attname, atttypid, attnotnull from pg_attribute a"
        " join pg_class c on c.oid = attrelid where relnamespace::regnamespace::text not like"
        " 'pg\\_%' and relnamespace::regnamespace::text <> 'information_schema' order by 1, 2",
    )
    for table in ("stat_event", "_exporter_state", "_exporter_runs"):
        there = f"select to_regclass('analytics_raw.{table}') is not null"
        if place.query(place.analytics, there)[0][0]:
            rows = "select md5(string_agg(t::text || xmin, ',' order by t::text))"
            found += place.query(place.analytics, f"{rows} from analytics_raw.{table} t")
    for url in (place.core, place.analytics):
        held = "select count(*) from pg_locks l join pg_database d on d.oid = l.database"
        held += " where datname = current_database() and pid <> pg_backend_pid()"
        found += place.query(url, held)
    return found


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("first load", ()),
        ("increment", ()),
        ("backfill", ("StatEvent", "--since", "2020-01-01")),
        ("full refresh", ("--full-refresh",)),
    ],
)
def test_it_says_what_the_load_then_does(
    product: Workplace, path: str, words: tuple[str, ...]
) -> None:
    fill(product.core, 1, 3000)
    if path != "first load":
        product.load()
        fill(product.core, 3001, 3500)
    before = _everything(product)
    said = _rehearse(product, *words)
    people = product.run("exporter", "load", "--dry-run", *words)
    assert _everything(product) == before
    done = product.run("exporter", "load", "-v", "--json", "--log-format", "json", *words)
    result = json.loads(done.stdout)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    told = {one["event"]: one for one in events}
    assert (said["path"], said["how"]) == (told["path"]["path"], told["path"]["how"])
    assert said["path"] == path
    stamped = re.sub(STAMP, "STAMP", said["source"][0])
    assert stamped == re.sub(STAMP, "STAMP", told["sql"]["sql"])
    assert 0 < said["rows_expected"] <= 3500  # the planner's
    assert result["rows_read"] > 0
    assert said["safe"]
    assert bool(said["changes"]) == (path == "first load")
    assert len(product.query(product.core, said["source"][0])) > 0
    assert people.stdout.startswith(f"StatEvent: {path}, ")
    assert said["source"][0].partition("::timestamptz")[0][:60] in people.stdout


def test_the_statements_for_raw_are_those_of_the_load(product: Workplace) -> None:
    fill(product.core, 1, 100)
    said = _rehearse(product)
    create, key = said["changes"]
    assert create.startswith('create table "analytics_raw"."stat_event" (')
    assert key == 'alter table "analytics_raw"."stat_event" add primary key ("id")'
    assert said["raw"][0].startswith('copy "analytics_raw"."stat_event" (')
    product.query(product.analytics, f"create schema analytics_raw; {create}; {key}")
    product.load()  # takes the table as it is
    product.query(product.core, 'alter table "StatEvent" add note text')
    before = _everything(product)
    said = _rehearse(product)
    assert said["changes"] == ['alter table "analytics_raw"."stat_event" add column "note" text']
    assert [one.partition(" as d")[0] for one in said["raw"]] == [
        'insert into "analytics_raw"."stat_event"'
    ] * 2
    assert _everything(product) == before


def test_a_role_that_may_only_read_is_enough_and_a_lock_does_no_harm(product: Workplace) -> None:
    fill(product.core, 1, 100)
    product.load()
    name = product.analytics.rpartition("/")[2].partition("?")[0]
    product.query(
        product.analytics,
        f"create role reader_{name} login; grant usage on schema analytics_raw to reader_{name};"
        f" grant select on all tables in schema analytics_raw to reader_{name}",
    )
    owner, product.analytics = (
        product.analytics,
        product.analytics.replace("postgres@", f"reader_{name}@"),
    )
    number = lock_number(definitions(product.folder)[0].destination)
    with psycopg.connect(owner, application_name="the other") as other:
        other.execute("select pg_advisory_lock(%s)", (number,))
        assert "the other" in _rehearse(product)["locked_by"]
    assert _rehearse(product)["locked_by"] is None
    product.analytics = owner
    product.query(owner, f"drop owned by reader_{name}; drop role reader_{name}")


def test_what_cannot_be_loaded_is_told(product: Workplace) -> None:
    product.query(product.core, 'drop table "StatEvent"')
    done = product.run("exporter", "load", "--dry-run")
    assert (done.returncode, done.stdout) == (1, "")
    assert "has no table" in done.stderr
    assert product.run("exporter", "load", "--dry-run", "--reconcile").returncode == 2
    there = "select to_regnamespace('analytics_raw')"
    assert product.query(product.analytics, there) == [(None,)]
