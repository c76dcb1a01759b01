"""Sessions on the two databases: their settings, and their end where somebody stops the run."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus

from exporter.config.environment import url
from exporter.errors import DatabaseError
from exporter.terminal import signals

Connection = psycopg.Connection[Any]
# Where a connection is lost, psycopg would tell of the rollback that it could not send.
logging.getLogger("psycopg").addHandler(logging.NullHandler())
_CANCEL = 2.0  # seconds that a server has to take note of a cancellation
# A peer that falls silent is given up after 30 seconds, unless the URL says otherwise: Linux's own
# defaults are two hours and more.
_DEFAULTS: dict[str, str | int] = {
    "connect_timeout": 10,
    "application_name": "dbt-exporter",
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
# Set after connecting, not as start-up options, which a pooler refuses or drops.
_SETTINGS = {
    # The text of every value must mean the same on both sides, whatever the servers default to.
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "bytea_output": "hex",
    "extra_float_digits": "3",
    "lc_monetary": "C",
    "xmloption": "content",
    "xmlbinary": "base64",
    "array_nulls": "on",
    "standard_conforming_strings": "on",
    "quote_all_identifiers": "off",
    # As pg_dump has it: no function of another schema is taken for PostgreSQL's own, no row is
    # hidden without an error, and no limit of the role ends a long copy.
    "search_path": "pg_catalog",
    "row_security": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "default_transaction_isolation": "read committed",
    # Blocks are read from the first to the last; short statements are not worth compiling.
    "synchronize_seqscans": "off",
    "jit": "off",
}
_SINCE = {"idle_session_timeout": 140000, "transaction_timeout": 170000}  # server versions
# Sessions of this process, each with the pid of its server process.
_OPEN: weakref.WeakKeyDictionary[Connection, int] = weakref.WeakKeyDictionary()


def connect(variable: str) -> Connection:
    """Open an autocommit session on the database that a variable names. Raises DatabaseError."""
    parts: dict[str, Any] = {**_DEFAULTS, **conninfo_to_dict(url(variable))}
    if signals.stopping():
        parts["connect_timeout"] = 2  # the least that libpq takes: who stopped us waits
    try:
        session = psycopg.connect(
            make_conninfo("", **parts, client_encoding="UTF8"),
            autocommit=True,
            prepare_threshold=None,  # psycopg loses track of what `discard all` has ended
        )
    except psycopg.OperationalError as error:
        reason = " ".join(str(error).split())
        password = parts.get("password")
        if password:
            reason = reason.replace(str(password), "***")
        raise DatabaseError(
            f"{variable}: {reason}", hint="is the server up, and the URL right?"
        ) from None
    try:
        pid = settle(session, variable)
        if pid != session.info.backend_pid:
            _refuse_transaction_pooling(session, variable, pid)
    except BaseException:
        session.close()
        raise
    return session


def settle(session: Connection, variable: str) -> int:
    """Give a session our settings, and read them back; return its server process's pid.

    Raises DatabaseError where one did not take effect.
    """
    version = session.info.server_version
    wanted = {**_SETTINGS, **{name: "0" for name, since in _SINCE.items() if version >= since}}
    settings = ", ".join(
        f"pg_catalog.set_config('{name}', '{value}', false)" for name, value in wanted.items()
    )
    read = ", ".join(f"pg_catalog.current_setting('{name}')" for name in wanted)
    cursor = session.execute(f"select {settings}; select pg_catalog.pg_backend_pid(), {read}")
    cursor.nextset()
    row = cursor.fetchone()
    assert row is not None
    pid, *found = row
    for (name, value), now in zip(wanted.items(), found, strict=True):
        if now != value:
            raise DatabaseError(
                f"{variable}: the setting {name} is {now}, and could not be set to {value}",
                hint="something between us and the server, or a setting of the role, forbids it",
            )
    _OPEN[session] = pid
    return int(pid)


def find_operators(session: Connection, types: Iterable[str]) -> None:
    """Let the operators of these types be found, until the settings are set again.

    Those of an extension's type are in its schema, by which PostgreSQL then names the type.
    """
    schemas = {schema for schema, dot, _ in (one.rpartition(".") for one in types) if dot}
    if schemas:
        path = ", ".join(["pg_catalog", *sorted(schemas)])
        session.execute("select set_config('search_path', %s, false)", (path,))


def own_pids() -> list[int]:
    """Return the pids of the server processes that serve this process."""
    return list(_OPEN.values())


def _refuse_transaction_pooling(session: Connection, variable: str, pid: int) -> None:
    """Raise DatabaseError where a pooler gives the server process away between transactions.

    The pid that the pooler told us is not the server's. A second session then gets the process
    that the first one had, or the first one another: with a process each, neither can happen.
    """
    try:
        other = psycopg.connect(
            make_conninfo(url(variable), connect_timeout=2, client_encoding="UTF8"), autocommit=True
        )
    except psycopg.OperationalError:
        return  # all its processes are taken: the first session keeps one
    with contextlib.closing(other):
        try:
            with other.transaction():
                theirs = other.execute("select pg_catalog.pg_backend_pid()").fetchone()
                ours = session.execute("select pg_catalog.pg_backend_pid()").fetchone()
            shared = theirs == (pid,) or ours != (pid,)
        except psycopg.Error:  # "transaction blocks not allowed": it gives away more than that
            shared = True
    if shared:
        raise DatabaseError(
            f"{variable} leads through a pooler that gives a session another server process for"
            " each transaction (PgBouncer: pool_mode = transaction or statement)",
            hint="locks and snapshots need one: name the server itself, or a pool in session mode",
        )


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
        variables = ("DATABASE_URL_ANALYTICS", "DATABASE_URL_CORE")
        try:
            for session, variable in zip(self._kept, variables, strict=False):
                settle(session, variable)  # a server or a firewall may have ended an idle one
        except psycopg.Error:
            self._close()
        try:
            if not self._kept:
                self._kept += (connect(variable) for variable in variables)
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


def sever(connection: Connection) -> None:
    """End a session's traffic on the spot: whoever waits for its server gets an error."""
    with (
        contextlib.suppress(OSError, psycopg.Error),
        socket.socket(fileno=os.dup(connection.pgconn.socket)) as ours,
    ):
        ours.shutdown(socket.SHUT_RDWR)


def sever_all() -> None:
    """Do so with every session of this process: it is to end, whatever the servers do."""
    for connection in list(_OPEN):
        sever(connection)
