"""The source: its catalog, and one module for each way of reading, behind ``Reader``.

A definition and a stored position come in; a plan and batches of rows go out.
"""

from exporter.config import Definition
from exporter.source.blocks import Blocks, Range, select
from exporter.source.catalog import Column, Table, find_table, look_further
from exporter.source.cursor import CursorReader, describe
from exporter.source.reader import BEYOND, NEW, Batch, Lands, Plan, Reader, Rows, Wanted
from exporter.source.snapshot import Horizon
from exporter.source.window import Span
from exporter.wire import Connection

__all__ = [
    "BEYOND",
    "NEW",
    "Batch",
    "Blocks",
    "Column",
    "Horizon",
    "Lands",
    "Plan",
    "Range",
    "Reader",
    "Rows",
    "Span",
    "Table",
    "Wanted",
    "describe",
    "find_table",
    "look_further",
    "reader_of",
    "select",
]


def reader_of(definition: Definition, source: Connection) -> Reader:
    """Return the way of reading that a definition asks for."""
    return CursorReader(source, definition)
