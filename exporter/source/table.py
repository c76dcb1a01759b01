"""A table of the source as the catalog describes it."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from psycopg import sql

from exporter.config import SourceTable
from exporter.source import types as raw_types

BLOCK = 8192  # bytes


class Column(NamedTuple):
    """A column of the source.

    ``base`` is what its type is made of, such as a domain's base, in the source's words;
    ``raw_type`` what the raw table gives it, in the destination's.
    """

    name: str
    type: str
    base: str
    raw_type: str
    not_null: bool
    binary: bool  # its binary form means the same on every server
    typmod: int = -1
    streamed: int = 0  # its type's id, where raw takes what a slot sends of it in binary
    expression: str | None = None  # what the source computes instead of reading a column

    @property
    def selected(self) -> sql.Composable:
        """The expression that reads the column for raw."""
        name: sql.Composable = sql.Identifier(self.name)
        if self.expression is not None:
            name = sql.SQL("({})").format(sql.SQL(self.expression))
        wanted = self.raw_type if self.raw_type in raw_types.TEXTS else self.base
        return name if self.type == wanted else sql.SQL("{}::{}").format(name, sql.SQL(wanted))


class Heap(NamedTuple):
    """What holds rows: a table itself, a partition, a materialized view."""

    oid: int
    schema: str
    name: str
    blocks: int
    file: str  # changes when it is rewritten
    kind: str  # pg_class.relkind
    readable: bool  # by its own name: a right to a partitioned table is none to its partitions

    @property
    def identifier(self) -> sql.Identifier:
        """Its qualified name."""
        return sql.Identifier(self.schema, self.name)


class Table(NamedTuple):
    """A table of the source, as it stands in the transaction that reads it."""

    declared: SourceTable
    oid: int
    kind: str  # pg_class.relkind: r table, p partitioned, v view, m materialized view, f foreign
    columns: tuple[Column, ...]
    computed: tuple[Column, ...]  # of the definition's expressions
    rows: float  # the planner's estimate; below 0 where it has none
    has_xmin: bool  # the rows of foreign tables and of views carry none
    buffers: int  # blocks of the server's shared_buffers
    in_blocks: bool  # a server (from 14 on) that reads a range of its heaps without the rest
    unique_keys: tuple[frozenset[str], ...]
    primary_key: tuple[str, ...] = ()
    heaps: tuple[Heap, ...] = ()  # in the order of their oids
    partitions: tuple[int, ...] = ()  # and tables that inherit from it, by oid
    indexed: frozenset[str] = frozenset()  # columns in whose order an index can be read
    hides_rows: bool = False  # from this role, by row security
    unreadable: tuple[str, ...] = ()  # columns that this role may not read, PostgreSQL's own too
    elsewhere: str = ""  # whose transactions write it, where they cannot be seen here

    @property
    def blocks(self) -> int:
        """The blocks of all its heaps."""
        return sum(heap.blocks for heap in self.heaps)

    @property
    def size(self) -> int:
        """The bytes of all its heaps."""
        return self.blocks * BLOCK

    @property
    def file(self) -> str:
        """What changes when a heap is rewritten, or the blocks of one get another number."""
        if len(self.heaps) == 1:
            return self.heaps[0].file
        return ", ".join(f"{heap.file}@{place}" for place, heap in self.placed)

    @property
    def placed(self) -> tuple[tuple[int, Heap], ...]:
        """The heaps with the number of their first block: one heap's follow the other's."""
        places = itertools.accumulate((heap.blocks for heap in self.heaps), initial=0)
        return tuple(zip(places, self.heaps, strict=False))

    def moved(self, file: str, block: int) -> int | None:
        """Return the number that a block has now, of which ``file`` was the table's file.

        Partitions grow, and the blocks of those behind them get other numbers. None where a heap up
        to the block's is another, or was rewritten: then its rows may lie anywhere.
        """
        if file == self.file:
            return block
        named = (one.partition("@") for one in file.split(", "))
        before = [(name, int(place or 0)) for name, _, place in named if int(place or 0) <= block]
        now = self.placed[: len(before)]
        if not before or [name for name, _ in before] != [heap.file for _, heap in now]:
            return None
        first, heap = now[-1]
        return first + min(block - before[-1][1], heap.blocks)

    def column(self, name: str) -> Column:
        """Return the column of that name. Raises KeyError."""
        return {column.name: column for column in self.columns}[name]

    @property
    def landed(self) -> tuple[Column, ...]:
        """The columns that raw gets: in the source's order, then the new computed ones."""
        computed = {column.name: column for column in self.computed}
        chosen = [computed.pop(c.name, c) for c in self.columns if self.declared.lands(c.name)]
        return (*chosen, *computed.values())
