"""Every type of PostgreSQL over a thousand values each, by the binary and by the text path."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT, Workplace, compare
from tests.helpers import every_type

TEXT_FORM = ["tsquery", "oidvector", "int2vector"]
NOT_BINARY = [*map(every_type.column, TEXT_FORM), every_type.column("tsquery", "a")]


@pytest.mark.parametrize(
    ("relation", "exclude"),
    [
        pytest.param("typed", NOT_BINARY, id="binary"),
        pytest.param("typed", [], id="text, in blocks", marks=pytest.mark.long),
        pytest.param("typed_view", [], id="text, of a view", marks=pytest.mark.long),
    ],
)
def test_every_type_lands_as_it_is(place: Workplace, relation: str, exclude: list[str]) -> None:
    """A first load is binary unless a column forbids it; then every row comes again, in text."""
    every_type.make(place)
    every_type.landed_alike(place, relation, exclude)


def test_docs_say_what_lands_as_what(place: Workplace) -> None:
    """A column of every type that the server has, and of the tests' own, against docs/types.md."""
    place.analytics = place.core  # between versions there are exceptions
    builtin = [
        name
        for (name,) in place.query(
            place.core,
            "select format_type(oid, null) from pg_type t where oid < 10000 and typtype in"
            " ('b', 'r', 'm') and not exists (select from pg_type e where e.typarray = t.oid)",
        )
    ]
    written = set(map(_bare, every_type.TYPES))
    assert set(builtin) - written - every_type.NO_INPUT == set()
    place.query(place.core, every_type.PREPARE)
    columns = ", ".join(f"c{number} {kind}" for number, kind in enumerate(builtin))
    place.query(place.core, f"create table shape (id int primary key, {columns})")
    place.define(every_type.SHAPE.format("shape"))
    place.load()
    landed = place.types("analytics_raw.shape")
    documented: dict[str, str] = {}
    for line in (ROOT / "docs" / "types.md").read_text().splitlines():
        if line.startswith("| `"):
            kinds, raw = line.strip("| ").split(" | ")
            documented |= dict.fromkeys(re.findall("`([^`]+)`", kinds), raw)
    if not every_type.has_xml(place, place.core):
        documented["xml"] = "`text`"
    for number, kind in enumerate(builtin):
        raw = landed[f"c{number}"]
        assert documented.get(kind) == ("the same" if _bare(raw) == kind else f"`{raw}`"), kind


def _bare(kind: str) -> str:
    return re.sub(r"\([^)]*\)", "", kind)


SHAPES = {
    "500 columns": "create table shape (id int primary key, {});"
    " insert into shape (id, c7, c499) select i, i, 'x' from generate_series(1, 3000) i".format(
        ", ".join(f"c{number} text" for number in range(1, 500))
    ),
    "the key alone": "create table shape (id int primary key);"
    " insert into shape select generate_series(1, 3000)",
    "empty": "create table shape (id int primary key, v text)",
    "partitioned": "create table shape (id int, v text, primary key (id)) partition by range (id);"
    " create table low partition of shape for values from (0) to (1000);"
    " create table high partition of shape for values from (1000) to (9000);"
    " insert into shape select i, 'v' from generate_series(1, 3000) i",
    "materialized": "create materialized view shape as"
    " select i as id, 'v'::text as v from generate_series(1, 3000) i",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_tables_of_any_shape_land(place: Workplace, shape: str) -> None:
    place.query(place.core, SHAPES[shape])
    place.define(every_type.SHAPE.format("shape"))
    for _ in range(2):
        place.load()
        rows = [
            place.query(url, f"select to_jsonb(s) - '_exported_at' from {table} s order by id")
            for url, table in ((place.core, "shape"), (place.analytics, "analytics_raw.shape"))
        ]
        assert rows[0] == rows[1]
        if shape not in ("empty", "materialized"):
            place.query(place.core, "insert into shape (id) select 1 + max(id) from shape")


ODD = [
    "intervalstyle = 'sql_standard'",
    "bytea_output = 'escape'",
    "extra_float_digits = -5",
    "xmloption = 'document'",
    "array_nulls = off",
    "quote_all_identifiers = on",
    "timezone = 'Asia/Kolkata'",
    "search_path = 'pg_catalog'",
]


def test_settings_of_the_databases_change_nothing(place: Workplace) -> None:
    xml = "xml" if every_type.has_xml(place, place.core) else "text"
    place.query(
        place.core,
        f"create table shape (id int primary key, b bytea, i interval, d date, t timestamptz,"
        f" f float8, a text[], m money, n numeric, x {xml});"
        " insert into shape values (1, '\\x005cff', '-1 mon 2 days -3:04:05.6', '2026-12-11',"
        " '2026-12-11 10:09:08.7+05:30', 0.1::float8 + 0.2, array['NULL', null], 12.34, 1.10,"
        " 'a &amp; <b/>')",
    )
    place.query(place.core, "create view seen as select * from shape")
    for relation in ("shape", "seen"):  # binary, text
        place.define(every_type.SHAPE.format(relation))
        for url, style in ((place.core, "German"), (place.analytics, "SQL, DMY")):
            name = url.rpartition("/")[2].partition("?")[0]
            settings = [*ODD, f"datestyle = '{style}'"]
            place.query(url, "; ".join(f"alter database {name} set {one}" for one in settings))
        place.load()
        for url in (place.core, place.analytics):
            name = url.rpartition("/")[2].partition("?")[0]
            place.query(url, f"alter database {name} reset all")
        compare(place, "public.shape", "analytics_raw.shape")
        name = place.core.rpartition("/")[2].partition("?")[0]
        for setting in ("off", "on"):  # no type has another name then
            place.query(place.core, f"alter database {name} set quote_all_identifiers = {setting}")
            place.load()
        place.query(place.core, f"alter database {name} reset all")
        place.query(place.analytics, "drop schema analytics_raw cascade")


def test_source_in_latin1(place: Workplace, servers: tuple[str, str]) -> None:
    name = place.core.rpartition("/")[2].partition("?")[0]
    place.query(
        servers[0],
        f"create database {name}_latin1 encoding 'LATIN1' lc_collate 'C' lc_ctype 'C'"
        " template template0",
    )
    place.core = place.core.replace(name, f"{name}_latin1")
    utf8 = f"{place.core}{'&' if '?' in place.core else '?'}client_encoding=utf8"
    try:
        place.query(
            utf8,
            'create table shape (id int primary key, v text, "é" text);'
            " insert into shape values (1, 'été', 'ÿ'), (2, null, '\\')",
        )
        place.define(every_type.SHAPE.format("shape"))
        place.load()
        place.query(utf8, "insert into shape values (3, 'ñ', 'ü')")
        place.load()
        landed = 'select id, v, "é" from {} order by id'
        rows = place.query(utf8, landed.format("shape"))
        assert place.query(place.analytics, landed.format("analytics_raw.shape")) == rows
        assert rows[0] == (1, "été", "ÿ")
    finally:
        place.query(servers[0], f"drop database {name}_latin1 with (force)")
