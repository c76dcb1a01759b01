"""Ranges of a table's blocks: the first load of a table, read in parts that end in their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from psycopg import sql

from exporter.source.catalog import Column, Table
from exporter.source.snapshot import TRUE, changed_since

STAGED = "text, through staging"
MOST = 2048  # blocks of a range: 16 MB of the source's pages


class Range(NamedTuple):
    """Blocks of the source's table, the end excluded. What is landed in one transaction."""

    number: int
    first: int
    end: int


class Blocks(NamedTuple):
    """The blocks of a table from ``begin`` to ``end``, in ranges of ``step``.

    ``direct``: rows go into raw itself, which cannot have them yet, in binary and with their stamp;
    else they are upserted. Rows of the transaction ``since`` or a later one are left for later.
    """

    table: Table
    columns: tuple[Column, ...]
    direct: bool
    begin: int
    end: int
    step: int
    since: str | None

    def ranges(self) -> Iterator[Range]:
        """Yield what is to be landed, in the order of landing."""
        for number, first in enumerate(range(self.begin, self.end, self.step)):
            yield Range(number, first, first + self.step)

    @property
    def first(self) -> Range:
        """The first range: the queries of the others differ in their blocks alone."""
        return Range(0, self.begin, self.begin + self.step)

    @property
    def total(self) -> int:
        """The number of ranges."""
        return len(range(self.begin, self.end, self.step))

    @property
    def last(self) -> int:
        """The block to go on from when all of it has landed."""
        return self.begin + self.total * self.step

    @property
    def how(self) -> str:
        """Which way the rows take, for people."""
        how = "binary, straight into raw" if self.direct else STAGED
        return f"from block {self.begin:,} of {self.end:,}, {how}"

    def query(self, part: Range, stamp: str) -> sql.Composable:
        """Return the query for a range's rows; the stamp is part of a row that goes into raw."""
        where: sql.Composable = sql.SQL("ctid >= '({},0)'::tid and ctid < '({},0)'::tid").format(
            sql.Literal(part.first), sql.Literal(part.end)
        )
        if self.since is not None:
            where += sql.SQL(" and not {}").format(changed_since(self.since))
        last: sql.Composable = TRUE
        if self.direct:
            last = sql.SQL("{}::timestamptz").format(sql.Literal(stamp))
        return select(self.table, self.columns, where, last)


def step_of(table: Table, batch_rows: int) -> int:
    """Return how many blocks hold a batch's rows, by the source's statistics."""
    if table.rows <= 0 or not table.blocks:
        return MOST
    return max(1, min(MOST, int(batch_rows * table.blocks / table.rows)))


def select(
    table: Table,
    columns: tuple[Column, ...],
    where: sql.Composable,
    last: sql.Composable = TRUE,
) -> sql.Composable:
    """Return the query for rows of a table: these columns, and ``last`` behind them."""
    declared = table.declared
    chosen = [*(column.selected for column in columns), last]
    if declared.cursor.nulls == "skip":
        field = sql.Identifier(declared.cursor.field)
        where = sql.SQL("{} and {} is not null").format(where, field)
    return sql.SQL("select {} from {} where {}").format(
        sql.SQL(", ").join(chosen), declared.name, where
    )
