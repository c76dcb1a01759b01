"""Rows that wait until all of a batch is there, in memory or, from some megabytes on, on disk."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator

from exporter.errors import SourceError
from exporter.wire import AHEAD, Block

_HEAD = struct.Struct("<QII")  # bytes, rows and columns of what follows


class Spool:
    """Blocks of COPY's text, of ever more columns: those to come have NULL in what lies behind."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=AHEAD)  # noqa: SIM115  see ``close``
        self.rows = self.size = 0

    def add(self, data: bytes, rows: int, columns: int) -> None:
        """Add rows. Raises SourceError where the disk is full."""
        try:
            self._file.write(_HEAD.pack(len(data), rows, columns))
            self._file.write(data)
        except OSError as error:
            raise SourceError(
                f"{error.strerror}: the rows of a load wait in {tempfile.gettempdir()} until all"
                " are there",
                hint="TMPDIR names another folder; with exporter.source.in_order, only a batch"
                " waits, in memory",
            ) from None
        self.rows += rows
        self.size += len(data)

    def blocks(self, columns: int) -> Iterator[Block]:
        """Yield all rows, with so many columns."""
        self._file.seek(0)
        while head := self._file.read(_HEAD.size):
            size, rows, width = _HEAD.unpack(head)
            data = self._file.read(size)
            if width < columns:  # a value has no end of line of its own: that is escaped
                data = data.replace(b"\n", b"\t\\N" * (columns - width) + b"\n")
            yield Block(data, rows, b"")

    def close(self) -> None:
        """Forget the rows."""
        self._file.close()
