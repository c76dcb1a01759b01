"""`exporter new`: from a core database that nobody has seen before to rows in a staging model."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from exporter.config.keys import snake_case
from tests.conftest import ROOT, Workplace, as_role, compare

# Every table that loads without a question, its raw table, and what is read of it.
TABLES = {
    'public."Artist"': "artist",
    "public.albums": "albums",
    "public.track": "track",
    "public.customer": "customer",
    'sales."Order"': "order",
    'sales."OrderLine"': "order_line",
    "audit.log": "log",
    "public.payment": "payment",
    "public.playlist_track": "playlist_track",
}


@pytest.fixture
def shop(place: Workplace) -> Workplace:
    """An empty dbt project, its profile, and a core database full of a shop's tables."""
    (place.folder / "profiles.yml").write_bytes((ROOT / "profiles.yml.example").read_bytes())
    (place.folder / "models").rmdir()
    with psycopg.connect(place.core, autocommit=True) as connection:
        connection.execute((ROOT / "tests" / "shop.sql").read_bytes())
    return place


def _new(place: Workplace, *words: str) -> subprocess.CompletedProcess[str]:
    done = place.run("exporter", "new", *words, DATABASE_URL_ANALYTICS="")
    assert done.returncode == 0, done.stderr
    return done


def _declared(place: Workplace, name: str) -> dict[str, Any]:
    text = (place.folder / "models" / "staging" / f"stg_{name}.yml").read_text()
    return dict(yaml.safe_load(text)["sources"][0]["tables"][0]["config"]["meta"]["exporter"])


@pytest.mark.long
def test_every_table_of_a_shop_in_raw_and_in_a_model(shop: Workplace) -> None:
    for table in TABLES:
        done = _new(shop, table.replace('"', ""), "--yes")
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert "\x1b" not in done.stdout + done.stderr
    done = _new(shop, "latest_orders", "--conflict-columns", "id")
    assert shop.run("exporter", "load").returncode == 0
    built = shop.dbt("build", "--no-partial-parse")  # parses every file that was written
    assert "WARN=0 ERROR=0" in built
    for table, name in TABLES.items():
        compare(shop, table, f"analytics_raw.{name}")
        rows = shop.query(shop.analytics, f"select count(*) from public.stg_{name}")
        assert rows == shop.query(shop.core, f"select count(*) from {table}")
    columns = "select string_agg(column_name, ', ' order by ordinal_position)"
    columns += " from information_schema.columns where table_name = 'stg_{}'"
    assert shop.query(shop.analytics, columns.format("artist")) == [
        ("artist_id, name, website_url, created_at, updated_at, _exported_at",)
    ]
    assert shop.query(shop.analytics, 'select "order", "user" from stg_track limit 1')
    manifest = json.loads((shop.folder / "target" / "manifest.json").read_text())
    model = manifest["nodes"]["model.shop.stg_artist"]
    assert model["description"] == "Who made the music. {{ not a variable }}"
    assert model["columns"]["website_url"]["description"] == 'Where to read more: "https://…"'
    order = manifest["sources"]["source.shop.analytics_raw.order"]["columns"]
    assert order["state"]["description"] == "One of open, paid, sent back."
    assert order["customer_id"]["description"] == "References customer.customer_id."
    assert _new(shop, "--list", "--json").stdout == ""


@pytest.mark.long
def test_the_last_line_is_what_to_run_next(shop: Workplace) -> None:
    assert _new(shop, "track").stdout.splitlines()[-1] == (
        "exporter load track && dbt run -s stg_track"
    )
    urls = dict.fromkeys(("DATABASE_URL_CORE", "DATABASE_URL_ANALYTICS"), "")
    (shop.folder / ".env").write_text("".join(f"{n}={shop.environment[n]}\n" for n in urls))
    last = shop.run("exporter", "new", "orders", **urls).stdout.splitlines()[-1]
    assert last == "exporter load Order && dotenv run -- dbt run -s stg_order"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        last,
        shell=True,
        cwd=shop.folder,
        capture_output=True,
        text=True,
        check=False,
        env={n: v for n, v in shop.environment.items() if n not in urls} | {"PATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert shop.query(shop.analytics, "select count(*) from stg_order") == [(120,)]
    (shop.folder / ".env.old shop").touch()
    done = shop.run("exporter", "new", "albums", "--env", "old shop", "--key", "the albums")
    last = done.stdout.splitlines()[-1]
    assert last == "exporter load 'the albums' --env 'old shop' && dbt run -s stg_albums"
    here = Workplace(shop.folder.parent, shop.core, shop.analytics)
    done = here.run("exporter", "new", "customer", "--project-dir", shop.folder.name)
    assert done.stdout.splitlines()[-1].startswith(f"cd {shop.folder.name} && exporter load")


def test_what_is_written(shop: Workplace) -> None:
    _new(shop, "sales.OrderLine")
    assert _declared(shop, "order_line") == {
        "key": "OrderLine",
        "source": {"schema": "sales", "table": "OrderLine"},
        "conflict_columns": ["OrderID", "line_no"],
    }
    _new(shop, "customer")
    assert _declared(shop, "customer")["source"] == {
        "schema": "public",
        "table": "customer",
        "cursor": {"field": "modified", "id_field": "customer_id"},
    }
    done = _new(shop, "track", "--cursor", "last_update")
    assert _declared(shop, "track")["source"] == {
        "schema": "public",
        "table": "track",
        "cursor": {"field": "last_update", "id_field": "id", "nulls": "load"},
    }
    assert "rows without last_update are landed, too" in done.stderr
    assert "CREATE INDEX CONCURRENTLY ON public.track (last_update, id);" in done.stderr
    done = _new(shop, "albums", "--cursor", "id")
    assert "id tells new rows alone" in done.stderr
    assert "index" not in done.stderr
    assert "Limit: id tells" in (shop.folder / "models/staging/stg_albums.yml").read_text()
    _new(shop, "log")
    assert _declared(shop, "log") == {
        "key": "log",
        "source": {"schema": "audit", "table": "log"},
        "mode": "append",
    }


def test_a_cursor_is_taken_where_it_is_a_good_hint(shop: Workplace) -> None:
    for number, (column, index) in enumerate(
        [
            ("updated_at timestamptz not null", "(updated_at)"),
            ("updated_at timestamptz", "(updated_at)"),  # no row lacks it
            ("updated_at timestamptz", ""),
            ("updated_at timestamptz", "(id, updated_at)"),
            ("updated_at timestamptz", "(updated_at) where id > 3"),
            ("created_at timestamptz", "(created_at)"),  # does not tell changes
            ("updated_at timestamptz, modified_at timestamptz", "(updated_at)"),
        ]
    ):
        shop.query(shop.core, f"create table t{number} (id int primary key, {column})")
        shop.query(shop.core, f"insert into t{number} select 1, now()")
        if index:
            shop.query(shop.core, f"create index on t{number} {index}")
        _new(shop, f"t{number}", "--yes")
    found = [_declared(shop, f"t{number}")["source"] for number in range(7)]
    cursor = {"field": "updated_at", "id_field": "id"}
    assert [one.get("cursor") for one in found] == [cursor, cursor, *[None] * 5]
    shop.query(
        shop.core,
        "create table sparse (id int primary key, updated_at date);"
        " create index on sparse (updated_at); insert into sparse values (1)",
    )
    _new(shop, "sparse")  # a row without it: no hint
    assert "cursor" not in _declared(shop, "sparse")["source"]


def test_the_tables_that_have_no_definition(shop: Workplace) -> None:
    found = {
        one["table"]: one
        for one in map(json.loads, _new(shop, "--list", "--json").stdout.splitlines())
    }
    assert set(found) == {name.split(".")[1].strip('"') for name in TABLES} | {"latest_orders"}
    assert list(found["track"]) == [
        "schema", "table", "rows", "cursor", "candidates", "conflict_columns",
    ]  # fmt: skip
    assert (found["track"]["rows"], found["track"]["cursor"]) == (300, None)
    assert found["track"]["candidates"] == ["last_update"]
    assert found["customer"]["cursor"] == "modified"
    assert found["playlist_track"]["candidates"] == []
    _new(shop, "track")
    told = _new(shop, "--list").stdout
    assert max(map(len, told.splitlines())) <= 80
    assert "track " not in told.replace("playlist_track", "")
    assert "sales.OrderLine" in told


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("CUSTOMERS", "customer"),
        ("album", "albums"),
        ("order_line", "OrderLine"),
        ("sales.order", "Order"),
        ('"sales"."Order"', "Order"),
        ("Audit.Logs", "log"),
    ],
)
def test_a_table_is_found_as_people_write_it(shop: Workplace, written: str, found: str) -> None:
    assert f"exporter load {found} " in _new(shop, written).stdout


def test_nothing_is_overwritten_or_declared_twice(shop: Workplace) -> None:
    _new(shop, "customer")
    file = shop.folder / "models" / "staging" / "stg_customer.sql"
    file.write_text("-- mine")
    done = shop.run("exporter", "new", "customer")
    assert done.returncode == 2
    assert "declared already, in models/staging/stg_customer.yml" in done.stderr
    shop.query(shop.core, "create table sales.customer (id int primary key)")
    assert "exporter load sales.customer && dbt run -s stg_sales_customer" in (
        _new(shop, "sales.customer").stdout
    )
    moved = shop.folder / "models" / "marts"
    moved.mkdir()
    (moved / "stg_albums.sql").write_text("select 1")
    done = shop.run("exporter", "new", "albums")
    assert done.returncode == 2
    assert "models/marts/stg_albums.sql is there already" in done.stderr
    assert not (shop.folder / "models" / "staging" / "stg_albums.yml").exists()
    _new(shop, "albums", "--name", "records", "--key", "Records")
    assert _declared(shop, "records")["key"] == "Records"
    for words in (("--name", "records"), ("--key", "Records")):
        assert "is taken" in shop.run("exporter", "new", "track", *words).stderr
    assert file.read_text() == "-- mine"
    shop.query(shop.core, "create table schema_migrations (id int primary key)")  # dbmate's, too
    assert "stg_public_schema_migrations" in _new(shop, "schema_migrations").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("custmer",), "did you mean customer?"),
        (("words",), "has no timestamp, date or integer"),
        (("playlist_track", "--id-field", "track"), "--cursor COLUMN names one"),
        (("latest_orders",), "--conflict-columns A,B, or --append"),
        (("latest_orders", "--conflict-columns", "idd"), "did you mean id?"),
        (("customer", "--cursor", "mail"), "a cursor is a timestamp, a date or an integer"),
        (("customer", "--cursor", "modifed"), "did you mean modified?"),
        (("doubtful",), "which column grows with every change of a row? changed_at, edited_at"),
        (("twin",), "name one: one.twin or two.twin"),
        (("customer", "--name", "a-b"), "letters, digits and _"),
        ((), "exporter new --list"),
        (("customer", "--list"), "exporter new --list"),
    ],
)
def test_what_cannot_be_known_is_asked_for(
    shop: Workplace, words: tuple[str, ...], said: str
) -> None:
    shop.query(
        shop.core,
        "create view doubtful as select now() as changed_at, now() as edited_at;"
        " create view words as select 'a' as word;"
        " create schema one; create schema two; create table one.twin (); create table two.twin ()",
    )
    done = shop.run("exporter", "new", "--yes", *words)
    assert done.returncode in (1, 2)
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (shop.folder / "models").exists()


def test_a_question_on_a_terminal(shop: Workplace) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "exporter", "new", "latest_orders"],
        cwd=shop.folder,
        env={**shop.environment, "PYTHONPATH": str(ROOT)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while b"rows apart?" not in shown:
        shown += os.read(ours, 1000)
    os.write(ours, b"id, stat\n")
    while b"did you mean state?" not in shown:
        shown += os.read(ours, 1000)
    os.write(ours, b"id, state\n")
    while b"dbt run -s" not in shown:
        shown += os.read(ours, 1000)
    assert process.wait() == 0
    os.close(ours)
    assert _declared(shop, "latest_orders")["conflict_columns"] == ["id", "state"]


def test_tables_that_may_not_be_read(shop: Workplace) -> None:
    ours, role = shop.core, f"reader_{uuid.uuid4().hex[:8]}"
    shop.query(ours, f"create role {role} login password 'secret'")
    shop.core = as_role(ours, role)
    assert " -  " in _new(shop, "--list").stdout
    done = _new(shop, "customer")
    assert f"GRANT SELECT ON public.customer TO {role};" in done.stderr
    shop.query(ours, f"drop owned by {role}; drop role {role}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("StatEvent", "stat_event"),
        ("InvoiceID", "invoice_id"),
        ("websiteURL", "website_url"),
        ("HTTPServer", "http_server"),
        ("Order Lines", "order_lines"),
        ("already_snake", "already_snake"),
        ("Größe", "größe"),
        ("col-2", "col_2"),
    ],
)
def test_names_in_snake_case(name: str, expected: str) -> None:
    assert snake_case(name) == expected
