"""A logical replication slot, read by the streaming protocol on libpq's own calls.

A thread reads ahead and keeps the server informed, also while its reader is busy elsewhere: a
client that says nothing for a minute is sent away. No daemon: where the stream ends is known
beforehand, and that it is reached is asked of the server, never guessed from a silence.
"""

from __future__ import annotations

import contextlib
import queue
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import psycopg
from psycopg import sql
from psycopg.pq import ExecStatus

from exporter.wire.connection import Connection, cancel, sever
from exporter.wire.copy import Stopped, drain, failure, flush, start_copy

_DATA, _KEEPALIVE = ord("w"), ord("k")
_HEADER = 25  # bytes before the message of the plugin
_REPORT = 1.0  # seconds after which the server hears of us in any case
_ASK = (0.002, 0.1)  # seconds between questions how far it is: the first one, the longest
_MESSAGES = 256  # between looks at the clock
_INTERVAL = 0.00001  # seconds
_PATIENCE = 2.0  # seconds for the server to end the stream in order

Item = TypeVar("Item")


class Slot:
    """The stream of a slot's changes, to be used by one thread; others may call ``confirm``."""

    def __init__(
        self,
        connection: Connection,
        name: str,
        publication: str,
        begin: int,
        *,
        binary: bool = False,
    ) -> None:
        """Start after the position ``begin``, which the destination has. Raises psycopg.Error.

        ``binary``: values come in their types' binary form, from version 14 on; else as texts.
        """
        self._pgconn = connection.pgconn
        self._connection = connection
        self._confirmed = self._told = begin
        self._reported = self._asked = 0.0
        self._delay = _ASK[0]
        self._waits = False  # for an answer
        self._stopped = threading.Event()
        statement = sql.SQL(
            "START_REPLICATION SLOT {} LOGICAL {} (proto_version '1', publication_names {}{})"
        ).format(
            sql.Identifier(name),
            sql.SQL(lsn_text(begin)),
            sql.Literal(sql.Identifier(publication).as_string(connection)),
            sql.SQL(", binary 'true'" if binary else ""),
        )
        start_copy(self._pgconn, statement.as_string(connection).encode(), ExecStatus.COPY_BOTH)

    def messages(self) -> Iterator[bytes | int]:
        """Yield the plugin's messages, and between them positions up to which all was sent.

        Raises psycopg.Error when the server ends the stream.
        """
        self._report(ask=True)
        count = 0
        while True:
            length, data = self._pgconn.get_copy_data(1)
            if length > 0 and data[0] == _DATA:
                count += 1
                if count % _MESSAGES == 0:
                    self.tick()
                yield data.tobytes()[_HEADER:]
            elif length > 0 and data[0] == _KEEPALIVE:
                self._waits = False
                if data[17]:
                    self._report()
                yield int.from_bytes(data[1:9], "big")
            elif length < 0:
                result = self._pgconn.get_result()
                raise failure(self._pgconn, result)
            else:
                self.tick()
                select.select([self._pgconn.socket], [], [], self._delay)
                self._pgconn.consume_input()

    def confirm(self, position: int) -> None:
        """Let the server forget what lies before a position: the destination has it on disk."""
        self._confirmed = max(self._confirmed, position)

    def tick(self) -> None:
        """Tell the server, where it is time, that we are here, and ask it how far it is.

        Raises Stopped after ``stop``.
        """
        if self._stopped.is_set():
            raise Stopped
        now = time.monotonic()
        if not self._waits and now >= self._asked + self._delay:
            self._delay = min(2 * self._delay, _ASK[1])
            self._report(ask=True)
        elif now >= self._reported + _REPORT or self._confirmed != self._told:
            self._report()

    def stop(self) -> None:
        """Let the thread that reads end."""
        self._stopped.set()

    def end(self) -> None:
        """End the stream in order, the last confirmation included; else close the session."""
        try:
            self._report()
            self._pgconn.put_copy_end()
            flush(self._pgconn)
            until = time.monotonic() + _PATIENCE
            while (length := self._pgconn.get_copy_data(1)[0]) >= 0:
                if length == 0:
                    select.select([self._pgconn.socket], [], [], 0.05)
                    self._pgconn.consume_input()
                if time.monotonic() > until:  # it is amid a large transaction, which we have not
                    raise Stopped
            drain(self._pgconn)
        except (psycopg.Error, Stopped):  # what was not confirmed is sent again, and passed over
            sever(self._connection)
        self._connection.close()

    def _report(self, *, ask: bool = False) -> None:
        position = self._confirmed
        number = position.to_bytes(8, "big")
        self._pgconn.put_copy_data(b"r" + 3 * number + bytes(8) + (b"\1" if ask else b"\0"))
        flush(self._pgconn)
        self._told = position
        self._reported = time.monotonic()
        if ask:
            self._waits, self._asked = True, self._reported


class Following(Generic[Item]):
    """What ``gather`` makes of a slot's messages, in a thread that is one item ahead."""

    def __init__(
        self, slot: Slot, gather: Callable[[Iterator[bytes | int]], Iterator[Item]]
    ) -> None:
        self._slot = slot
        self._items: queue.Queue[Item | None] = queue.Queue(1)
        self._error: BaseException | None = None
        # A thread that computes goes on for 5 ms while another one waits: whoever lands what was
        # gathered would wait so long for each piece that it sends, a third of its time.
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(_INTERVAL)
        self._thread = threading.Thread(target=self._run, args=(gather,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        """Yield the items. Raises what reading raised."""
        while True:
            try:
                item = self._items.get(timeout=0.5)
            except queue.Empty:  # an interrupt gets through
                continue
            if item is None:
                if self._error:
                    raise self._error
                return
            yield item
            del item

    def stop(self, connection: Connection) -> None:
        """End the thread and the stream. Safe to call twice."""
        self._slot.stop()
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            cancel(connection)
            sever(connection)
            self._thread.join()
        sys.setswitchinterval(self._interval)
        if not connection.closed:
            self._slot.end()

    def _run(self, gather: Callable[[Iterator[bytes | int]], Iterator[Item]]) -> None:
        try:
            for item in gather(self._slot.messages()):
                self._put(item)
                del item
        except Stopped:
            return
        except BaseException as error:  # noqa: BLE001  raised again by the reader
            self._error = error
        with contextlib.suppress(Stopped):
            self._put(None)

    def _put(self, item: Item | None) -> None:
        while True:
            try:
                self._items.put(item, timeout=0.2)
                return
            except queue.Full:
                try:
                    self._slot.tick()
                except psycopg.Error:
                    if item is not None:
                        raise
                    # All was read: that the reader hears of the end does not need the server.


def fork(connection: Connection, before: int, now: int) -> int | None:
    """Return where the timeline ``now`` has left an earlier one; None where that is none of it.

    The connection is one for replication.
    """
    if now == 1:
        return None
    result = connection.pgconn.exec_(f"TIMELINE_HISTORY {now}".encode())
    content = (result.get_value(0, 1) or b"") if result.ntuples else b""
    for line in content.decode().splitlines():
        timeline, _, rest = line.partition("\t")
        if timeline.strip() == str(before):
            return lsn_number(rest.split("\t")[0])
    return None


def lsn_number(text: str) -> int:
    """Return a WAL position as a number: ``1/2A`` is 2³² + 42."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) + int(low, 16)


def lsn_text(position: int) -> str:
    """Return a WAL position as PostgreSQL spells it."""
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"
