"""Sessions on the two databases."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
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
# The text form of every value must mean the same on both sides, whatever the servers default to.
_SETTINGS = (
    "-c datestyle=ISO -c intervalstyle=postgres -c timezone=UTC -c bytea_output=hex "
    "-c extra_float_digits=3 -c lc_monetary=C -c xmloption=content -c array_nulls=on "
    "-c quote_all_identifiers=off -c synchronize_seqscans=off -c jit=off"
)


def connect(variable: str) -> Connection:
    """Open an autocommit session on the database that a variable names. Raises DatabaseError."""
    parts = conninfo_to_dict(url(variable))
    parts["options"] = f"{parts.get('options') or ''} {_SETTINGS}".strip()
    parts.setdefault("connect_timeout", 10)
    parts.setdefault("application_name", "dbt-exporter")
    try:
        return psycopg.connect(
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
            for session in self._kept:
                session.execute("")  # a server or a firewall may have ended an idle one
        except psycopg.Error:
            self._close()
        try:
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
            connection.cancel_safe(timeout=5)
