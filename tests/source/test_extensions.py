"""Types that extensions bring, and foreign tables."""

from __future__ import annotations

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.conftest import Workplace, compare

SOURCE = """
- name: thing
  config:
    meta:
      exporter:
        key: Thing
        source: {table: thing, cursor: {field: at, id_field: key}}
        conflict_columns: [key]
"""
# extension: a column's type, and an expression for row i
KINDS = {
    "hstore": ("hstore", "hstore(array['a', 'b \"c\"', i::text], array[i::text, null, ''])"),
    "citext": ("citext", "'Ünï ' || i"),
    "ltree": ("ltree", "('top.n' || i)::ltree"),
    "cube": ("cube", "cube(array[i, random()], array[-i, 1e-300])"),
    "vector": ("vector(3)", "('[1,' || i || ',0.1]')::vector"),
    "isn": ("isbn13", "'978-0-393-04002-9'"),
    "embedding": ("embedding(9)", "('[1,' || i || ',0]')::embedding"),
}
# where there is no vector: a type with a length of its own, made a member of an extension
EMBEDDING = """
create type {0}.embedding;
create function {0}.embedding_in(cstring, oid, int) returns {0}.embedding
    language internal immutable strict as 'varcharin';
create function {0}.embedding_out({0}.embedding) returns cstring
    language internal immutable strict as 'varcharout';
create type {0}.embedding (input = {0}.embedding_in, output = {0}.embedding_out,
    typmod_in = varchartypmodin, typmod_out = varchartypmodout, like = text);
alter extension hstore add type {0}.embedding
"""


def available(place: Workplace) -> list[str]:
    """Those of the extensions that both servers have. Skips the test without the first two."""
    names = ", ".join(f"'{name}'" for name in KINDS)
    found = [
        {
            name
            for (name,) in place.query(
                url, f"select name from pg_available_extensions where name in ({names})"
            )
        }
        for url in (place.core, place.analytics)
    ]
    both = [name for name in KINDS if name in found[0] & found[1] or name == "embedding"]
    if not {"hstore", "citext"} <= set(both):
        pytest.skip(
            "the server has no hstore and citext to create: PostgreSQL's contrib is missing"
        )
    return both


def create(place: Workplace, url: str, names: list[str], schema: str = "public") -> None:
    place.query(url, f"create schema if not exists {schema}")
    for name in names:
        extension = f"create extension {name} schema {schema}"
        place.query(url, EMBEDDING.format(schema) if name == "embedding" else extension)


def make(place: Workplace, names: list[str], schema: str = "public") -> None:
    columns, values = ["key citext primary key"], ["'Key ' || i"]
    for name in names:
        kind, value = KINDS[name]
        base = kind.partition("(")[0]
        columns += [f"{name} {kind}", f"{name}s {kind}[]", f"{name}_d {name}_d"]
        values += [f"({value})::{base}", f"array[({value})::{base}, null]", f"({value})::{base}"]
    columns += ["pair pair", "at timestamptz not null default clock_timestamp()"]
    values += ["row('A b', i)::pair", "default"]
    domains = "".join(f"create domain {name}_d as {KINDS[name][0]};" for name in names)
    place.query(
        place.core,
        f"set search_path = public, {schema}; create type pair as (c citext, i int); {domains}"
        f"create table thing ({', '.join(columns)});"
        "insert into thing select {} from generate_series(1, 50) i".format(", ".join(values[:-1])),
    )


def loads(place: Workplace) -> None:
    """A first load and an increment; all of it has its source's text."""
    for _ in range(2):
        place.load()
        compare(place, "public.thing", "analytics_raw.thing")
        place.query(
            place.core,
            "update thing set at = clock_timestamp(), citext = 'x' where key::text like '%7';"
            " delete from thing where false",
        )
    place.load()
    compare(place, "public.thing", "analytics_raw.thing")


@pytest.mark.parametrize(
    ("here", "there"), [("public", "public"), ("ours", "theirs"), ("public", "theirs")]
)
def test_types_of_extensions_on_both_sides(place: Workplace, here: str, there: str) -> None:
    names = available(place)
    create(place, place.core, names, here)
    create(place, place.analytics, names, there)
    make(place, names, here)
    place.define(SOURCE)
    loads(place)
    kinds = place.types("analytics_raw.thing")
    prefix = "" if there == "public" else f"{there}."
    for name in names:
        assert kinds[name] == prefix + KINDS[name][0]
        assert kinds[f"{name}s"] == f"{prefix}{KINDS[name][0]}[]"
        assert kinds[f"{name}_d"] == prefix + KINDS[name][0]
    assert kinds["pair"] == "text"


def test_extension_that_the_destination_lacks_or_gets_later(place: Workplace) -> None:
    names = available(place)
    create(place, place.core, names)
    make(place, names)
    place.query(place.analytics, "create type hstore as enum ('no', 'hstore')")  # its name alone
    place.define(SOURCE)
    loads(place)
    later = [name for name in names if name not in ("hstore", "embedding")]
    create(place, place.analytics, later)
    loads(place)
    kinds = place.types("analytics_raw.thing")
    for name in names:
        assert kinds[name] == kinds[f"{name}_d"] == "text"
        assert kinds[f"{name}s"] == "text[]"
    place.query(place.core, "alter table thing add late citext default 'A'")
    place.load("--full-refresh")
    compare(place, "public.thing", "analytics_raw.thing")
    assert place.types("analytics_raw.thing")["late"] == "citext"


FOREIGN = """
create extension postgres_fdw;
create server loop foreign data wrapper postgres_fdw options ({options});
create user mapping for current_user server loop options ({user});
create schema far;
create table far.thing (
    key int primary key, v numeric(6,2), at timestamptz default clock_timestamp()
);
insert into far.thing select i, i / 7.0 from generate_series(1, 3000) i;
"""
RELATIONS = {
    "foreign table": "create foreign table thing (key int not null, v numeric(6,2), at timestamptz)"
    " server loop options (schema_name 'far')",
    "partition": "create table thing (key int not null, v numeric(6,2), at timestamptz)"
    " partition by range (key);"
    " create table near partition of thing for values from (minvalue) to (1);"
    " create foreign table away partition of thing for values from (1) to (maxvalue)"
    " server loop options (schema_name 'far', table_name 'thing')",
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_foreign_tables_as_sources(place: Workplace, relation: str) -> None:
    found = place.query(
        place.core, "select 1 from pg_available_extensions where name = 'postgres_fdw'"
    )
    if not found:
        pytest.skip("the server has no postgres_fdw to create: PostgreSQL's contrib is missing")
    given = conninfo_to_dict(place.core)
    names = {name: f"{name} '{given[name]}'" for name in given}
    place.query(
        place.core,
        FOREIGN.format(
            options=", ".join(names[n] for n in ("host", "port", "dbname") if n in names),
            user=", ".join(names[n] for n in ("user", "password") if n in names),
        )
        + RELATIONS[relation],
    )
    place.define(SOURCE)
    place.load()
    compare(place, "public.thing", "analytics_raw.thing")
    place.query(
        place.core,
        "update far.thing set v = -1, at = clock_timestamp() where key % 100 = 0;"
        " insert into far.thing values (5000, null)",
    )
    assert place.load()["rows_written"] == 31
    compare(place, "public.thing", "analytics_raw.thing")
    place.query(
        place.core,
        "delete from far.thing where key < 9; alter table far.thing add w int default 3;"
        f" alter {'foreign ' if relation == 'foreign table' else ''}table thing add w int",
    )
    place.load("--full-refresh")
    compare(place, "public.thing", "analytics_raw.thing")
