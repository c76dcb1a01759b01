"""Definitions and tables that several tests load."""

from __future__ import annotations

from tests.conftest import Workplace

EVENT = 'public."StatEvent"'
RAW = "analytics_raw.stat_event"
BARE = """
- name: item
  config:
    meta:
      exporter:
        key: Item
        source:
          table: item
"""
ITEM = f"""{BARE.rstrip()}
          cursor: {{field: at, id_field: id}}
        conflict_columns: [id]
"""
# The source sleeps at every row, so that there is something to watch.
SLOW = """
- name: slow
  config:
    meta:
      exporter:
        key: Slow
        source:
          table: slow
          columns: [id, at, {name: nap, expression: "pg_sleep(0.01)::text"}]
          cursor: {field: at, id_field: id}
        conflict_columns: [id]
"""


def slow_table(place: Workplace, rows: int) -> None:
    place.define(SLOW)
    place.query(
        place.core,
        "create table slow (id int primary key, at timestamptz not null,"
        " pad text default repeat('x', 900));"
        f" insert into slow select n, now() from generate_series(1, {rows}) n; analyze slow",
    )


def forget_everything(place: Workplace) -> None:
    place.query(place.analytics, "drop schema if exists analytics_raw cascade")
