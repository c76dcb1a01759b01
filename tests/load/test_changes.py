"""Tables that are read by their changes: raw is what the source is, after each load."""

from __future__ import annotations

from tests.conftest import Workplace, compare
from tests.helpers.changes import define, results


def test_each_kind_of_change_lands(place: Workplace) -> None:
    place.query(
        place.core,
        "create table thing (id int primary key, a text, big text, n numeric(9,3), at timestamptz);"
        "insert into thing select i, 'a' || i, repeat(md5(i::text), 400), i / 7.0, now()"
        " from generate_series(1, 100) i; alter table thing alter big set storage external",
    )
    define(place, "thing")
    assert results(place)["thing"]["rows_written"] == 100
    compare(place, "public.thing", "(select id, a, big, n, at from analytics_raw.thing) r")
    place.query(
        place.core,
        "insert into thing values (101, 'new', null, 1, null);"
        "update thing set a = 'changed' where id between 1 and 10;"  # big is stored apart
        "update thing set big = 'now small' where id = 5;"
        "update thing set id = 1000 + id where id between 20 and 25;"
        "delete from thing where id between 40 and 50;"
        "update thing set a = null, n = 'NaN' where id = 60",
    )
    found = results(place)["thing"]
    assert found["rows_deleted"] == 17
    compare(place, "public.thing", "(select id, a, big, n, at from analytics_raw.thing) r")
    assert results(place)["thing"]["rows_read"] == 0
