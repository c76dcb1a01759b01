"""Ranges of a table's blocks: what is read in parts that end in their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from psycopg import sql

from exporter.source.snapshot import TRUE
from exporter.source.table import Column, Table

STAGED = "text, through staging"
MOST = 2048  # blocks of a range: 16 MB of the source's pages


class Range(NamedTuple):
    """Blocks of a table, the end excluded. What is landed in one transaction."""

    number: int
    first: int
    end: int


class Blocks(NamedTuple):
    """The blocks of a table from ``begin`` on, in ranges of at most ``step``.

    The blocks of several heaps are numbered one heap after the other; a range is of one of them.
    ``direct``: rows go into raw itself, which cannot have them yet, in binary and with their stamp;
    else they are upserted. Only rows that meet the condition ``where`` are read.
    """

    table: Table
    columns: tuple[Column, ...]
    direct: bool
    begin: int
    step: int
    where: sql.Composable = TRUE

    def ranges(self) -> Iterator[Range]:
        """Yield what is to be landed, in the order of landing."""
        number = 0
        for place, heap in self.table.placed:
            end = place + heap.blocks
            for first in range(max(place, self.begin), end, self.step):
                yield Range(number, first, min(first + self.step, end))
                number += 1

    @property
    def end(self) -> int:
        """The block to go on from when all of it has landed."""
        return max(self.begin, self.table.blocks)

    @property
    def first(self) -> Range:
        """The first range: the queries of the others differ in their blocks alone."""
        return next(self.ranges(), Range(0, self.begin, self.begin))

    @property
    def total(self) -> int:
        """The number of ranges."""
        return sum(1 for _ in self.ranges())

    @property
    def how(self) -> str:
        """Which way the rows take, for people."""
        how = "binary, straight into raw" if self.direct else STAGED
        return f"from block {self.begin:,} of {self.end:,}, {how}"

    def query(self, part: Range, stamp: str) -> sql.Composable:
        """Return the query for a range's rows; the stamp is part of a row that goes into raw."""
        last: sql.Composable = TRUE
        if self.direct:
            last = sql.SQL("{}::timestamptz").format(sql.Literal(stamp))
        return select_blocks(self.table, self.columns, part.first, part.end, self.where, last)


def select_blocks(
    table: Table,
    columns: tuple[Column, ...],
    first: int,
    end: int,
    where: sql.Composable,
    last: sql.Composable = TRUE,
) -> sql.Composable:
    """Return the query for rows of these blocks, which are of one heap."""
    place, heap = [one for one in table.placed if one[0] <= first][-1]
    inside = sql.SQL("ctid >= '({},0)'::tid and ctid < '({},0)'::tid and {}").format(
        sql.Literal(first - place), sql.Literal(end - place), where
    )
    # Called as the table is: an expression of the definition may name it.
    name = sql.SQL("only {} as {}").format(heap.identifier, sql.Identifier(table.declared.table))
    return select(table, columns, inside, last, name)


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
    name: sql.Composable | None = None,
) -> sql.Composable:
    """Return the query for rows of a table: these columns, and ``last`` behind them.

    ``name`` is another one than the table's, for a part of its rows.
    """
    declared = table.declared
    chosen = [*(column.selected for column in columns), last]
    if declared.skipped:
        field = sql.Identifier(declared.skipped)
        where = sql.SQL("{} and {} is not null").format(where, field)
    return sql.SQL("select {} from {} where {}").format(
        sql.SQL(", ").join(chosen), name or declared.name, where
    )
