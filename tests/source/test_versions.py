"""A source and a destination of different major versions, wherever two are on the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.conftest import Workplace, empty_project
from tests.helpers import every_type
from tests.helpers.changes import define, results, same
from tests.helpers.versions import LOGICAL, others, server_of


def _major(url: str) -> int:
    with psycopg.connect(url) as connection:
        return connection.info.server_version // 10000


@pytest.fixture(scope="module", params=others() or [None])
def pair(request: pytest.FixtureRequest, servers: tuple[str, str]) -> Iterator[list[str]]:
    """The URLs of an older and of a newer server."""
    majors = [_major(url) for url in servers]
    if majors[0] != majors[1]:
        yield sorted(servers, key=_major)
    elif request.param in (None, majors[0]):
        pytest.skip(f"no server programs of another version than PostgreSQL {majors[0]} here")
    else:
        with server_of(request.param, LOGICAL) as server:
            yield sorted([servers[0], server.url("postgres")], key=_major)


@pytest.fixture(params=[pytest.param("upward", marks=pytest.mark.long), "downward"])
def apart(request: pytest.FixtureRequest, pair: list[str], tmp_path: Path) -> Iterator[Workplace]:
    """An empty project whose source is the older server, or the newer one."""
    older, newer = pair
    servers = (older, newer) if request.param == "upward" else (newer, older)
    yield from empty_project(servers, tmp_path)


@pytest.mark.parametrize("path", ["binary", pytest.param("text", marks=pytest.mark.long)])
def test_every_type_lands_between_versions(apart: Workplace, path: str) -> None:
    columns = every_type.make(apart)
    versions = [every_type.version(apart, url) for url in (apart.core, apart.analytics)]
    bare = {name: kind.removesuffix("[]") for name, kind in columns.items()}
    text_form = {"tsquery", "oidvector", "int2vector"}
    for since, kinds in (
        (140000, {"numeric", "numeric(12,3)", "numeric(3,-2)", "amount", "amounts"}),
        (170000, {"interval", "interval day to second(3)"}),
    ):
        if len({version < since for version in versions}) == 2:
            text_form |= kinds
    exclude = [name for name, kind in bare.items() if path == "binary" and kind in text_form]
    every_type.landed_alike(apart, "typed", exclude)
    landed = apart.types("analytics_raw.typed")
    source, destination = versions
    for name in landed.keys() & bare.keys():
        kind = bare[name]
        lacking = destination < every_type.SINCE.get(kind, 0) or (
            kind == '"char"' and destination < 150000 <= source
        )
        array = "[]" if columns[name].endswith("[]") else ""
        if kind == "numeric(3,-2)" and lacking:
            assert landed[name] == f"numeric{array}"
        elif lacking:
            assert landed[name] == f"text{array}"
        elif kind in every_type.SINCE:
            assert landed[name] == columns[name]


@pytest.mark.parametrize(("kind", "since"), [("numeric", 140000), ("interval", 170000)])
def test_infinities_that_the_destination_lacks_are_refused(
    apart: Workplace, kind: str, since: int
) -> None:
    """Taken for a number of the older server, they would land as another value."""
    versions = [every_type.version(apart, url) for url in (apart.core, apart.analytics)]
    if versions[0] < since:
        pytest.skip(f"the source has no infinite {kind}")
    apart.query(
        apart.core,
        f"create table shape (id int primary key, v {kind});"
        f" insert into shape values (1, '1'), (2, 'infinity')",
    )
    apart.define(every_type.SHAPE.format("shape"))
    done = apart.run("exporter", "load")
    if versions[1] < since:
        assert done.returncode == 1
        assert "row id=2, column v" in done.stderr
    else:
        assert done.returncode == 0
        rows = apart.query(apart.analytics, "select v::text from analytics_raw.shape where id = 2")
        assert rows[0][0].lower() == "infinity"


def test_changes_land_between_versions(apart: Workplace) -> None:
    apart.query(
        apart.core,
        "create table thing (id int primary key, a text, big text, n numeric(9,3), at timestamptz,"
        " span interval, many int[]);"
        "alter table thing alter big set storage external;"
        "insert into thing select i, 'a' || i, repeat(md5(i::text), 400), i / 7.0, now(),"
        " i * interval '1 hour', array[i] from generate_series(1, 100) i;"
        "create table part (id int, kind int, a text, primary key (id, kind))"
        " partition by list (kind);"
        "create table part_1 partition of part for values in (1);"
        "create table part_2 partition of part default;"
        "create table whole (id int primary key, a text, big text);"
        "alter table whole replica identity full;"
        "insert into part select i, i % 3, 'a' from generate_series(1, 30) i;"
        "insert into whole select id, a, big from thing",
    )
    define(apart, "thing", "part", "whole")
    results(apart)
    apart.query(
        apart.core,
        "insert into thing (id, a) values (101, 'new'); delete from thing where id > 90;"
        "update thing set a = 'changed' where id < 5; update thing set id = 200 + id where id < 3;"
        "update thing set n = 'NaN', many = '{1,null}', span = '1 mon -2 days' where id = 7;"
        "update part set kind = 1 - kind where id < 20 and kind < 2; delete from part where id = 1;"
        "update whole set a = null where id < 9; update whole set id = -id where id = 10;"
        "alter table thing add more text; update thing set more = 'm' where id between 20 and 30",
    )
    results(apart)
    apart.query(apart.core, "truncate part; insert into part values (1, 1, 'again')")
    results(apart)
    same(apart, "thing", "part", "whole")
