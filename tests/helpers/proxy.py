"""A network between us and a server that breaks: at a byte it resets, or says no more."""

from __future__ import annotations

import contextlib
import ctypes
import random
import socket
import struct
import threading
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

# To connect with nobody resets a connection at once, also where other threads are at work on it.
_libc = ctypes.CDLL(None)
_NOBODY = struct.pack("=H14x", socket.AF_UNSPEC)


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
        self._ended: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self.silent = threading.Event()
        self.resets = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._begin(self._accept)

    @property
    def url(self) -> str:
        """The address to connect with."""
        port = self._listening.getsockname()[1]
        return f"postgresql://postgres@127.0.0.1:{port}/{self._name}?sslmode=disable"

    def close(self) -> None:
        """End all connections, as a server's own keepalives would find a lost peer."""
        self._closed.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._end_all()
        for thread in self._threads:
            thread.join()
        for one in (self._listening, *self._ended):
            one.close()

    def _begin(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                with self._lock:
                    self._pairs.add((client, server))
                for one, other in ((client, server), (server, client)):
                    self._begin(self._pass, one, other)

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
                        _libc.connect(one.fileno(), _NOBODY, len(_NOBODY))
                    one.shutdown(socket.SHUT_RDWR)
            self._ended += pair
        self._pairs.clear()


def anywhere(chance: random.Random, most: int) -> int:
    """Return a byte at random: as likely within the first hundred as beyond the first million."""
    return int(most ** chance.random())
