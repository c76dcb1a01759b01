"""A destination on Citus, where DATABASE_URL_CITUS names one: a coordinator with worker nodes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from exporter.config.definition import parse
from exporter.errors import DefinitionError
from tests.conftest import Workplace, compare
from tests.helpers.processes import start_load, wait_unlocked
from tests.helpers.tables import ITEM

CITUS = os.environ.get("DATABASE_URL_CITUS", "")
on_citus = pytest.mark.skipif(not CITUS, reason="DATABASE_URL_CITUS names no Citus coordinator")
META = {
    "source": {"table": "item", "cursor": {"field": "at"}},
    "conflict_columns": ["tenant", "id"],
}


def test_the_distribution_column() -> None:
    where = {"where": "x.yml:1", "source": "raw", "table": "item", "schema": "raw"}
    assert parse(META, **where).destination.distribution_column == "tenant"
    assert (
        parse({**META, "distribution_column": "id"}, **where).destination.distribution_column
        == "id"
    )
    append = {"source": META["source"]}
    assert parse(append, **where).destination.distribution_column is None
    assert (
        parse({**append, "distribution_column": "at"}, **where).destination.distribution_column
        == "at"
    )
    with pytest.raises(DefinitionError, match="distribution_column must be one of"):
        parse({**META, "distribution_column": "at"}, **where)


@pytest.fixture
def spread(place: Workplace) -> Iterator[Workplace]:
    """A source of 20,000 items, and a schema of its own on Citus."""
    schema = f"raw_{uuid.uuid4().hex[:8]}"
    place.analytics = CITUS
    item = ITEM.replace("key: Item", f"key: {schema}\n        deletes: mark")
    place.define(item)
    sources = place.folder / "models" / "sources.yml"
    sources.write_text(
        sources.read_text().replace("analytics_raw", f"raw\n    schema: {schema}", 1)
    )
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null, doc json, n numeric);"
        "insert into item select n, now(), json_build_object('n', n), n / 10.0"
        " from generate_series(1, 20000) n; analyze item",
    )
    place.key, place.raw = schema, f"{schema}.item"
    yield place
    place.query(CITUS, f"drop schema if exists {schema} cascade")
    place.query(CITUS, f"delete from analytics_raw._exporter_state where key = '{schema}'")


COLUMNS = "id, at, doc::text, n"


@on_citus
def test_first_load_increments_and_deletes(spread: Workplace) -> None:
    first = spread.load("-j", "3", BATCH_SIZE="1000")
    assert first["rows_written"] == 20_000
    spread_by = (
        "select partmethod::text, column_to_column_name(logicalrelid, partkey)"
        f" from pg_dist_partition where logicalrelid = '{spread.raw}'::regclass"
    )
    assert spread.query(CITUS, spread_by) == [("h", "id")]
    compare(spread, "public.item", spread.raw, COLUMNS)
    spread.query(
        spread.core,
        "update item set n = n + 1, at = now() where id % 10 = 0;"
        "insert into item select n, now(), null, 1.50 from generate_series(20001, 20100) n",
    )
    assert spread.load()["rows_written"] == 2_100
    compare(spread, "public.item", spread.raw, COLUMNS)
    spread.run("exporter", "state", "reset", spread.key)
    assert spread.load()["rows_written"] == 0
    spread.query(spread.core, "delete from item where id <= 50; alter table item add column k int")
    spread.query(spread.core, "update item set k = 7, at = now() where id = 60")
    assert spread.load("--reconcile")["rows_deleted"] == 50
    spread.query(spread.core, "delete from item where id <= 55")
    assert spread.load("--full-refresh", "--max-deletes", "100")["rows_deleted"] == 5
    living = f"(select * from {spread.raw} where _deleted_at is null) item"
    compare(spread, "public.item", living, COLUMNS + ", k")
    assert "equal" in spread.run("exporter", "verify").stdout


@on_citus
def test_killed_and_resumed(spread: Workplace) -> None:
    for _ in range(3):
        process = start_load(spread, "-j", "3", BATCH_SIZE="100")
        while process.poll() is None:
            found = spread.query(CITUS, f"select to_regclass('{spread.raw}') is not null")
            if (
                found == [(True,)]
                and spread.query(CITUS, f"select count(*) from {spread.raw}")[0][0]
            ):
                break
        process.kill()
        process.communicate()
        wait_unlocked(spread)
        spread.query(spread.core, "update item set n = n + 1, at = now() where random() < 0.1")
    spread.load("-j", "3", BATCH_SIZE="1000")
    compare(spread, "public.item", spread.raw, COLUMNS)


@on_citus
def test_a_reference_table_is_used_as_it_is(spread: Workplace) -> None:
    spread.query(
        CITUS,
        f"create schema {spread.key}; create table {spread.raw} (id int primary key, at timestamptz"
        " not null, doc json, n numeric, _exported_at timestamptz not null);"
        f"select create_reference_table('{spread.raw}')",
    )
    spread.load()
    spread.query(spread.core, "update item set n = n + 1, at = now() where id % 10 = 0")
    assert spread.load()["rows_written"] == 2_000
    compare(spread, "public.item", spread.raw, COLUMNS)
    kind = "select partmethod::text from pg_dist_partition where logicalrelid = "
    assert spread.query(CITUS, f"{kind}'{spread.raw}'::regclass") == [("n",)]


@on_citus
def test_a_model_in_shards(bare: Workplace) -> None:
    schema = f"model_{uuid.uuid4().hex[:8]}"
    bare.analytics = CITUS
    (bare.folder / "models" / "spread.sql").write_text(
        "{{ config(materialized='incremental', incremental_strategy='upsert', unique_key='id',"
        f" schema='{schema}', meta={{'upsert_version': 'v', 'upsert_order_by': 'v',"
        " 'upsert_delete_when': 'gone'}, post_hook=\"{% if not is_incremental() %}"
        " select create_distributed_table('{{ this }}', 'id') {% endif %}\") }}"
        f" select id, v, n, doc, gone from {schema}.batch"
    )
    bare.query(
        CITUS,
        f"create schema {schema}; create table {schema}.batch as select n as id, 1 as v,"
        " n / 8.0 as n, json_build_object('n', n) as doc, false as gone"
        " from generate_series(1, 1000) n",
    )
    try:
        bare.dbt("run", "-s", "spread")
        spread_by = (
            "select partmethod::text from pg_dist_partition where logicalrelid ="
            f" '{schema}.spread'::regclass"
        )
        assert bare.query(CITUS, spread_by) == [("h",)]
        bare.query(
            CITUS,
            f"update {schema}.batch set v = 2, n = n + 1 where id <= 5;"
            f"update {schema}.batch set v = 2, gone = true where id = 6;"
            f"update {schema}.batch set v = 0, n = 99 where id = 7;"  # older: stays as it was
            f"update {schema}.batch set v = 0, gone = true where id = 8;"
            f"insert into {schema}.batch select n, 1, 1.50, null, false"
            " from generate_series(1001, 1010) n;"
            f"insert into {schema}.batch values (1001, 0, 0, null, false)",
        )
        wanted = (
            f"select id, v, n, doc::text, gone from {schema}.batch where v > 0 and not gone"
            f" union all select id, 1, id / 8.0, json_build_object('n', id)::text, false"
            f" from {schema}.batch where id in (7, 8)"
        )
        told = bare.dbt("run", "-s", "spread")
        assert "INSERT 0 15" in told
        found = bare.query(
            CITUS, f"select id, v, n, doc::text, gone from {schema}.spread order by 1"
        )
        assert found == bare.query(CITUS, f"{wanted} order by 1")
        assert "INSERT 0 0" in bare.dbt("run", "-s", "spread")
    finally:
        bare.query(CITUS, f"drop schema {schema} cascade")
