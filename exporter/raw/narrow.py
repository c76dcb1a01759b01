"""Columns of raw that are narrower than the source's: what does not fit is refused, not rounded.

Only tables that migrations made, or that somebody altered, have such columns.
"""

from __future__ import annotations

from psycopg import sql

from exporter.errors import RowError
from exporter.raw.refused import key_text
from exporter.raw.statements import STAGING
from exporter.raw.table import RawTable
from exporter.wire import Connection


def refuse_rounded(destination: Connection, raw: RawTable, batch: int) -> None:
    """Raise RowError for a staged row of which raw could not keep a value as it is."""
    for name, kind in raw.narrow.items():
        value = sql.Identifier("s", name)
        wide = next(column.raw_type for column in raw.columns if column.name == name)
        key = raw.target.conflict_columns or (raw.columns[0].name,)
        row = destination.execute(
            sql.SQL(
                "select {key} from {staging} s"
                " where {value}::{kind}::{wide} is distinct from {value} limit 1"
            ).format(
                key=key_text({one: sql.Identifier(one) for one in key}),
                staging=STAGING,
                value=value,
                kind=sql.SQL(kind),
                wide=sql.SQL(wide),
            )
        ).fetchone()
        if row:
            raise RowError(
                f"{raw.target.key}: batch {batch}, row {row[0]}, column {name}: its value is {wide}"
                f" at the source, and does not fit into raw's {kind}",
                hint=f'alter table {raw.target} alter column "{name}" type {wide}',
            )
