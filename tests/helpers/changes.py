"""Tables that are read by their changes."""

from __future__ import annotations

import json
from typing import Any

import psycopg

from tests.conftest import Workplace, compare
from tests.helpers.processes import until


def define(place: Workplace, *tables: str, **more: str) -> None:
    """Declare these tables, each read by its changes; ``more`` is YAML below a table's key."""
    place.define(
        *(
            f"""
- name: {table}
  config:
    meta:
      exporter:
        key: {table}
        source: {{table: {table}, read: changes}}
        {more.get(table, "")}
"""
            for table in tables
        )
    )


def two_tables(place: Workplace) -> None:
    """Make and declare the tables ``a`` and ``b``, of 20 rows each, which share a slot."""
    for name in ("a", "b"):
        place.query(
            place.core,
            f"create table {name} (id int primary key, v int);"
            f" insert into {name} select i, i from generate_series(1, 20) i",
        )
    define(place, "a", "b")


def results(place: Workplace, *words: str) -> dict[str, dict[str, Any]]:
    """Load; return the results by their keys."""
    done = place.run("exporter", "load", "--json", *words)
    assert done.returncode == 0, done.stderr
    return {one["key"]: one for one in map(json.loads, done.stdout.splitlines())}


def same(place: Workplace, *tables: str) -> None:
    """Assert that raw is what the source is."""
    for table in tables:
        names = place.query(
            place.core,
            "select string_agg(quote_ident(attname), ', ' order by attnum) from pg_attribute"
            f" where attrelid = '{table}'::regclass and attnum > 0 and not attisdropped",
        )[0][0]
        compare(place, f"public.{table}", f"(select {names} from analytics_raw.{table}) r")


def by_ranges(place: Workplace) -> bool:
    """Whether the source's version can be copied by ranges of blocks, for the first time."""
    return int(place.query(place.core, "show server_version_num")[0][0]) >= 140000


def refused(place: Workplace, *words: str) -> tuple[int, str]:
    """Load, which fails; return the exit status, and what it says."""
    done = place.run("exporter", "load", *words)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def slots(place: Workplace) -> list[tuple[Any, ...]]:
    """The slots of the source's database, and the publications."""
    return place.query(
        place.core,
        "select slot_name from pg_replication_slots where database = current_database()"
        " union all select pubname from pg_publication",
    )


def start_receiver(place: Workplace, name: str) -> psycopg.pq.PGconn:
    """Read a slot as somebody else would."""
    receiver = psycopg.pq.PGconn.connect(f"{place.core}&replication=database".encode())
    options = f"(proto_version '1', publication_names '{name}')"
    receiver.send_query(f"START_REPLICATION SLOT {name} LOGICAL 0/0 {options}".encode())
    until(
        lambda: (
            place.query(
                place.core, f"select active from pg_replication_slots where slot_name = '{name}'"
            )
            == [(True,)]
        )
    )
    return receiver
