"""Every mistake is one clear message, an exit status, and nothing changed."""

from __future__ import annotations

import pytest

from tests.conftest import Workplace

GOOD = """
- name: item
  config:
    meta:
      exporter:
        key: Item
        source:
          table: item
          cursor: {field: changed, id_field: id}
        conflict_columns: [id]
"""


@pytest.fixture
def shop(place: Workplace) -> Workplace:
    place.query(place.core, "create table item (id int primary key, changed timestamptz, p point)")
    place.define(GOOD)
    return place


def _refused(place: Workplace, *words: str, **environment: str) -> tuple[int, str]:
    done = place.run("exporter", "load", *words, **environment)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    raw = place.query(place.analytics, "select to_regclass('analytics_raw.item') is null")
    assert raw == [(True,)]
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("id_field", "idField", "did you mean id_field?"),
        ("conflict_columns", "conflictColumns", "did you mean conflict_columns?"),
        ("conflict_columns: [id]", "conflict_columns: id", "must be a list"),
        ("table: item", "tabel: item", "did you mean table?"),
        ("key: Item", "key: Item\n        batch_rows: many", "whole number"),
        ("field: changed, ", "", "source.cursor.field is required"),
    ],
)
def test_wrong_definition(shop: Workplace, old: str, new: str, said: str) -> None:
    shop.define(GOOD.replace(old, new, 1))
    status, message = _refused(shop)
    assert status == 2
    assert said in message
    assert "models/sources.yml:" in message


def test_unknown_key(shop: Workplace) -> None:
    status, message = _refused(shop, "Itme")
    assert (status, "did you mean Item?" in message) == (2, True)


def test_no_definitions(shop: Workplace) -> None:
    (shop.folder / "models" / "sources.yml").unlink()
    status, message = _refused(shop)
    assert (status, "no table" in message) == (2, True)


def test_yaml_that_does_not_parse(shop: Workplace) -> None:
    (shop.folder / "models" / "sources.yml").write_text("exporter: [\n  a: }\n")
    status, message = _refused(shop)
    assert (status, "models/sources.yml:2" in message) == (2, True)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("table: item", "table: itme", "did you mean item?"),
        ("field: changed", "field: chagned", "did you mean changed?"),
        ("field: changed", "field: p", "is point"),
        ("conflict_columns: [id]", "conflict_columns: [idd]", "did you mean id?"),
    ],
)
def test_definition_that_the_source_contradicts(
    shop: Workplace, old: str, new: str, said: str
) -> None:
    shop.define(GOOD.replace(old, new, 1))
    status, message = _refused(shop)
    assert status == 1
    assert said in message


def test_urls(shop: Workplace) -> None:
    for url, expected in (
        ("", 2),
        ("postgresql://u:s3cr3t@[broken", 2),
        ("postgresql://u:s3cr3t@127.0.0.1:1/core", 1),
    ):
        status, message = _refused(shop, DATABASE_URL_CORE=url)
        assert status == expected
        assert "DATABASE_URL_CORE" in message
        assert "s3cr3t" not in message


def test_no_rights(shop: Workplace) -> None:
    shop.query(shop.core, "drop role if exists stranger; create role stranger login")
    status, message = _refused(shop, DATABASE_URL_CORE=shop.core.replace("postgres@", "stranger@"))
    assert (status, "permission denied" in message) == (1, True)


def test_null_cursor(shop: Workplace) -> None:
    shop.query(shop.core, "insert into item values (1, null), (2, now())")
    status, message = _refused(shop)
    assert (status, "1 rows have no changed" in message) == (1, True)
    for choice, rows in (("skip", 1), ("load", 2)):
        shop.define(GOOD.replace("id_field: id", f"id_field: id, nulls: {choice}"))
        shop.load("Item")
        assert shop.query(shop.analytics, "select count(*) from analytics_raw.item") == [(rows,)]
        shop.query(shop.analytics, "drop schema analytics_raw cascade")


def test_row_that_the_destination_refuses(shop: Workplace) -> None:
    shop.query(shop.core, "insert into item select n, now(), null from generate_series(1, 9) n")
    shop.load("Item")
    shop.query(shop.analytics, "alter table analytics_raw.item add check (p is null)")
    shop.query(shop.core, "update item set changed = now(), p = '(41.5,42.5)' where id = 7")
    done = shop.run("exporter", "load", "Item")
    assert done.returncode == 1
    assert "batch 1, row id=7" in done.stderr
    assert "41.5" not in done.stderr


def test_two_definitions_of_one_raw_table(place: Workplace) -> None:
    place.define(GOOD, GOOD.replace("key: Item", "key: Other"))
    done = place.run("exporter", "load")
    assert done.returncode == 2
    assert "analytics_raw.item is the raw table of models/sources.yml:" in done.stderr


def test_a_name_that_postgresql_would_cut(place: Workplace) -> None:
    place.define(GOOD.replace("name: item", f"name: {'é' * 32}"))
    done = place.run("exporter", "load")
    assert done.returncode == 2
    assert "is longer than the 63 bytes that PostgreSQL keeps" in done.stderr
