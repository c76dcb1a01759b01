"""Rows of the source that share a key, where no constraint there forbids it.

The second row of a key takes the first one's place in raw. Where both come in one load, the landing
sees them; where only the second is new, the source alone knows of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from psycopg import sql

from exporter.errors import SourceError
from exporter.source.blocks import select
from exporter.source.snapshot import TRUE
from exporter.source.table import Column, Table
from exporter.wire import Connection, find_operators

UNIQUE = (  # what to do about it
    "exporter.conflict_columns must be unique at the source; without them, the table is an"
    " append-only log of versions"
)
_COMMA = sql.SQL(", ")


def is_proved(table: Table, keys: Sequence[str]) -> bool:
    """Whether the source's catalog says that no two rows share these columns."""
    return any(unique <= {*keys} for unique in table.unique_keys)


def refuse_shared(
    source: Connection,
    table: Table,
    names: Sequence[str],
    read: Callable[[tuple[Column, ...]], sql.Composable],
) -> None:
    """Raise SourceError where a row that is to be read shares its key with another of the table.

    ``read`` gives the query for columns of the rows that are to be read.
    """
    landed = {column.name: column for column in table.landed}
    columns = tuple(landed[name] for name in names)
    find_operators(source, [column.base for column in columns])
    keys = [sql.Identifier(f"k{number}") for number in range(len(columns))]
    row = source.execute(
        sql.SQL(
            "with asked as materialized (select distinct {keys} from ({read}) r ({keys}, last))"
            " select concat_ws(', ', {named}) from ({whole}) t ({keys}, last)"
            " where ({keys}) in (select {keys} from asked)"
            " group by {keys} having count(*) > 1 limit 1"
        ).format(
            keys=_COMMA.join(keys),
            read=read(columns),
            named=_COMMA.join(
                sql.SQL("{} || '=' || {}::text").format(sql.Literal(name), key)
                for name, key in zip(names, keys, strict=True)
            ),
            whole=select(table, columns, TRUE),
        )
    ).fetchone()
    if row:
        key = table.declared
        raise SourceError(
            f"{key.where}: two rows of {key.schema}.{key.table} share conflict_columns"
            f" ({', '.join(names)}): {row[0]}",
            hint=UNIQUE,
        )
