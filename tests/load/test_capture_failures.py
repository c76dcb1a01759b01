"""How change capture fails elsewhere, and what would make a load of ours say what is not so."""

from __future__ import annotations

import psycopg
import pytest

from tests.conftest import Workplace
from tests.helpers.changes import define, refused, results, same, slots

THING = """
create table thing (id int primary key, a text, big text);
alter table thing alter big set storage external;
insert into thing select i, 'a' || i, repeat(md5(i::text), 200) from generate_series(1, 100) i;
"""


@pytest.fixture
def thing(place: Workplace) -> Workplace:
    """A table of 100 rows whose copy is made."""
    place.query(place.core, THING)
    define(place, "thing")
    results(place)
    return place


def test_a_partition_and_its_table(place: Workplace) -> None:
    place.query(
        place.core,
        "create table part (id int, kind int, a text, primary key (id, kind))"
        " partition by list (kind);"
        "create table part_1 partition of part for values in (1);"
        "insert into part select i, 1, 'a' from generate_series(1, 50) i",
    )
    define(place, "part", "part_1")
    status, said = refused(place)
    assert status == 1
    assert "part_1 is a partition of public.part" in said
    assert slots(place) == []


def test_one_table_twice(place: Workplace) -> None:
    place.query(place.core, THING)
    define(place, "thing")
    file = place.folder / "models" / "sources.yml"
    text = file.read_text()
    second = (
        text[text.index("      - name") :]
        .replace("thing", "copy")
        .replace("table: copy", "table: thing")
    )
    file.write_text(text + second)
    status, said = refused(place)
    assert status == 2
    assert "thing and copy both read the changes of public.thing" in said
    assert slots(place) == []


def test_identity_meanwhile(thing: Workplace) -> None:
    thing.query(
        thing.core,
        "alter table thing add code int; update thing set code = id; alter table thing alter code set not null;"
        "create unique index thing_code on thing (code);",
    )
    results(thing)
    thing.query(
        thing.core,
        "alter table thing replica identity using index thing_code;"
        "delete from thing where id = 7; update thing set id = 1000, big = '' where id = 8;"
        "alter table thing replica identity default",
    )
    status, said = refused(thing)
    print(said)
    results(thing, "--full-refresh", "thing")
    same(thing, "thing")


def test_key_no_longer_unique(thing: Workplace) -> None:
    define(thing, "thing", thing="conflict_columns: [id]")
    thing.query(
        thing.core,
        "alter table thing replica identity full; alter table thing drop constraint thing_pkey;"
        "insert into thing values (5, 'again')",
    )
    status, said = refused(thing)
    print(said)


def test_publication_dropped(thing: Workplace) -> None:
    name = slots(thing)[0][0]
    thing.query(thing.core, "update thing set a = 'x' where id = 1")
    thing.query(thing.core, f"drop publication {name}")
    thing.query(thing.core, "update thing set a = 'x' where id = 2; delete from thing where id = 3")
    results(thing)
    same(thing, "thing")


def test_publication_without_it_meanwhile(thing: Workplace) -> None:
    name = slots(thing)[0][0]
    thing.query(thing.core, f"alter publication {name} drop table thing")
    thing.query(thing.core, "update thing set a = 'x' where id = 2; delete from thing where id = 3")
    thing.query(thing.core, f"alter publication {name} add table thing")
    results(thing)
    same(thing, "thing")


def test_publication_narrowed_meanwhile(thing: Workplace) -> None:
    name = slots(thing)[0][0]
    thing.query(thing.core, f"alter publication {name} set (publish = 'insert')")
    thing.query(thing.core, "update thing set a = 'x' where id = 2; delete from thing where id = 3")
    thing.query(
        thing.core, f"alter publication {name} set (publish = 'insert, update, delete, truncate')"
    )
    results(thing)
    same(thing, "thing")


def test_a_first_copy_that_fails_while_others_go_on(place: Workplace) -> None:
    place.query(place.core, THING.replace("100", "6000").replace("200", "200"))
    place.query(place.core, "create table other (id int primary key)")
    place.query(
        place.analytics,
        "create schema analytics_raw; create table analytics_raw.thing (id int primary key"
        " check (id <> 5500), a text, big text, _exported_at timestamptz not null)",
    )
    place.query(place.core, "analyze thing")
    define(place, "thing", "other")
    print(place.run("exporter", "load", BATCH_SIZE="100").stderr)
    print(place.query(place.analytics, "select count(*) from analytics_raw.thing"))
    place.query(place.core, "delete from thing where id < 5")
    print(place.run("exporter", "load", BATCH_SIZE="100").stderr)
    place.query(place.analytics, "alter table analytics_raw.thing drop constraint thing_id_check")
    results(place)
    same(place, "thing")
