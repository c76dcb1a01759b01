"""A network between us and a server that breaks: at a byte it resets, or says no more."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: what is not sent is thrown away, and a reset sent


class Proxy:
    """Passes bytes between a port and a server's Unix socket.

    ``budget`` is asked for the number of bytes, of either direction and of all connections, after
    which something happens: ``reset`` ends the connections that there are, and the next budget
    begins; otherwise nothing is passed any more. None: nothing happens.
    """

    def __init__(self, url: str, budget: Callable[[], int | None], *, reset: bool) -> None:
        self._name = urlsplit(url).path[1:]
        self._target = f"{parse_qs(urlsplit(url).query)['host'][0]}/.s.PGSQL.5432"
        self._budget = budget
        self._reset = reset
        self._left = budget()
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._closed = threading.Event()
        self.silent = threading.Event()
        self.resets = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The address to connect with."""
        port = self._listening.getsockname()[1]
        return f"postgresql://postgres@127.0.0.1:{port}/{self._name}?sslmode=disable"

    def close(self) -> None:
        """End all connections, as a server's own keepalives would find a lost peer."""
        self._closed.set()
        self._listening.close()
        with self._lock:
            self._end_all()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                with self._lock:
                    self._pairs.add((client, server))
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                allowed = self._spend(len(data))
                if self.silent.is_set():
                    other.sendall(data[:allowed])
                    self._closed.wait()
                    return
                other.sendall(data[:allowed])
                if allowed < len(data):
                    with self._lock:
                        self.resets += 1
                        self._end_all()
                        self._left = self._budget()
                    return
            other.shutdown(socket.SHUT_WR)

    def _spend(self, size: int) -> int:
        with self._lock:
            if self._left is None:
                return size
            allowed = min(size, self._left)
            self._left -= allowed
            if allowed < size and not self._reset:
                self.silent.set()
            return allowed

    def _end_all(self) -> None:
        for pair in self._pairs:
            for one in pair:
                with contextlib.suppress(OSError):
                    if one.family == socket.AF_INET:
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    one.shutdown(socket.SHUT_RDWR) if one.family == socket.AF_UNIX else None
                    one.close()
        self._pairs.clear()


def anywhere(chance: random.Random, most: int) -> int:
    """Return a byte at random: as likely within the first hundred as beyond the first million."""
    return int(most ** chance.random())
