"""Which of the staged rows it is that the destination refuses, in words for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import psycopg
from psycopg import sql

from exporter.source.pgoutput import parts_of
from exporter.wire import Connection


def told(error: psycopg.Error) -> str:
    """Return PostgreSQL's message without the value, or the character, that it quotes."""
    message = error.diag.message_primary or "refused"
    if isinstance(error, psycopg.errors.UntranslatableCharacter):
        return re.sub("^.* has no equivalent", "a character of it has no equivalent", message)
    if isinstance(error, psycopg.IntegrityError):  # it quotes names alone
        return message
    before, _, _ = message.partition(': "')  # a value may have quotes of its own
    return re.sub(r' "[^"]*"$', "", before)


def copied_to(error: psycopg.Error) -> tuple[int, str | None]:
    """Return the row, from 1 on, and the column that COPY has come to, as PostgreSQL tells it."""
    found = re.search(r"line (\d+)(?:, column ([^:\n]+))?", error.diag.context or "")
    return (int(found[1]), found[2]) if found else (0, None)


def uncopied(
    error: psycopg.Error, staged: Iterable[bytes], keys: Mapping[str, int]
) -> tuple[str, int | None]:
    """Return the key of the staged row that COPY has refused, and the place of the column.

    ``staged`` are rows of texts in COPY's binary format, ``keys`` the places of the key in them.
    """
    line, column = copied_to(error)
    row = next(islice(staged, line - 1, None), None) if line else None
    if row is None:
        return "?", None
    fields = [one[4:].decode(errors="replace") for one in parts_of(row)]
    key = ", ".join(f"{name}={fields[at]}" for name, at in keys.items())
    place = (column or "").removeprefix("_")  # a column of raw's is staged by its place
    return key, int(place) if place.isdigit() else None


def key_text(columns: Mapping[str, sql.Identifier]) -> sql.Composable:
    """Return what names a staged row ``s``, ``id=7, at=8``, from name → staged column."""
    parts = [
        sql.SQL("{} || '=' || s.{}::text").format(sql.Literal(name), column)
        for name, column in columns.items()
    ]
    return sql.SQL("concat_ws(', ', {})").format(sql.SQL(", ").join(parts))


def find_refused(
    destination: Connection,
    staging: sql.Identifier,
    key: sql.Composable,
    apply: Callable[[], object],
) -> str:
    """Return the ``key`` of the first row that ``apply`` fails with, by halving what is staged.

    The message does not name it by its key. The rows lie in the order of COPY. Must be called in a
    transaction that has been rolled back to where they were staged.
    """
    count = destination.execute(sql.SQL("select count(*) from {}").format(staging)).fetchone()
    low, high = 0, count[0] - 1 if count else 0
    while low < high:
        middle = (low + high) // 2
        if _fails(destination, staging, low, middle, apply):
            high = middle
        else:
            low = middle + 1
    row = destination.execute(
        sql.SQL("select {} from {} s order by ctid offset {} limit 1").format(key, staging, low)
    ).fetchone()
    return str(row[0]) if row else "?"


def _fails(
    destination: Connection,
    staging: sql.Identifier,
    first: int,
    last: int,
    apply: Callable[[], object],
) -> bool:
    """Whether some of the staged rows are refused alone."""
    place = sql.SQL("(select ctid from {} order by ctid offset %s limit 1)").format(staging)
    others = sql.SQL("delete from {0} where ctid < {1} or ctid > {1}").format(staging, place)
    try:
        with destination.transaction(force_rollback=True):
            destination.execute(others, (first, last))
            apply()
    except psycopg.Error:
        return True
    return False
