"""The source: its catalog, and one module for each way of reading, behind ``Reader``.

A definition and a stored position come in; a plan and batches of rows go out.
"""

from exporter.config import Definition
from exporter.source.blocks import Blocks, Range, select
from exporter.source.catalog import find_table, keyed, look_further, require
from exporter.source.copied import CopyReader
from exporter.source.cursor import CursorReader
from exporter.source.reader import BEYOND, NEW, Batch, Lands, Plan, Reader, Rows, Wanted, megabytes
from exporter.source.scan import ScanReader
from exporter.source.shared import is_proved
from exporter.source.snapshot import Horizon, join_snapshot
from exporter.source.table import Column, Table
from exporter.source.window import Span, cursor_columns, is_scanned
from exporter.wire import Connection

__all__ = [
    "BEYOND",
    "NEW",
    "Batch",
    "Blocks",
    "Column",
    "CopyReader",
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
    "is_proved",
    "join_snapshot",
    "keyed",
    "look_further",
    "megabytes",
    "reader_of",
    "select",
]


def reader_of(definition: Definition, source: Connection | None) -> Reader:
    """Return the way of reading that a definition asks for. A function needs no session."""
    cursor = definition.source.cursor
    if source is None:
        from exporter.source.rows import RowsReader  # noqa: PLC0415  most definitions are of tables

        return RowsReader(definition)
    if definition.source.read == "changes":
        return CopyReader(source, definition)
    if cursor is None or definition.source.is_scanned:
        return ScanReader(source, definition)
    return CursorReader(source, definition, cursor)


def describe(definition: Definition, table: Table) -> str:
    """Return by what the table is read, for people. Raises SourceError where it cannot be."""
    declared = definition.source
    require(table, "conflict_columns", definition.destination.conflict_columns)
    size = megabytes(table.size)
    if declared.read == "changes":
        return f"by its changes, after a copy of {size}"
    if declared.is_scanned:
        return f"by scan of {size} a load"
    cursor = cursor_columns(declared, table)[0].name
    if definition.destination.mode == "append" or not table.has_xmin:
        return f"by {cursor}"
    if is_scanned(declared, table):
        return f"by {cursor}, and by scan of {size} a load"
    if declared.sweep is None:
        return f"by {cursor}, with no sweep"
    within = str(declared.sweep).removesuffix(", 0:00:00")
    return f"by {cursor}, with a sweep of its {size} within {within}"
