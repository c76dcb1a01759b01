"""COPY from one server into another, block by block, without decoding a value.

Works on libpq's own calls: psycopg's ``cursor.copy()`` waits for the socket at every row. Reading
runs in a thread of its own, so that the source fills the buffer while the destination writes.
"""

from __future__ import annotations

import contextlib
import re
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple

from psycopg import errors, sql
from psycopg.pq import ExecStatus, TransactionStatus, abc

from exporter.wire.connection import Connection, cancel, sever

BLOCK = 48 * 1024  # bytes; smaller and larger blocks both cost more time a row
AHEAD = 8 * 1024 * 1024  # bytes read and not yet written
_SLICE = 256 * 1024  # bytes handed to libpq at once; its buffer never shrinks again
_LONG = 1024  # bytes of a value that is no cursor and no key
_GATHER = 0.0002  # seconds; the socket's own buffer holds what comes meanwhile
_READS = 4  # after a small row: libpq's buffer grows, to 128 KB here, when asked again while full
_PATIENCE = 1.0  # seconds that a cancelled copy has to end
_POLL = 0.5  # seconds between looks at whether the other side gave up


class Block(NamedTuple):
    """Some rows in COPY's format. ``last`` is the last row of them; a large one lacks its values.

    A large row is alone in its block, as a view of libpq's memory.
    """

    data: bytes | memoryview
    rows: int
    last: bytes


class Stopped(Exception):  # noqa: N818  a signal between two threads, no error
    """The other side ended."""


END_OF_BATCH = Block(b"", 0, b"")


class Limit(NamedTuple):
    """Where a batch ends: after so many rows or bytes, though never between two tied rows."""

    rows: int
    size: int
    tied: Callable[[bytes, bytes], bool] | None = None


def copy_out(
    connection: Connection, query: sql.Composable, *, binary: bool, limit: Limit | None = None
) -> Iterator[Block]:
    """Yield the rows of a query in COPY's binary or text format, ``END_OF_BATCH`` after each batch.

    Without a limit the query is one batch. Raises psycopg.Error.
    """
    pgconn = connection.pgconn
    statement = sql.SQL("copy ({}) to stdout (format {})").format(
        query, sql.SQL("binary" if binary else "text")
    )
    start_copy(pgconn, statement.as_string(connection).encode(), ExecStatus.COPY_OUT)
    rows = _batches(pgconn, binary, limit) if limit else _one_batch(pgconn, binary)
    any_row = yield from rows
    _finish(pgconn)  # before the batch ends: what a failed copy has given is not all of it
    if any_row:
        yield END_OF_BATCH


def _one_batch(pgconn: abc.PGconn, binary: bool) -> Generator[Block, None, bool]:
    """Yield all rows; return whether there were any. No row is looked at: a first load."""
    next_row = pgconn.get_copy_data
    rows: list[bytes] = []
    size = 0
    any_row = large = False
    while True:
        length, data = next_row(1)
        if length == 0:
            length, data = _awaited(pgconn, large)
        large = length > BLOCK
        if length > 0 and not large:
            rows.append(bytes(data))
            size += length
            if size < BLOCK:
                continue
        if rows:
            yield _joined(rows)
            rows, size, any_row = [], 0, True
        if large:
            # libpq's own copy is handed on, and forgotten before the next row is asked for.
            block, data = Block(data, 1, _kept(data, binary)), memoryview(b"")
            yield block
            del block
            any_row = True
        if length < 0:
            return any_row


def _batches(pgconn: abc.PGconn, binary: bool, limit: Limit) -> Generator[Block, None, bool]:
    """Yield all rows, cut where the limit says; return whether some follow the last cut."""
    rows: list[bytes] = []
    last = b""
    size = batch_rows = batch_size = 0
    large = False
    while True:
        length, data = pgconn.get_copy_data(1)
        if length == 0:
            length, data = _awaited(pgconn, large)
        large = length > BLOCK
        row = (_kept(data, binary) if large else bytes(data)) if length > 0 else b""
        full = batch_rows >= limit.rows or batch_size >= limit.size
        ends = length < 0 or (full and not (limit.tied and limit.tied(last, row)))
        if rows and (ends or large or size >= BLOCK):
            yield _joined(rows)
            rows, size = [], 0
        if length < 0:
            return batch_rows > 0
        if ends and batch_rows:
            yield END_OF_BATCH
            batch_rows = batch_size = 0
        batch_rows += 1
        batch_size += length
        last = row
        if large:
            block, data = Block(data, 1, row), memoryview(b"")
            yield block
            del block
        else:
            rows.append(row)
            size += length


def _joined(rows: list[bytes]) -> Block:
    return Block(b"".join(rows), len(rows), rows[-1])


def _kept(row: memoryview, binary: bool) -> bytes:
    return b"" if binary else _shortened(row)


def _shortened(row: memoryview) -> bytes:
    """Return a row in text format without its long values: 50 MB must not stay for a cursor."""
    ends = [match.start() for match in re.finditer(rb"\t", row)] + [len(row) - 1]
    begins = [0, *(end + 1 for end in ends[:-1])]
    spans = zip(begins, ends, strict=True)
    return b"\t".join(bytes(row[a:b]) if b - a <= _LONG else b"" for a, b in spans) + b"\n"


def one_batch(blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield the blocks up to the end of a batch, keeping none."""
    while True:
        block = next(blocks, END_OF_BATCH)
        if block is END_OF_BATCH:
            return
        yield block
        del block


class CopyIn:
    """``COPY … FROM STDIN`` on a connection: ``write`` blocks, then ``finish``."""

    def __init__(self, connection: Connection, statement: sql.Composable) -> None:
        self._pgconn = connection.pgconn
        start_copy(self._pgconn, statement.as_string(connection).encode(), ExecStatus.COPY_IN)

    def write(self, data: bytes | memoryview) -> None:
        """Send a block. Raises psycopg.Error when the server gave up."""
        view = memoryview(data)
        for begin in range(0, len(view), _SLICE):
            # Without a flush after each put, libpq's buffer grows and is moved about at every put.
            self._pgconn.put_copy_data(view[begin : begin + _SLICE])
            flush(self._pgconn)

    def finish(self) -> int:
        """End the copy; return the number of rows. Raises psycopg.Error."""
        self._pgconn.put_copy_end()
        flush(self._pgconn)
        return _finish(self._pgconn)

    def abandon(self) -> None:
        """End the copy as failed, leaving the transaction to be rolled back."""
        if self._pgconn.transaction_status == TransactionStatus.ACTIVE:
            with contextlib.suppress(errors.Error):  # what led here says more than a lost server
                self._pgconn.put_copy_end(b"the other side failed")
                flush(self._pgconn)
                drain(self._pgconn)


def pour(
    connection: Connection, statement: sql.Composable, blocks: Iterable[Block]
) -> tuple[int, int]:
    """Run ``COPY … FROM STDIN`` on these blocks; return rows and bytes. Raises psycopg.Error."""
    copy = CopyIn(connection, statement)
    size = 0
    try:
        for block in blocks:
            size += len(block.data)
            copy.write(block.data)
            del block  # before the next is asked for: a row may be large
    except BaseException:
        copy.abandon()
        raise
    return copy.finish(), size


class ReadAhead:
    """Runs an iterator of blocks in a thread, at most ``AHEAD`` bytes in front of its reader."""

    def __init__(self, produce: Callable[[], Iterator[Block]]) -> None:
        self._blocks: deque[Block] = deque()
        self._bytes = 0
        self._ended = False
        self._stopped = False
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(produce,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Block]:
        while True:
            with self._change:
                while not self._blocks and not self._ended:
                    self._change.wait(_POLL)
                if not self._blocks:
                    if self._error:
                        raise self._error
                    return
                block = self._blocks.popleft()
            size = len(block.data)
            yield block
            del block
            with self._change:
                # Counted until it is written: two rows of 50 MB are never here together.
                self._bytes -= size
                self._change.notify_all()

    def more(self) -> bool:
        """Wait, and tell whether a block follows. Raises what reading raised."""
        with self._change:
            while not self._blocks and not self._ended:
                self._change.wait(_POLL)
            if not self._blocks and self._error:
                raise self._error
            return bool(self._blocks)

    def stop(self, connection: Connection) -> None:
        """End the thread; close the connection that it left in a copy. Safe to call twice."""
        with self._change:
            self._stopped = True
            running = not self._ended
            self._change.notify_all()
        if running:
            cancel(connection)
            self._thread.join(_PATIENCE)
            sever(connection)  # a peer that has fallen silent would keep the thread for ever
        self._thread.join()
        if running:
            connection.close()

    def _run(self, produce: Callable[[], Iterator[Block]]) -> None:
        try:
            for block in produce():
                self._put(block)
                del block
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  raised again by the reader
            self._error = error
        with self._change:
            self._ended = True
            self._change.notify_all()

    def _put(self, block: Block) -> None:
        with self._change:
            self._blocks.append(block)
            self._bytes += len(block.data)
            self._change.notify_all()
            del block
            while self._bytes >= AHEAD and not self._stopped:
                self._change.wait(_POLL)
            if self._stopped:
                raise Stopped


def field(row: bytes, index: int) -> str | None:
    """Return a field of a row in COPY's text format, None for NULL."""
    value = row.rstrip(b"\n").split(b"\t")[index]
    if value == b"\\N":
        return None
    if b"\\" not in value:
        return value.decode()
    plain = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}
    first, *rest = value.split(b"\\\\")
    parts = [first, *rest]
    for number, part in enumerate(parts):
        for letter, meant in plain.items():
            part = part.replace(b"\\" + letter, meant)  # noqa: PLW2901
        parts[number] = part
    return b"\\".join(parts).decode()


def start_copy(pgconn: abc.PGconn, statement: bytes, expected: ExecStatus) -> None:
    """Begin a copy by a statement. Raises psycopg.Error."""
    pgconn.send_query(statement)
    flush(pgconn)
    while pgconn.is_busy():
        _wait_readable(pgconn)
    result = pgconn.get_result()
    if result is None or result.status != expected:
        drain(pgconn)
        raise failure(pgconn, result)


def drain(pgconn: abc.PGconn) -> None:
    """Take what is left of a statement's results.

    libpq's own waiting for them would stop every thread of this process.
    """
    while True:
        while pgconn.is_busy():
            _wait_readable(pgconn)
        if pgconn.get_result() is None:
            return


def _finish(pgconn: abc.PGconn) -> int:
    rows = 0
    failed: abc.PGresult | None = None
    while True:
        while pgconn.is_busy():
            _wait_readable(pgconn)
        result = pgconn.get_result()
        if result is None:
            break
        if result.status == ExecStatus.COMMAND_OK:
            rows = result.command_tuples or 0
        else:
            failed = result
            if result.status in (ExecStatus.COPY_IN, ExecStatus.COPY_OUT):
                break  # the connection is gone: libpq would give this for ever
    if failed is not None:
        raise failure(pgconn, failed)
    return rows


def failure(pgconn: abc.PGconn, result: abc.PGresult | None) -> errors.Error:
    """Return the error that a result, or the connection, tells of."""
    if result is not None and result.status == ExecStatus.FATAL_ERROR:
        return errors.error_from_result(result)
    return errors.OperationalError(pgconn.error_message.decode(errors="replace"))


def _wait_readable(pgconn: abc.PGconn) -> None:
    select.select([pgconn.socket], [], [], _POLL)
    pgconn.consume_input()


def _awaited(pgconn: abc.PGconn, large: bool) -> tuple[int, memoryview]:
    """Wait for a good many rows; return the next, as libpq does. A server sends 8 KB at a time:
    woken for each, both sides spend more on waking up than on rows.

    ``large``: the row before was. Amid large ones libpq is asked once at a time: asked again, it
    would take in the next one beside it.
    """
    reads = 1 if large else _READS
    while True:
        select.select([pgconn.socket], [], [], _POLL)
        time.sleep(_GATHER)
        for _ in range(reads):
            pgconn.consume_input()
        length, data = pgconn.get_copy_data(1)
        if length:
            return length, data
        reads = 1


def flush(pgconn: abc.PGconn) -> None:
    """Send what waits to be sent."""
    while pgconn.flush():
        readable, _, _ = select.select([pgconn.socket], [pgconn.socket], [], _POLL)
        if readable:  # a server that complains must be heard, or both wait for ever
            pgconn.consume_input()
