"""Sessions on the two databases: their settings, and their end where somebody stops the run."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import weakref
from collections.abc import Iterable, Iterator
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
_CANCEL = 2.0  # seconds that a server has to take note of a cancellation
# A peer that falls silent is given up within a minute, unless the URL says otherwise: Linux's own
# defaults are two hours and more. The last bounds what waits to be sent, also to a server that is
# alive but reads nothing for so long.
_DEFAULTS: dict[str, str | int] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 55_000,
}


class Connection(psycopg.Connection[Any]):
    """A session that ``connect`` opened, on the database that ``variable`` names."""

    variable = ""
    options = ""  # libpq's start-up options, as the URL has them
    role_path = ""  # the search path that the role, the database or the URL gives
    backend: tuple[int, str] | None = None  # the server's process, and when it began
    path = ""  # where names are found after pg_catalog
    _widened = False

    def settle(self) -> None:
        """Make our settings, also where ``discard all`` has ended them. One round trip.

        Raises DatabaseError where one did not take effect, psycopg.Error.
        """
        wanted = settings.wanted(self.info.server_version, self.options)
        cursor = self.execute(settings.statement(wanted).encode())
        before = cursor.fetchone()
        cursor.nextset()
        row = cursor.fetchone()
        assert before is not None
        assert row is not None
        *held, pid, began = row
        wrong = settings.refused(wanted, held)
        if wrong:
            raise DatabaseError(
                f"{self.variable}: the setting {wrong}",
                hint="something between us and the server, or a setting of the role, forbids it",
            )
        if self.backend is None:
            self.role_path, self.backend = before[0], (pid, began)
        elif self.backend != (pid, began):
            raise _refusal(self.variable)
        self.path, self._widened = "", False

    def look_in(self, path: str) -> None:
        """Find names in ``pg_catalog`` first, then in this search path; "" for nowhere else.

        Until it is called again, or the settings are made again.
        """
        if path or self._widened:  # what most loads need costs no round trip
            whole = f"pg_catalog, {path}" if path else "pg_catalog"
            self.execute("select pg_catalog.set_config('search_path', %s, false)", (whole,))
            self._widened = True  # also when narrow again: a rollback would widen it
        self.path = path


_lock = threading.Lock()  # threads open sessions while others ask which there are
_open: weakref.WeakSet[Connection] = weakref.WeakSet()
_direct: set[str] = set()  # URLs that lead to a server, or to a pool in session mode
_looking = threading.Lock()  # one session at a time looks where its URL leads


def connect(variable: str, name: str = "dbt-exporter", *, replication: bool = False) -> Connection:
    """Open an autocommit session on the database that a variable names. Raises DatabaseError.

    ``name`` is what others see of it, unless the URL says otherwise. A session for ``replication``
    reads a slot; it takes statements, too, but without parameters.
    """
    address = url(variable)
    parts: dict[str, Any] = {
        **_DEFAULTS,
        "application_name": name,
        **conninfo_to_dict(address),
        "client_encoding": "UTF8",
        **({"replication": "database"} if replication else {}),
    }
    if signals.stopping():
        parts["connect_timeout"] = 2  # the least that libpq takes: who stopped us waits
    try:
        session = _dial(parts)
        try:
            session.variable = variable
            session.options = str(parts.get("options") or os.environ.get("PGOPTIONS", ""))
            with _lock:
                _open.add(session)
            session.settle()
            with contextlib.nullcontext() if address in _direct else _looking:
                if address not in _direct:
                    _refuse_shared_processes(session, parts)
                    _direct.add(address)
        except BaseException:
            session.close()
            raise
    except psycopg.Error as error:
        reason = " ".join(str(error).split())
        for secret in ("password", "sslpassword"):
            if parts.get(secret):
                reason = reason.replace(str(parts[secret]), "***")
        hint = "is the server up, and the URL right?"
        if "startup parameter" in reason:
            hint = "a pooler refuses what the URL asks for at the start, such as its options"
            if replication:
                hint = "a pooler does not lead to a slot: name the server itself"
        elif "max_wal_senders" in reason:
            hint = "raise max_wal_senders, or end a receiver: select * from pg_stat_replication"
        raise DatabaseError(f"{variable}: {reason}", hint=hint) from None
    return session


def _dial(parts: dict[str, Any]) -> Connection:
    return Connection.connect(
        make_conninfo("", **parts),
        autocommit=True,
        prepare_threshold=None,  # psycopg loses track of what `discard all` has ended
    )


def _refuse_shared_processes(session: Connection, parts: dict[str, Any]) -> None:
    """Raise DatabaseError where a pooler gives the server process away between transactions."""
    assert session.backend is not None
    if not pooler.is_between(session, session.backend[0]):
        return
    try:
        other = _dial({**parts, "connect_timeout": 2})
    except psycopg.OperationalError:
        return  # it takes no more clients: the first session keeps its process
    with contextlib.closing(other):
        if pooler.gives_away(session, other):
            raise _refusal(session.variable)


def _refusal(variable: str) -> DatabaseError:
    return DatabaseError(
        f"{variable} leads through a pooler that gives a session another server process for"
        " each transaction (PgBouncer: pool_mode = transaction or statement)",
        hint="locks and snapshots need one: name the server itself, or a pool in session mode",
    )


def find_operators(session: Connection, types: Iterable[str]) -> None:
    """Let the operators of these types be found, until the settings are set again.

    Those of an extension's type are in its schema, by which PostgreSQL then names the type.
    """
    schemas = {schema for schema, dot, _ in (one.rpartition(".") for one in types) if dot}
    if schemas:
        session.look_in(", ".join(filter(None, [session.path, *sorted(schemas)])))


def own_sessions(connection: Connection) -> tuple[list[int], list[str]]:
    """Return the processes of our sessions on the database of this one, and when they began.

    These alone are known to be ours: anybody may be called ``dbt-exporter``, and another process
    may have the number of one that has ended, or that is on another server.
    """
    with _lock:
        ours = [one for one in _open if not one.closed and one.variable == connection.variable]
    found = [one.backend for one in ours if one.backend]
    return [pid for pid, _ in found], [began for _, began in found]


class Sessions:
    """A session on each database, kept from one load to the next. For one thread.

    To connect anew costs a server more than a small load does: a process, its catalogs to be read.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.alone = alone  # no other may be opened beside them
        self._kept: list[Connection] = []

    def __enter__(self) -> Sessions:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @contextlib.contextmanager
    def pair(self, variable: str = "DATABASE_URL_CORE") -> Iterator[tuple[Connection, Connection]]:
        """Give the destination's session and the source's: see ``opened``."""
        with self.opened(variable) as (destination, source):
            assert source is not None
            yield destination, source

    @contextlib.contextmanager
    def opened(self, variable: str) -> Iterator[tuple[Connection, Connection | None]]:
        """Give the destination's session and the source's, as good as new. Raises DatabaseError.

        ``variable`` names the source; "" is one without a session. The session on another source is
        closed before, so that there are no more at once than one on each side.

        Where an error is raised they are closed: nobody knows what state they are in.
        """
        try:
            try:
                for session in self._kept:
                    session.settle()  # a server or a firewall may have ended an idle one
            except psycopg.Error:
                self._close()
            for other in self._kept[1:]:
                if variable and other.variable != variable:
                    self._kept.pop().close()
            wanted = ["DATABASE_URL_ANALYTICS", *([variable] if variable else [])]
            for name in wanted[len(self._kept) :]:
                self._kept.append(connect(name))
            destination = self._kept[0]
            yield destination, self._kept[1] if variable else None
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
def stopped_in_order(*connections: Connection | None) -> Iterator[None]:
    """Cancel what these sessions are doing where an interrupt ends it, and raise the interrupt."""
    try:
        yield
    except BaseException as error:
        stop = signals.behind(error)
        if stop is None:
            raise
        for connection in filter(None, connections):
            cancel(connection)
        raise stop from None


def cancel(connection: Connection) -> None:
    """Stop what a session is doing, whatever it is, after a Ctrl-C. Its transaction is over."""
    if connection.pgconn.transaction_status == TransactionStatus.ACTIVE:
        with contextlib.suppress(psycopg.Error):
            connection.cancel_safe(timeout=_CANCEL)


def sever(connection: Connection) -> None:
    """End a session's traffic on the spot: whoever waits for its server gets an error."""
    with (
        contextlib.suppress(OSError, psycopg.Error),
        socket.socket(fileno=os.dup(connection.pgconn.socket)) as ours,
    ):
        ours.shutdown(socket.SHUT_RDWR)


def sever_all() -> None:
    """Do so with every session of this process: it is to end, whatever the servers do."""
    with _lock:
        sessions = [one for one in _open if not one.closed]
    for session in sessions:
        sever(session)
