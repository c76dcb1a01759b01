"""Tables that are read by their changes, on a server that keeps what it takes."""

from __future__ import annotations

from tests.conftest import Workplace


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


def results(place: Workplace, *words: str) -> dict[str, dict[str, object]]:
    """Load; return the results by their keys."""
    import json

    done = place.run("exporter", "load", "--json", *words)
    assert done.returncode == 0, done.stderr
    return {one["key"]: one for one in map(json.loads, done.stdout.splitlines())}
