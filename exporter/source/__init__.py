"""The source: its catalog, and one module for each way of reading, behind ``Reader``.

A definition and a stored position come in; a plan and batches of rows go out.
"""

from exporter.config.definition import Definition
from exporter.source.catalog import Column, Table, find_table
from exporter.source.cursor import CursorReader
from exporter.source.reader import NEW, Batch, Lands, Plan, Reader, Rows, Wanted
from exporter.source.window import Span
from exporter.wire.connection import Connection

__all__ = [
    "NEW",
    "Batch",
    "Column",
    "Lands",
    "Plan",
    "Reader",
    "Rows",
    "Span",
    "Table",
    "Wanted",
    "find_table",
    "reader_of",
]


def reader_of(definition: Definition, source: Connection) -> Reader:
    """Return the way of reading that a definition asks for."""
    return CursorReader(source, definition)
