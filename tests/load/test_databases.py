"""Several sources and one destination: each definition reads from its own database or function."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import Workplace
from tests.load.test_dask import running_cluster

DOWN = "postgresql://nobody@127.0.0.1:1/none?connect_timeout=1"
SOURCES = """
version: 2
sources:
  - name: core
    schema: analytics_raw
    tables:
      - {name: item, config: {meta: {exporter: {key: Item, source: {table: item}}}}}
      - name: said
        config:
          meta: {exporter: {key: Said, source: {rows: "readers.said:rows"}, conflict_columns: [id]}}
  - name: billing
    schema: analytics_raw
    config: {meta: {exporter: {database: BILLING}}}
    tables:
      - name: invoice
        config: {meta: {exporter: {key: Invoice, source: {table: item}}}}
      - name: line
        config: {meta: {exporter: {key: Line, source: {table: line}}}}
      - name: again
        config: {meta: {exporter: {key: Again, source: {database: CORE, table: line}}}}
"""


FUNCTION = """
def rows(since):
    yield from ({"id": number, "text": f"4 {number}"} for number in range(1, 5))
"""


@pytest.fixture
def place(product: Workplace) -> Workplace:
    (product.folder / "models" / "sources.yml").write_text(SOURCES)
    (product.folder / "readers").mkdir()
    (product.folder / "readers" / "said.py").write_text(FUNCTION)
    return product


@pytest.fixture
def billing(place: Workplace) -> Iterator[str]:
    """A second source database, which has tables of the same names and other rows."""
    name = place.core.rpartition("/")[2].partition("?")[0]
    with psycopg.connect(place.core, autocommit=True) as session:
        session.execute(f"create database {name}_billing".encode())
        address = place.core.replace(f"/{name}", f"/{name}_billing")
        for target, rows in ((place.core, 3), (address, 5)):
            for table in ("item", "line"):
                place.query(
                    target,
                    f"create table {table} (id bigint primary key, text text); insert into {table}"
                    f" select i, '{rows} ' || i from generate_series(1, {rows}) i",
                )
        yield address
        session.execute(f"drop database {name}_billing with (force)".encode())


def _rows_of(place: Workplace, table: str) -> list[tuple[object, ...]]:
    return place.query(place.analytics, f"select text from analytics_raw.{table} order by id")


def _rows(place: Workplace) -> dict[str, list[tuple[object, ...]]]:
    return {table: _rows_of(place, table) for table in EXPECTED}


EXPECTED = {
    table: [(f"{rows} {i}",) for i in range(1, rows + 1)]
    for table, rows in (("item", 3), ("invoice", 5), ("line", 5), ("again", 3), ("said", 4))
}


@pytest.mark.parametrize("how", [(), ("-j", "3"), ("--max-connections", "1")])
def test_each_is_read_from_its_own(place: Workplace, billing: str, how: tuple[str, ...]) -> None:
    for _ in range(2):
        place.load(*how, DATABASE_URL_BILLING=billing)
        assert _rows(place) == EXPECTED
    done = place.run("exporter", "verify", DATABASE_URL_BILLING=billing)
    assert done.returncode == 0, done.stderr


def test_one_that_is_down_fails_alone(place: Workplace, billing: str) -> None:
    for how in ((), ("-j", "3")):
        done = place.run("exporter", "load", "--json", *how, DATABASE_URL_BILLING=DOWN)
        assert done.returncode == 1
        ended = {one["key"]: one["status"] for one in map(json.loads, done.stdout.splitlines())}
        del ended["StatEvent"]
        assert ended == {
            **{"Item": "ok", "Again": "ok", "Said": "ok"},
            **{"Invoice": "failed", "Line": "failed"},
        }
        assert _rows_of(place, "said") == EXPECTED["said"]
        assert "DATABASE_URL_BILLING" in done.stderr
    done = place.run("exporter", "status", "--json", DATABASE_URL_BILLING=DOWN)
    behind = {one["key"]: one["behind"] for one in map(json.loads, done.stdout.splitlines())}
    assert behind["Invoice"] is None
    assert behind["Item"]["rows"] == 0
    done = place.run("exporter", "check", "--json", DATABASE_URL_BILLING=DOWN)
    failed = [one for one in map(json.loads, done.stdout.splitlines()) if one["status"] == "fail"]
    assert [one["subject"] for one in failed] == ["billing"]
    place.load(DATABASE_URL_BILLING=billing)
    assert _rows(place) == EXPECTED


def test_a_missing_variable_names_its_definition(place: Workplace) -> None:
    for command in ("load", "verify"):
        done = place.run("exporter", command)
        assert done.returncode == 2
        assert "DATABASE_URL_BILLING is not set: models/sources.yml:15 reads" in done.stderr
    place.query(place.core, "create table item (id bigint primary key)")
    place.load("Item")  # and nobody asks for what is not read


def test_commands_know_of_it(place: Workplace, billing: str) -> None:
    place.load(DATABASE_URL_BILLING=billing)
    done = place.run("exporter", "check", "--grants", DATABASE_URL_BILLING=billing)
    _, _, script = done.stdout.partition("-- on the database of DATABASE_URL_BILLING")
    script, _, _ = script.partition("-- on")
    assert "_billing TO" in script
    assert "public.line TO" in script
    done = place.run("exporter", "check", DATABASE_URL_BILLING=billing)
    assert "billing connection: PostgreSQL" in done.stdout
    done = place.run("exporter", "state", "adopt", "Invoice", DATABASE_URL_BILLING=billing)
    assert "_billing" in done.stdout, done.stderr
    place.dbt("docs", "generate")
    done = place.run("exporter", "docs", DATABASE_URL_BILLING=billing)
    assert done.returncode == 0, done.stderr
    assert {
        "core.item ▸ core.item",
        "core.line ▸ billing.again",
        "billing.item ▸ billing.invoice",
        "billing.line ▸ billing.line",
        "python.readers.said:rows ▸ core.said",
    } < {*done.stdout.splitlines()}
    before = (place.folder / "target" / "manifest.json").read_text()
    place.run("exporter", "docs", DATABASE_URL_BILLING=billing)
    assert (place.folder / "target" / "manifest.json").read_text() == before
    catalog = json.loads((place.folder / "target" / "catalog.json").read_text())
    found = [one["metadata"]["database"] for one in catalog["sources"].values()]
    assert len({name for name in found if name and name.endswith("_billing")}) == 1


def test_a_position_is_of_one_database(place: Workplace, billing: str) -> None:
    place.load(DATABASE_URL_BILLING=billing)
    file = place.folder / "models" / "sources.yml"
    file.write_text(file.read_text().replace("{database: CORE, table", "{database: BILLING, table"))
    done = place.run("exporter", "load", "Again", DATABASE_URL_BILLING=billing)
    assert done.returncode == 1
    assert "DATABASE_URL_BILLING leads to" in done.stderr
    assert _rows(place) == EXPECTED


def test_new_writes_it(place: Workplace, billing: str) -> None:
    """Also for a table whose namesake in the core database is declared."""
    place.query(billing, 'create table "StatEvent" (id bigint primary key)')
    known = {"DATABASE_URL_BILLING": billing}
    done = place.run("exporter", "new", "--list", "--database", "BILLING", **known)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["TABLE", "StatEvent"]
    words = ("--database", "BILLING", "StatEvent", "--key", "Theirs", "--name", "theirs")
    done = place.run("exporter", "new", *words, **known)
    assert done.returncode == 0, done.stderr
    place.query(billing, 'insert into "StatEvent" values (7)')
    place.load("Theirs", **known)
    assert place.query(place.analytics, "select id from analytics_raw.theirs") == [(7,)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("{database: billing}", "such as BILLING"),
        ("{database: DATABASE_URL_BILLING-2}", "such as BILLING_2"),
        ("{databse: BILLING}", "has database alone"),
    ],
)
def test_what_is_wrong_is_refused(place: Workplace, wrong: str, said: str) -> None:
    file = place.folder / "models" / "sources.yml"
    file.write_text(SOURCES.replace("{database: BILLING}", wrong))
    done = place.run("exporter", "load")
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


@pytest.mark.long
def test_a_cluster_reads_from_each(place: Workplace, billing: str) -> None:
    """A first load that is large enough to go to the workers by ranges, too."""
    pytest.importorskip("distributed")
    place.query(
        billing,
        "insert into line select i, repeat(md5(i::text), 40) from generate_series(6, 55000) i",
    )
    place.query(billing, "vacuum analyze line")
    known = {"DATABASE_URL_BILLING": billing}
    with running_cluster(place, environments=(known, known)) as cluster:
        for _ in range(2):
            place.load("--scheduler", cluster.address, **known)
    expected, found = (
        place.query(
            address,
            f"select count(*), md5(string_agg(md5(text), ',' order by id)) from {table}",
        )
        for address, table in ((billing, "line"), (place.analytics, "analytics_raw.line"))
    )
    assert found == expected
    rows = _rows(place)
    del rows["line"]
    assert rows == {name: EXPECTED[name] for name in rows}
