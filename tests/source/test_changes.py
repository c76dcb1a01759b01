"""Values that travel as changes are exact, whatever their type."""

from __future__ import annotations

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
