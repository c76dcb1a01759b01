"""`exporter new --all`: every table of a core database, in one go and without a question."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from tests.conftest import ROOT, Workplace, as_role, compare

# The tables of shapes.sql, their raw tables, and how they are read.
TABLES = {
    '"2024"': ("2024", "by scan of 0 kB a load"),
    "coupon": ("coupon", "by updated_at, and by scan of 8 kB a load"),
    "customer": ("customer", "by scan of 8 kB a load"),
    "measurement": ("measurement", "by scan of 24 kB a load"),
    "orders": ("orders", "by scan of 8 kB a load"),
    "page_view": ("page_view", "a log, by scan of 8 kB a load"),
    '"select"': ("select", "by scan of 8 kB a load"),
    '"Orders"': ("public_orders", "by scan of 8 kB a load"),
    '"UserAccount"': ("user_account", "by scan of 8 kB a load"),
    '"Back Office".customer': ("back_office_customer", "by scan of 8 kB a load"),
}


@pytest.fixture
def empty(place: Workplace) -> Workplace:
    """An empty dbt project and its profile."""
    (place.folder / "profiles.yml").write_bytes((ROOT / "profiles.yml.example").read_bytes())
    (place.folder / "models").rmdir()
    return place


@pytest.fixture
def shapes(empty: Workplace) -> Workplace:
    """The same, and a core database with ten tables and a view."""
    with psycopg.connect(empty.core, autocommit=True) as connection:
        connection.execute((ROOT / "tests" / "scaffold" / "shapes.sql").read_bytes())
    return empty


def _files(place: Workplace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.folder.rglob("stg_*.*")}


def _written(place: Workplace) -> dict[str, dict[str, Any]]:
    """What the exporter is told of each table, by the name of its raw table."""
    found = {}
    for path in place.folder.rglob("stg_*.yml"):
        table = yaml.safe_load(path.read_text())["sources"][0]["tables"][0]
        found[table["name"]] = table["config"]["meta"]["exporter"]
    return found


def _compare(place: Workplace) -> None:
    for table, (raw, _) in TABLES.items():
        columns = place.query(
            place.core,
            "select string_agg(quote_ident(attname) || '::text', ', ' order by attnum) from"
            f" pg_attribute where attrelid = '{table}'::regclass and attnum > 0",
        )[0][0]
        compare(place, table, f'analytics_raw."{raw}"', columns)


def test_every_table_loads_and_builds_without_an_edit(shapes: Workplace) -> None:
    done = shapes.run("exporter", "new", "--all", "--yes", DATABASE_URL_ANALYTICS="")
    assert done.returncode == 0, done.stderr
    head, *lines, last = done.stdout.splitlines()
    assert head.split() == ["TABLE", "MODEL", "READ"]
    assert [line.split("  ")[0].strip() for line in lines] == [
        name.replace('"', "") for name in TABLES
    ]
    for line, (raw, reads) in zip(lines, TABLES.values(), strict=True):
        assert line.split()[-len(reads.split()) - 1 :] == [f"stg_{raw}", *reads.split()]
    assert "happy_users: left out: a view" in done.stderr
    assert "page_view: an append-only log: every version of a row" in done.stderr
    assert last == "exporter load && dbt build"
    for command in last.split(" && "):
        done = shapes.run(*command.split())
        assert done.returncode == 0, done.stdout + done.stderr
    assert "WARN=0 ERROR=0 SKIP=0" in done.stdout
    _compare(shapes)
    for table, (raw, _) in TABLES.items():
        rows = shapes.query(shapes.analytics, f"select count(*) from stg_{raw}")
        assert rows == shapes.query(shapes.core, f"select count(*) from {table}")
    # No column tells of these changes.
    shapes.query(
        shapes.core,
        """update "UserAccount" set "Mood" = 'happy'; update "Orders" set note = 'paid';
        update measurement set sensor = 9 where sensor = 1 and day < '2026-01-01';
        update "Back Office".customer set net = 1; insert into "2024" default values;
        insert into page_view values (now() - interval '1 year', '/late'), (null, null)""",
    )
    shapes.query(shapes.core, "alter table coupon alter updated_at set default '2000-01-01'")
    shapes.query(shapes.core, "insert into coupon values ('late')")
    assert shapes.run("exporter", "load").returncode == 0
    shapes.query(
        shapes.analytics,
        "delete from analytics_raw.measurement where sensor = 1 and day < '2026-01-01'",
    )  # the old keys: deletes are ignored unless they are declared
    _compare(shapes)


def test_a_second_run_writes_what_is_new_alone(shapes: Workplace) -> None:
    assert shapes.run("exporter", "new", "coupon").returncode == 0
    mine = shapes.folder / "models" / "staging" / "stg_coupon.sql"
    mine.write_text("-- mine")
    assert shapes.run("exporter", "new", "--all").returncode == 0
    before = _files(shapes)
    assert before["stg_coupon.sql"] == b"-- mine"
    assert len(before) == 2 * len(TABLES)
    done = shapes.run("exporter", "new", "--all")
    assert (done.returncode, done.stdout) == (0, "")
    assert "declared already, and left as they are: 10" in done.stderr
    assert "every table has a definition" in done.stderr
    shapes.query(shapes.core, "create table later (id int primary key)")
    done = shapes.run("exporter", "new", "--all")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["TABLE", "later", "exporter"]
    assert {name: text for name, text in _files(shapes).items() if "later" not in name} == before


def test_what_is_declared(shapes: Workplace) -> None:
    assert shapes.run("exporter", "new", "--all").returncode == 0
    found = _written(shapes)
    assert found["coupon"] == {
        "key": "coupon",
        "source": {
            "schema": "public",
            "table": "coupon",
            "cursor": {"field": "updated_at", "id_field": "code"},
        },
        "conflict_columns": ["code"],
    }
    assert found["page_view"] == {
        "key": "page_view",
        "source": {"schema": "public", "table": "page_view"},
        "mode": "append",
    }
    assert found["customer"]["source"] == {"schema": "public", "table": "customer"}
    assert found["back_office_customer"]["key"] == "Back Office.customer"
    assert {one["source"]["table"]: name for name, one in found.items() if "rders" in name} == {
        "orders": "orders",
        "Orders": "public_orders",
    }


LEFT = """
create table fine (id int primary key);
create table secret (id int primary key);
create table policed (id int primary key);
alter table policed enable row level security;
create foreign data wrapper nothing; create server far foreign data wrapper nothing;
create foreign table far_away (id int not null) server far;
create table spread (id int) partition by range (id);
create foreign table spread_far partition of spread for values from (1) to (2) server far;
create materialized view counted as select count(*) from fine;
create view seen as select * from fine;
create table "AVeryLongNameOfATableThatGetsUnderscoresInAnalyticsAndIsThenTooLong" (id int);
create table twin (id int primary key);
create table "Twin" (id int primary key);
create table "TWIN" (id int primary key);
create table loaded (id int primary key, _exported_at timestamptz);
create table jinja (id int primary key, "{{ boom }}" text);
create table parent (id int primary key); create table child (x int) inherits (parent);
create table maybe (code text unique);
create table empty ();
create table mine (id int primary key);
create table locked (id int primary key);
"""


def test_what_is_left_out_is_listed_with_the_reason(empty: Workplace) -> None:
    empty.query(empty.core, LEFT)
    owner, role = empty.core, f"reader_{uuid.uuid4().hex[:8]}"
    empty.query(
        owner,
        f"create role {role} login password 'secret'; grant select on all tables in schema public"
        f" to {role}; revoke select on secret from {role}",
    )
    empty.core = as_role(owner, role)
    theirs = empty.folder / "models" / "crm" / "STG_Mine.sql"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("select 1 as id")
    with psycopg.connect(owner) as other:
        other.execute("lock locked")
        done = empty.run("exporter", "new", "--all")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    told = done.stderr.splitlines()
    for words in (
        "secret: left out: public.secret cannot be read",
        f"  → GRANT SELECT ON public.secret TO {role};",
        "policed: left out: row security hides rows of public.policed from this role",
        "counted: left out: a materialized view",
        "far_away: left out: a foreign table",
        "seen: left out: a view",
        "Twin: left out: public_twin is taken",
        "parent: left out: which columns tell its rows apart?",
        "empty: left out: it has no column",
        "jinja: left out: dbt would run the name {{ boom }} as Jinja",
        "mine: left out: models/crm/STG_Mine.sql is there already, and is left alone",
        "locked: left out: canceling statement due to lock timeout",
        "spread: left out: public.spread is made of foreign tables",
        "maybe: (code) may be null, and so tells no rows apart",
    ):
        assert any(line.removeprefix("exporter: ").startswith(words) for line in told), (
            words,
            told,
        )
    assert "longer than the 63 bytes" in done.stderr
    assert "loaded: left out: the source has a column _exported_at" in done.stderr
    assert set(_written(empty)) == {"fine", "twin", "public_twin", "child", "maybe"}
    assert theirs.read_text() == "select 1 as id"
    assert empty.run("exporter", "load").returncode == 0
    # What is left out on purpose is no failure, nor are views.
    left = ("secret", "pol*", "AVery*", "Twin", "parent", "empty", "j*", "mine", "lo*", "sp*")
    done = empty.run("exporter", "new", "--all", *(f"--exclude={name}" for name in left))
    assert done.returncode == 0, done.stderr
    assert "seen" in done.stderr
    empty.query(owner, f"drop owned by {role}; drop role {role}")


def test_schemas_and_patterns(shapes: Workplace) -> None:
    done = shapes.run("exporter", "new", "--all", "--schema", "Back Office")
    assert done.returncode == 0
    assert set(_written(shapes)) == {"customer"}
    done = shapes.run("exporter", "new", "--all", "--exclude", "public.o*", "--exclude", "[A-Z2]*")
    assert done.returncode == 0
    assert {"orders", "public_orders", "2024"}.isdisjoint(_written(shapes))
    assert "public_customer" in _written(shapes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--all", "--exclude", "userz"), "--exclude userz fits no table"),
        (("--all", "--schema", "Back office"), "did you mean Back Office?"),
        (("--all", "--exclude", "*"), "there is no table to declare"),
        (("--all", "orders"), "takes a TABLE, --list or --all"),
        (("--all", "--list"), "takes a TABLE, --list or --all"),
        (("--all", "--cursor", "at"), "--cursor is not for --all"),
        (("--all", "--append"), "--append is not for --all"),
        (("orders", "--exclude", "x"), "--exclude is for --all"),
        (("--list", "--schema", "public"), "--schema is for --all"),
    ],
)
def test_wrong_usage_writes_nothing(shapes: Workplace, words: tuple[str, ...], said: str) -> None:
    done = shapes.run("exporter", "new", *words)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert not (shapes.folder / "models").exists()


def test_one_database_for_both(shapes: Workplace) -> None:
    shapes.analytics = shapes.core
    assert shapes.run("exporter", "new", "--all").returncode == 0
    before = _files(shapes)
    assert shapes.run("exporter", "load").returncode == 0
    done = shapes.run("exporter", "new", "--all")
    assert done.returncode == 2
    assert "exporter new --all --schema public" in done.stderr
    done = shapes.run("exporter", "new", "--all", "--schema", "analytics_raw")
    assert (done.returncode, done.stdout) == (2, "")
    done = shapes.run("exporter", "new", "--all", "--schema", "public", "--schema", "Back Office")
    assert (done.returncode, done.stdout) == (0, "")
    assert _files(shapes) == before


def test_a_folder_that_cannot_be_written(shapes: Workplace) -> None:
    (shapes.folder / "models").write_text("a file")
    done = shapes.run("exporter", "new", "coupon")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert Path("models") / "staging" not in shapes.folder.rglob("*")
