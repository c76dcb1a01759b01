"""PostgreSQL's text of a value to Python's value; ``exporter.values`` has the way back.

Exactly in both directions: where Python has no exact value, PostgreSQL's own text stands for it.
`infinity` of a date or timestamp compares as the type's `max`, `-infinity` as its `min`. Three
things are lost: an array's lower bound that is not 1, an interval's hours beyond 24 (they become
days, which PostgreSQL takes for equal), and the zeros at the end of a number within jsonb.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg2
from psycopg2 import extensions

from exporter.values.text import JSON_NULL, InfiniteDate, InfiniteTimestamp

BATCH = 5_000
"""Rows of one COPY or frame: some megabytes, so that a round trip does not count."""

# oid of a type, and of its array
_INTERVALS = {1186: 1187}
_JSON = {114: 199, 3802: 3807}
_RANGES = {3904: 3905, 3906: 3907, 3908: 3909, 3910: 3911, 3912: 3913, 3926: 3927}
_BYTEA = {17: 1001}
_UUID = {2950: 2951}


def quoted(name: str) -> str:
    """Return a name as an identifier of SQL."""
    return '"' + name.replace('"', '""') + '"'


def register(cursor: Any) -> None:
    """Make psycopg2 decode this cursor's columns exactly; other cursors are as they were."""
    for oids, caster in (
        ({1082: 1182}, _or_text(1082, extensions.PYDATE)),
        ({1114: 1115}, _or_text(1114, extensions.PYDATETIME)),
        ({1184: 1185}, _or_text(1184, extensions.PYDATETIMETZ)),
        ({1083: 1183, 1266: 1270}, _or_text(1083, extensions.PYTIME)),
        (_INTERVALS, _interval),
        (_JSON, _from_json),
        (_RANGES, lambda text, cursor: text),
        (_BYTEA, _bytes),
        (_UUID, lambda text, cursor: text and UUID(text)),
    ):
        scalar = extensions.new_type(tuple(oids), "exact", caster)
        array = extensions.new_array_type(tuple(oids.values()), "exact[]", scalar)
        extensions.register_type(scalar, cursor)
        extensions.register_type(array, cursor)


def _timestamp_at(limit: datetime, zone: timezone | None) -> InfiniteTimestamp:
    return InfiniteTimestamp.combine(limit.date(), limit.time(), zone)


# by the type's oid
_INFINITE: dict[tuple[int, str], date] = {
    (1082, "infinity"): InfiniteDate.fromordinal(date.max.toordinal()),
    (1082, "-infinity"): InfiniteDate.fromordinal(date.min.toordinal()),
    (1114, "infinity"): _timestamp_at(datetime.max, None),
    (1114, "-infinity"): _timestamp_at(datetime.min, None),
    (1184, "infinity"): _timestamp_at(datetime.max, timezone.utc),
    (1184, "-infinity"): _timestamp_at(datetime.min, timezone.utc),
}


def _or_text(oid: int, native: Any) -> Callable[[str | None, Any], Any]:
    def cast(text: str | None, cursor: Any) -> Any:
        if text is None:
            return None
        if text[-1] == "y":
            return _INFINITE[oid, text]
        if text[:3] == "24:":  # 24:00:00, which Python would call midnight before
            return text
        try:
            return native(text, cursor)
        except (ValueError, OverflowError, psycopg2.Error):
            return text

    return cast


def _interval(text: str | None, cursor: Any) -> Any:
    if text is None or "mon" in text or "year" in text or "infinity" in text:
        return text  # a month has no length of its own
    return extensions.PYINTERVAL(text, cursor)


def _bytes(text: str | None, cursor: Any) -> bytes | None:
    return None if text is None else bytes.fromhex(text[2:])


def _float(text: str) -> float | Decimal:
    number = float(text)
    # jsonb holds any number: one that a float would change stays a Decimal
    short = len(text) < 16 and "e" not in text.lower()
    return number if short or Decimal(repr(number)) == Decimal(text) else Decimal(text)


_DECODER = json.JSONDecoder(parse_float=_float)


def _from_json(text: str | None, cursor: Any) -> Any:
    if text is None:
        return None
    value, _ = _DECODER.raw_decode(text.lstrip())
    return JSON_NULL if value is None else value
