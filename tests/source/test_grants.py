"""A role that may read some columns of a table: the load reads these, and asks for no more."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import Workplace, as_role, compare
from tests.helpers.processes import started, until
from tests.helpers.tables import ITEM

COLUMNS = ITEM.replace("table: item", "table: item\n          columns: [id, at, v]")


@pytest.fixture
def reader(place: Workplace) -> Iterator[Workplace]:
    """Items of which a role may read three columns; ``place.query`` with ``core`` stays with ours.

    ``core`` of what is returned leads there as that role.
    """
    role = f"reader_{uuid.uuid4().hex[:8]}"
    place.define(COLUMNS)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null, v int, secret text);"
        "insert into item select n, now(), n, 'x' from generate_series(1, 20) n;"
        f"create role {role} login password 'secret';"
        f"grant select (id, at, v) on item to {role}",
    )
    yield Workplace(place.folder, as_role(place.core, role), place.analytics)
    place.query(place.core, f"drop owned by {role}; drop role {role}")


def _same(place: Workplace) -> None:
    compare(place, "public.item", "analytics_raw.item", "id, at, v")


def test_granted_columns_are_enough(place: Workplace, reader: Workplace) -> None:
    assert reader.load("Item")["rows_written"] == 20
    place.query(place.core, "update item set at = clock_timestamp(), v = 0 where id < 5")
    place.query(place.core, "insert into item values (100, clock_timestamp(), 1, 'x')")
    assert reader.load("Item")["rows_written"] == 5
    place.query(place.core, "delete from item where id = 7")
    reader.load("Item", "--full-refresh")
    _same(place)
    assert reader.run("exporter", "verify", "Item").returncode == 0


def test_first_load_by_ranges_where_the_places_of_rows_may_be_read(
    place: Workplace, reader: Workplace
) -> None:
    role = reader.core.split("//")[1].split(":")[0]
    place.query(place.core, f"grant select (xmin, ctid) on item to {role}")
    place.query(
        place.core,
        "insert into item select n, now(), n, repeat('x', 900) from generate_series(21, 30000) n;"
        "analyze item",
    )
    done = reader.run("exporter", "load", "-v", "-j", "2", "Item", BATCH_SIZE="2000")
    assert done.returncode == 0, done.stderr
    assert "straight into raw" in done.stderr
    place.query(place.core, "update item set at = clock_timestamp() where id < 5")
    assert reader.load("Item")["rows_written"] == 4
    _same(place)


def test_columns_that_may_not_be_read_are_named(place: Workplace, reader: Workplace) -> None:
    place.define(ITEM)
    for command in ("load", "check"):
        done = reader.run("exporter", command, "Item")
        assert done.returncode == 1
        told = " ".join((done.stdout + done.stderr).split())
        assert 'may not read "secret" of public.item' in told
        assert 'grant select ("secret") on "public"."item"' in told
    place.define(COLUMNS)
    done = reader.run("exporter", "check", "Item")
    assert done.returncode == 0
    assert "xmin, ctid of public.item cannot be read" in " ".join(done.stdout.split())
    role = reader.core.split("//")[1].split(":")[0]
    place.query(
        place.core, f"revoke all on item from {role}; revoke all (id, at, v) on item from {role}"
    )
    done = reader.run("exporter", "load", "Item")
    assert done.returncode == 1
    assert "permission denied for table item" in done.stderr
    assert "GRANT SELECT ON public.item" in reader.run("exporter", "check", "Item").stdout


@pytest.mark.parametrize("way", ["cursor", "scan"])
def test_a_right_to_a_partitioned_table_is_enough(
    place: Workplace, reader: Workplace, way: str
) -> None:
    role = reader.core.split("//")[1].split(":")[0]
    part = "create table part_{0} partition of whole for values from ({0}) to ({1})"
    place.query(
        place.core,
        "create table whole (id int primary key, at timestamptz not null, v int)"
        f" partition by range (id); {part.format(0, 50)};"
        "insert into whole select n, now(), n from generate_series(1, 20) n;"
        f"grant select on whole to {role}",
    )
    place.define(COLUMNS.replace("table: item", f"table: whole\n          read: {way}"))
    assert reader.load("Item")["rows_written"] == 20
    place.query(place.core, f"{part.format(50, 99)}; insert into whole values (60, now(), 1)")
    assert reader.load("Item")["rows_written"] == 1
    compare(place, "public.whole", "analytics_raw.item", "id, at, v")


@pytest.mark.parametrize("kind", ["table", "partitioned", "replaced"])
def test_source_that_is_being_filled_anew(place: Workplace, reader: Workplace, kind: str) -> None:
    role = reader.core.split("//")[1].split(":")[0]
    filled = "truncate item; insert into item select n, now(), n from generate_series(1, 50) n"
    if kind == "partitioned":
        place.query(
            place.core,
            "create table whole (like item, primary key (id)) partition by range (id);"
            "alter table whole attach partition item for values from (0) to (1000);"
            f"grant select (id, at, v) on whole to {role}",
        )
        place.define(COLUMNS.replace("table: item", "table: whole"))
    if kind == "replaced":
        filled = (
            "create table other (like item including all);"
            "insert into other select n, now(), n from generate_series(1, 50) n;"
            f"grant select (id, at, v) on other to {role};"
            "alter table item rename to old; alter table other rename to item"
        )
    with psycopg.connect(place.core) as other:
        other.execute(filled.encode())
        with started(reader, "load", "Item") as load:
            until(
                lambda: (
                    place.query(place.core, "select count(*) from pg_locks where not granted")
                    != [(0,)]
                )
            )
            threading.Event().wait(0.3)
            other.commit()
            _, told = load.communicate(timeout=60)
            assert load.returncode == 0, told
    _same(place)
