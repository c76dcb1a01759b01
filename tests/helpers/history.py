"""Tables of which every version is kept."""

from __future__ import annotations

from typing import Any

from tests.conftest import Workplace, compare

NEWEST = """
(select * from (
    select distinct on (id) * from analytics_raw.{table} where {seen}
    order by id, _lsn desc, _seq desc
) v where _op <> 'delete')
"""


def define(place: Workplace, *tables: str, **more: str) -> None:
    """Declare these tables as histories, of the source's tables of their names.

    ``more`` is YAML below a table's key: where it says ``mode``, the table is none.
    """
    place.define(*(declared(table, more.get(table, "mode: history")) for table in tables))


def declared(table: str, more: str, source: str = "") -> str:
    return f"""
- name: {table}
  config:
    meta:
      exporter:
        key: {table}
        source: {{table: {source or table}, read: changes}}
        {more}
"""


def replayed(place: Workplace, table: str, source: str = "", seen: str = "true") -> None:
    """Assert that the newest versions are what the source is; or those that ``seen`` chooses."""
    source = source or table
    names = place.query(
        place.core,
        "select string_agg(quote_ident(attname), ', ' order by attnum) from pg_attribute"
        f" where attrelid = '{source}'::regclass and attnum > 0 and not attisdropped",
    )[0][0]
    newest = NEWEST.format(table=table, seen=seen)
    compare(place, f"public.{source}", f"(select {names} from {newest} n) r")


def versions(
    place: Workplace, table: str, where: str = "true", columns: str = "*"
) -> list[tuple[Any, ...]]:
    """The versions in their order."""
    return place.query(
        place.analytics,
        f"select {columns} from analytics_raw.{table} where {where} order by _lsn, _seq, 1",
    )
