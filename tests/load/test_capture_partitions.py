"""A partition has a replica identity of its own, and its changes come as its table's."""

from __future__ import annotations

import psycopg
import pytest

from tests.conftest import Workplace
from tests.helpers.changes import define, refused, results, same
from tests.helpers.history import replayed

PART = """
create table part (id int, kind int, code int not null, big text, primary key (id, kind))
    partition by list (kind);
alter table part alter big set storage external;
create table part_1 partition of part for values in (1);
create table part_2 partition of part for values in (2);
alter table part_1 alter big set storage external;
create unique index by_code on part_1 (code);
insert into part select i, 1 + i % 2, i, repeat(md5(i::text), 200) from generate_series(1, 20) i;
"""
ANOTHER = "alter table part_1 replica identity using index by_code"
BACK = "alter table part_1 replica identity default"


def _copy(place: Workplace, mode: str) -> None:
    place.query(place.core, PART)
    define(place, "part", part=f"mode: {mode}")
    results(place)


def _same(place: Workplace, mode: str) -> None:
    if mode == "upsert":
        same(place, "part")
    else:
        replayed(place, "part")


@pytest.fixture
def part(place: Workplace) -> Workplace:
    """A table of two partitions whose copy is made, as a mirror."""
    _copy(place, "upsert")
    return place


@pytest.mark.parametrize(
    ("change", "mode"),
    [
        # no message tells the old key
        ("update part set id = 100, big = '' where id = 2", "upsert"),
        ("update part_1 set id = 100 where id = 2", "history"),
        ("update part set kind = 2 where id = 2", "upsert"),
        pytest.param("delete from part_1 where id = 4", "history", marks=pytest.mark.long),
        pytest.param("update part set code = 7 where id = 6", "upsert", marks=pytest.mark.long),
    ],
)
def test_a_partition_whose_replica_identity_was_another_one_meanwhile(
    place: Workplace, change: str, mode: str
) -> None:
    _copy(place, mode)
    # Another partition, and the table itself, are described between.
    place.query(
        place.core,
        f"{ANOTHER}; insert into part values (31, 1, 31, ''), (32, 2, 32, '');"
        f"alter table part_2 replica identity full; update part_2 set code = 99 where id = 3;"
        f"{change}; {BACK}",
    )
    status, said = refused(place)
    assert status == 1
    assert "part: the changes lack id, kind" in said
    # What the copy shows is passed over, and so is what was described by it.
    results(place, "part", "--full-refresh")
    place.query(place.core, "update part set code = code + 1000; delete from part where id = 3")
    results(place)
    _same(place, mode)


def test_a_partition_without_a_replica_identity_has_no_updates(part: Workplace) -> None:
    part.query(part.core, "alter table part_1 replica identity nothing")
    for change in ("update part set code = 77 where id = 2", "delete from part_1 where id = 4"):
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            part.query(part.core, change)
    part.query(part.core, f"insert into part values (31, 1, 31, ''); {BACK}")
    assert results(part)["part"]["rows_read"] == 1
    same(part, "part")


@pytest.mark.parametrize(
    ("table", "mode"),
    [
        ("part", "upsert"),
        ("part", "history"),
        pytest.param("part_1", "upsert", marks=pytest.mark.long),
        pytest.param("part_1", "history", marks=pytest.mark.long),
    ],
)
def test_an_old_row_is_as_whole_as_the_partition_makes_it(
    place: Workplace, table: str, mode: str
) -> None:
    """`replica identity full` of a table says nothing of its partitions, nor theirs of it."""
    _copy(place, mode)
    place.query(
        place.core,
        f"alter table {table} replica identity full;"
        "update part set id = 100 where id = 2; update part_1 set id = 101, code = 7 where id = 4;"
        "update part set kind = 3 - kind where id in (5, 6); update part set id = 3 - 100"
        " where id = 3; delete from part_1 where id = 8; update part set code = 88 where id = 9",
    )
    results(place)
    _same(place, mode)
