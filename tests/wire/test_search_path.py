"""Where names are found: PostgreSQL's own before anybody's, a user's where the role finds them."""

from __future__ import annotations

import pytest

from tests.conftest import Workplace, compare
from tests.helpers.tables import ITEM

LABELLED = ITEM.replace(
    "table: item", 'table: item\n          columns: [id, at, {name: label, expression: "label(v)"}]'
)
# A session of the role finds them; one that looks in pg_catalog alone finds neither.
FUNCTIONS = """
create table suffix (of int, is_text text);
insert into suffix values (1, 'odd'), (0, 'even');
create function label(n int) returns text stable language sql
    as $$ select n || (select is_text from suffix where of = n % 2) $$;
"""
# All that a load could call by these names, in a schema that the role's path has first.
TRAPS = """
create schema evil;
create table evil.caught (name text);
grant all on evil.caught to public;
create function evil.trap(name text) returns void language sql security definer
    as $$ insert into evil.caught values (name) $$;
create function evil.set_config(text, text, boolean) returns text language sql
    as $$ select evil.trap('set_config'); select $2 $$;
create function evil.current_setting(text) returns text language sql
    as $$ select evil.trap('current_setting'); select $1 $$;
create function evil.pg_backend_pid() returns int language sql
    as $$ select evil.trap('pg_backend_pid'); select 1 $$;
create function evil.age(xid) returns int language sql
    as $$ select evil.trap('age'); select 1 $$;
create function evil.quote_ident(text) returns text language sql
    as $$ select evil.trap('quote_ident'); select $1 $$;
create function evil.hashtextextended(text, bigint) returns bigint language sql
    as $$ select evil.trap('hashtextextended'); select 1::bigint $$;
create function evil.same(timestamptz, timestamptz) returns boolean language sql
    as $$ select evil.trap('>'); select true $$;
create operator evil.> (leftarg = timestamptz, rightarg = timestamptz, function = evil.same);
"""


def _items(place: Workplace, url: str) -> None:
    place.query(
        url,
        "create table item (id int primary key, at timestamptz default now(), v int);"
        "insert into item select n, now() - interval '1 hour', n from generate_series(1, 2000) n;"
        "analyze item",
    )


def _set_path(place: Workplace, url: str, path: str) -> None:
    name = url.rpartition("/")[2].partition("?")[0]
    place.query(url, f"alter database {name} set search_path = {path}")


def _all_commands(place: Workplace) -> None:
    for words in (["load", "-j", "2"], ["load"], ["check"], ["verify"], ["load", "--dry-run"]):
        done = place.run("exporter", *words, BATCH_SIZE="50")
        assert done.returncode == 0, done.stderr + done.stdout
    place.query(place.core, "update public.item set v = v + 1, at = now() where id % 9 = 0")
    for words in (["load"], ["load", "--full-refresh"], ["verify"]):
        done = place.run("exporter", *words, BATCH_SIZE="50")
        assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("schema", ["public", "shop"])
def test_an_expression_finds_the_functions_of_the_role(place: Workplace, schema: str) -> None:
    place.define(LABELLED)
    _items(place, place.core)
    if schema == "shop":
        place.query(place.core, "create schema shop")
        _set_path(place, place.core, "shop")
    place.query(place.core, f"set search_path = {schema};{FUNCTIONS}")
    _all_commands(place)
    raw = "select id, label from analytics_raw.item order by id"
    source = "select id, label(v) from public.item order by id"
    assert place.query(place.analytics, raw) == place.query(place.core, source)


def test_functions_behind_a_view_find_what_they_did(place: Workplace) -> None:
    place.define(ITEM.replace("table: item", "table: items"))
    _items(place, place.core)
    place.query(
        place.core,
        FUNCTIONS + "create view items as select id, at, label(v) as label from item",
    )
    _all_commands(place)
    compare(place, "public.items", "analytics_raw.item")


@pytest.mark.parametrize("expression", [False, True])
def test_functions_that_stand_before_those_of_postgresql(
    place: Workplace, expression: bool
) -> None:
    place.define(LABELLED if expression else ITEM)
    _items(place, place.core)
    place.query(place.core, FUNCTIONS)
    for url in (place.core, place.analytics):
        place.query(url, TRAPS)
        _set_path(place, url, "evil, pg_catalog, public")
    _all_commands(place)
    for url in (place.core, place.analytics):
        assert place.query(url, "select name from evil.caught") == []


def test_an_id_of_citext_where_raw_has_text(place: Workplace) -> None:
    """In the order of text, C comes before b: a load that goes on after b would pass over it."""
    found = place.query(place.core, "select 1 from pg_available_extensions where name = 'citext'")
    if not found:
        pytest.skip("the server has no citext to create: PostgreSQL's contrib is missing")
    place.define(ITEM)
    place.query(
        place.core,
        "create extension citext; create table item (id citext primary key, at timestamptz);"
        "insert into item values ('0', now() - interval '2 days')",
    )
    place.load()
    place.query(
        place.core,
        "insert into item select n, now() - interval '1 day' from unnest('{a,b,C,D}'::text[]) n",
    )
    place.query(place.analytics, "alter table analytics_raw.item add check (id <> 'C')")
    assert place.run("exporter", "load", BATCH_SIZE="2").returncode == 1
    landed = "select string_agg(id, ' ' order by id) from analytics_raw.item"
    assert place.query(place.analytics, landed) == [("0 a b",)]
    place.query(place.analytics, "alter table analytics_raw.item drop constraint item_id_check")
    place.load(BATCH_SIZE="2")
    compare(place, "public.item", "analytics_raw.item", "id::text, at")
