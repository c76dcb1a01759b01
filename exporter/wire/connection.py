"""Sessions on the databases."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus

from exporter.config.environment import url
from exporter.errors import DatabaseError
from exporter.terminal import signals
from exporter.wire import pooler, settings

# Where a connection is lost, psycopg would tell of the rollback that it could not send.
logging.getLogger("psycopg").addHandler(logging.NullHandler())
# A peer that falls silent, such as a machine that is cut off, ends a session within a minute.
# Ignored on Unix sockets. TCP's own two hours, and a quarter of one while data is on its way, are
# longer than anybody waits for a load.
_KEEPALIVES = {
    "keepalives_idle": 30,  # seconds
    "keepalives_interval": 10,
    "keepalives_count": 2,
    "tcp_user_timeout": 50_000,  # milliseconds
}
_CANCEL = 5.0  # seconds


class Connection(psycopg.Connection[Any]):
    """A session that ``connect`` opened, on the database that ``variable`` names."""

    variable = ""
    options = ""  # libpq's, as the URL has them
    role_path = ""  # the search path that the role, the database or the URL give
    path = ""  # what is looked through after pg_catalog
    backend: tuple[int, str] | None = None  # the server's process, and when it began
    _widened = False

    def settle(self) -> None:
        """Make the settings that hold from now on, also where ``discard all`` has ended them.

        One round trip. Raises DatabaseError where one does not take effect, psycopg.Error.
        """
        asked = settings.wanted(self.info.server_version, self.options)
        cursor = self.execute(settings.statement(asked).encode())
        before = cursor.fetchone()
        cursor.nextset()
        row = cursor.fetchone()
        assert before is not None
        assert row is not None
        *held, pid, began = row
        wrong = settings.refused(asked, held)
        if wrong:
            raise DatabaseError(
                f"{self.variable}: a setting did not take effect: {wrong}",
                hint="name PostgreSQL's own address, or a pooler's that passes settings on",
            )
        if self.backend is None:
            self.role_path, self.backend = before[0], (pid, began)
        elif self.backend != (pid, began):
            raise _shared(self.variable, "transaction")
        self.path, self._widened = "", False

    def look_in(self, path: str) -> None:
        """Find names in ``pg_catalog``, then in this search path, "" for none.

        Holds until it is called again, or the transaction that it is called in is rolled back.
        """
        if not path and not self._widened:
            return  # what most loads need costs no round trip
        self.execute(
            "select pg_catalog.set_config('search_path', %s, false)",
            (f"pg_catalog, {path}" if path else "pg_catalog",),
        )
        # Stays so when the path is narrow again: a rollback would widen it.
        self.path, self._widened = path, True

    def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Cancel what the session does; once all has to stop, in the time that is left."""
        super().cancel_safe(timeout=signals.within(timeout))


_lock = threading.Lock()
_open: weakref.WeakSet[Connection] = weakref.WeakSet()
_connecting: list[str] = []
_direct: set[str] = set()  # URLs that lead to a server, or to a pool in session mode
_looking = threading.Lock()  # one session at a time looks where its URL leads


def connect(variable: str) -> Connection:
    """Open an autocommit session on the database that a variable names. Raises DatabaseError."""
    address = url(variable)
    parts: dict[str, Any] = conninfo_to_dict(address)
    parts["client_encoding"] = "UTF8"
    parts.setdefault("application_name", "dbt-exporter")
    parts.setdefault("connect_timeout", 10)
    if signals.stopping():  # only the record of the failure is left to be written
        parts["connect_timeout"] = 2
    if str(parts.get("keepalives", "1")) != "0":
        parts = _KEEPALIVES | parts
    secrets = [str(parts[name]) for name in ("password", "sslpassword") if parts.get(name)]
    _connecting.append(variable)
    try:
        connection = _open_session(variable, parts)
        with _looking if address not in _direct else contextlib.nullcontext():
            if address not in _direct:
                _refuse_shared(connection, parts)
                _direct.add(address)
    except psycopg.Error as error:
        reason = " ".join(str(error).split())
        for secret in secrets:
            reason = reason.replace(secret, "***")
        raise DatabaseError(f"{variable}: {reason}", hint=_advice(reason)) from None
    finally:
        _connecting.remove(variable)
    return connection


def _dial(parts: dict[str, Any]) -> Connection:
    return Connection.connect(
        make_conninfo("", **parts),
        autocommit=True,
        prepare_threshold=None,  # psycopg loses track of what `discard all` has ended
    )


def _open_session(variable: str, parts: dict[str, Any]) -> Connection:
    connection = _dial(parts)
    connection.variable = variable
    connection.options = str(parts.get("options") or os.environ.get("PGOPTIONS", ""))
    with _lock:
        _open.add(connection)
    try:
        connection.settle()
    except BaseException:
        connection.close()
        raise
    return connection


def _refuse_shared(connection: Connection, parts: dict[str, Any]) -> None:
    """Refuse a pooler that lends a server process for a transaction. Raises DatabaseError."""
    assert connection.backend is not None
    if not pooler.is_between(connection, connection.backend[0]):
        return
    try:
        try:
            second = _dial(parts)
        except psycopg.OperationalError:  # the pooler takes no more clients: it cannot be told
            return
        with contextlib.closing(second):
            mode = pooler.mode(connection, second)
        if mode:
            raise _shared(connection.variable, mode)
    except BaseException:
        connection.close()
        raise


def _shared(variable: str, mode: str) -> DatabaseError:
    return DatabaseError(
        f"{variable} leads through a pooler in {mode} mode, where one session's locks, settings"
        " and snapshot are another's",
        hint="name PostgreSQL's own address, or a pool in session mode",
    )


def _advice(reason: str) -> str:
    if "startup parameter" in reason:
        return "a pooler refuses what the URL asks for at the start, such as its `options`"
    return "is the server up, and the URL right?"


def own_sessions(connection: Connection) -> tuple[list[int], list[str]]:
    """Return the processes of this program's sessions on the same database, and when they began.

    Of a server's processes, these alone are known to be ours: an ``application_name`` is anybody's.
    """
    with _lock:
        sessions = [one for one in _open if not one.closed and one.variable == connection.variable]
    found = [one.backend for one in sessions if one.backend is not None]
    return [pid for pid, _ in found], [began for _, began in found]


def sever(connection: Connection) -> None:
    """Shut a session's socket: whoever waits for it, in any thread, gets an OperationalError."""
    with contextlib.suppress(psycopg.Error, OSError):
        one = socket.socket(fileno=connection.pgconn.socket)
        try:
            one.shutdown(socket.SHUT_RDWR)
        finally:
            one.detach()  # libpq closes it


def _sever_all() -> bool:
    with _lock:
        sessions = [one for one in _open if not one.closed]
    for one in sessions:
        sever(one)
    return bool(sessions or _connecting)


signals.at_stop(_sever_all)


class Sessions:
    """A session on each database, kept from one load to the next. For one thread.

    To connect anew costs a server more than a small load does: a process, its catalogs to be read.
    """

    def __init__(self) -> None:
        self._kept: list[Connection] = []

    def __enter__(self) -> Sessions:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @contextlib.contextmanager
    def pair(self) -> Iterator[tuple[Connection, Connection]]:
        """Give the destination's session and the source's, as good as new. Raises DatabaseError.

        Where an error is raised they are closed: nobody knows what state they are in.
        """
        try:
            try:
                for session in self._kept:
                    session.settle()  # a server or a firewall may have ended an idle one
            except psycopg.Error:
                self._close()
            if not self._kept:
                self._kept.append(connect("DATABASE_URL_ANALYTICS"))
                self._kept.append(connect("DATABASE_URL_CORE"))
            destination, source = self._kept
            yield destination, source
        except BaseException:
            self._close()
            raise
        try:
            destination.execute("discard all")  # the load's lock, its staging
        except psycopg.Error:  # the load is done; the next one connects anew
            self._close()

    def _close(self) -> None:
        while self._kept:
            self._kept.pop().close()


@contextlib.contextmanager
def stopped_in_order(*connections: Connection) -> Iterator[None]:
    """Cancel what these sessions are doing where an interrupt ends it, and raise the interrupt."""
    try:
        yield
    except BaseException as error:
        stop = signals.behind(error)
        if stop is None:
            raise
        for connection in connections:
            cancel(connection)
        raise stop from None


def cancel(connection: Connection) -> None:
    """Stop what a session is doing, whatever it is, after a Ctrl-C. Its transaction is over."""
    if connection.pgconn.transaction_status == TransactionStatus.ACTIVE:
        with contextlib.suppress(psycopg.Error):
            connection.cancel_safe(timeout=_CANCEL)
