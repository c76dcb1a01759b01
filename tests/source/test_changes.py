"""Values that travel as changes are exact, whatever their type."""

from __future__ import annotations

from exporter.source import pgoutput
from exporter.source.changes import Gatherer
from exporter.source.landed import unlanded
from exporter.source.member import Member
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


def test_a_transaction_that_is_sent_again_makes_no_versions(place: Workplace) -> None:
    place.query(place.core, "create table thing (id int primary key); create publication p")
    place.query(place.core, "alter publication p add table thing")
    slot = f"sent_{place.core.rpartition('/')[2].partition('?')[0]}"
    place.query(place.core, f"select pg_create_logical_replication_slot('{slot}', 'pgoutput')")
    for number in (1, 2):
        place.query(place.core, f"insert into thing values ({number})")
    peek = f"pg_logical_slot_peek_binary_changes('{slot}', null, null,"
    peek += " 'proto_version', '1', 'publication_names', 'p')"
    sent = [bytes(data) for (data,) in place.query(place.core, f"select data from {peek}")]
    place.query(place.core, f"select pg_drop_replication_slot('{slot}')")
    oid, near = place.query(place.core, "select 'thing'::regclass::oid::bigint, txid_current()")[0]
    member = Member("thing", oid, ("id",), ("id",), frozenset({"id"}), near=near)
    first, second = (one for one in sent if one[0] == pgoutput.COMMIT)

    def found(landed: bytes | None) -> int:
        commit = landed and pgoutput.commit_of(landed)
        gatherer = Gatherer([member], 0, pgoutput.committed(second))
        (chunk,) = gatherer.chunks(unlanded(iter(sent), 0, commit))
        return sum(len(part.rows) for part in chunk.changes["thing"].parts)

    assert [found(landed) for landed in (None, first)] == [2, 1]
