"""Values that travel as changes are exact, whatever their type."""

from __future__ import annotations

import pytest

from exporter.errors import SourceError
from exporter.source import pgoutput
from exporter.source.changes import Gatherer
from exporter.source.landed import unlanded
from exporter.source.member import Member, Snapshot
from tests.conftest import Workplace, compare
from tests.helpers import every_type
from tests.helpers.changes import results


def test_every_type_comes_by_its_changes(place: Workplace) -> None:
    columns = every_type.make(place)
    computed = [
        name
        for (name,) in place.query(
            place.core,
            "select attname from pg_attribute where attrelid = 'typed'::regclass"
            " and attgenerated <> ''",
        )
    ]
    place.query(
        place.core, "create table spare as select * from typed; delete from typed; analyze typed"
    )
    place.define(
        f"""
- name: typed
  config:
    meta:
      exporter:
        key: Typed
        source: {{table: typed, read: changes, exclude: {computed}}}
"""
    )
    results(place)
    names = ["id", *columns, "counted", "at"]  # in quotes, where they need them
    listed = ", ".join(names)
    place.query(place.core, f"insert into typed ({listed}) select {listed} from spare")
    assert results(place)["Typed"]["rows_written"] == every_type.ROWS
    texts = ", ".join(f"{name}::text" for name in names)
    compare(place, "typed", "analytics_raw.typed", texts)


def _sent(place: Workplace, *statements: str) -> list[bytes]:
    """The messages that a slot sends of these, of all tables."""
    place.query(
        place.core,
        "create publication p for all tables with (publish_via_partition_root)",
    )
    slot = f"sent_{place.core.rpartition('/')[2].partition('?')[0]}"
    place.query(place.core, f"select pg_create_logical_replication_slot('{slot}', 'pgoutput')")
    for statement in statements:
        place.query(place.core, statement)
    peek = f"pg_logical_slot_peek_binary_changes('{slot}', null, null,"
    peek += " 'proto_version', '1', 'publication_names', 'p')"
    sent = [bytes(data) for (data,) in place.query(place.core, f"select data from {peek}")]
    place.query(place.core, f"select pg_drop_replication_slot('{slot}')")
    return sent


def test_a_transaction_that_is_sent_again_makes_no_versions(place: Workplace) -> None:
    place.query(place.core, "create table thing (id int primary key)")
    sent = _sent(place, *(f"insert into thing values ({number})" for number in (1, 2)))
    oid, near = place.query(place.core, "select 'thing'::regclass::oid::bigint, txid_current()")[0]
    member = Member("thing", oid, ("id",), ("id",), frozenset({"id"}), near=near)
    first, second = (one for one in sent if one[0] == pgoutput.COMMIT)

    def found(landed: bytes | None) -> int:
        commit = landed and pgoutput.commit_of(landed)
        gatherer = Gatherer([member], 0, pgoutput.committed(second))
        (chunk,) = gatherer.chunks(unlanded(iter(sent), 0, commit))
        return sum(len(part.rows) for part in chunk.changes["thing"].parts)

    assert [found(landed) for landed in (None, first)] == [2, 1]


def test_what_a_partition_was_before_the_copy_is_not_what_it_is(place: Workplace) -> None:
    """Nor is another table, described behind this one's changes, a partition of it."""
    place.query(
        place.core,
        "create table part (id int primary key, code int not null) partition by range (id);"
        "create table part_1 partition of part for values from (0) to (10);"
        "create table part_2 partition of part for values from (10) to (20);"
        "create unique index by_code on part_1 (code); insert into part values (1, 1), (11, 11);"
        "create table other (id int, code int not null unique);"
        "alter table other replica identity using index other_code_key;"
        "create table seen (snapshot text)",
    )
    sent = _sent(
        place,
        "alter table part_1 replica identity using index by_code; insert into part values (2, 2);"
        "alter table part_1 replica identity default",
        "insert into seen select pg_current_snapshot()::text",
        "delete from part where id = 11",
        "insert into other values (1, 1)",
        "delete from part where id = 11; insert into part values (12, 12)",
    )
    commits = [one for one in sent if one[0] == pgoutput.COMMIT]
    ((oid,),) = place.query(place.core, "select 'part'::regclass::oid::bigint")
    ((seen,),) = place.query(place.core, "table seen")
    names = ("id", "code")
    unseen = Member("part", oid, names, ("id",), frozenset(names))

    def rows(member: Member, landed: bytes | None) -> int:
        gatherer = Gatherer([member], 0, pgoutput.committed(commits[-1]))
        (chunk,) = gatherer.chunks(unlanded(iter(sent), 0, landed))
        return len(chunk.changes["part"].rows)

    with pytest.raises(SourceError, match="the changes lack id"):
        rows(unseen, None)
    assert rows(unseen._replace(snapshot=Snapshot.of_text(seen)), None) == 2
    assert rows(unseen, pgoutput.commit_of(commits[0])) == 2
