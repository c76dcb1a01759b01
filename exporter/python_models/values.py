"""PostgreSQL's text of a value to Python's value and back, exactly in both directions.

Where Python has no exact value, PostgreSQL's own text stands for it in both directions: an interval
with months, a timestamp before Christ or after the year 9999, a range, a network. `infinity` of a
date or timestamp compares as the type's `max`, `-infinity` as its `min`. Three things are lost: an
array's lower bound that is not 1, an interval's hours beyond 24 (they become days, which PostgreSQL
takes for equal), and the zeros at the end of a number within jsonb.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from operator import methodcaller
from typing import Any
from uuid import UUID

import psycopg2
from psycopg2 import extensions

from exporter.python_models.natives import UnfitError, native, of_numpy

BATCH = 5_000
"""Rows of one COPY or frame: some megabytes, so that a round trip does not count."""

# oid of a type, and of its array
_INTERVALS = {1186: 1187}
_JSON = {114: 199, 3802: 3807}
_RANGES = {3904: 3905, 3906: 3907, 3908: 3909, 3910: 3911, 3912: 3913, 3926: 3927}
_BYTEA = {17: 1001}
_UUID = {2950: 2951}


class ResultError(Exception):
    """A model's result cannot become a table; str() says why, and what to write instead."""


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


class InfiniteDate(date):
    """A date's `infinity` or `-infinity`: year 9999 or 1 to Python, and itself to PostgreSQL."""


class InfiniteTimestamp(datetime):
    """The same for a timestamp."""


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


class JsonNull:
    """JSON's own null as a column's whole value, which is not SQL's NULL."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "JSON_NULL"

    def __reduce__(self) -> str:
        return "JSON_NULL"  # unpickled on a worker, it is this very object again


JSON_NULL = JsonNull()


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


# --- Python to the text of COPY -----------------------------------------------------------------


_SPECIAL = re.compile(r"[\\\t\n\r\x00]")
_IN_ARRAY = re.compile(r'["\\\t\n\r\x00]')
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def _text(value: str) -> str:
    # a search is three times cheaper than a translation that changes nothing
    return _SPECIAL.sub(_escaped, value) if _SPECIAL.search(value) else value


def _escaped(match: re.Match[str]) -> str:
    if match[0] == "\0":
        raise UnfitError("the character NUL, which PostgreSQL does not store,")
    return _ESCAPES[match[0]]


def texts(many: Sequence[str | None]) -> Sequence[str]:
    """Return strings as COPY's text. One search covers all, as few hold anything to escape."""
    plain = ["" if value is None else value for value in many]
    if _SPECIAL.search("\x1f".join(plain)):
        return ["\\N" if value is None else _text(value) for value in many]
    return plain if None not in many else ["\\N" if value is None else value for value in many]


def _infinite_text(value: date) -> str:
    return "infinity" if value.year == date.max.year else "-infinity"


def _duration(value: timedelta) -> str:
    # Python's -1 microsecond is -1 day and 86399.999999 seconds
    sign, size = ("-", -value) if value < timedelta(0) else ("", value)
    return (
        f"{sign}{size.days} days {sign}{size.seconds} secs {sign}{size.microseconds} microseconds"
    )


def _array(value: Sequence[Any]) -> str:
    try:
        quiet = not _IN_ARRAY.search("".join(value))
    except TypeError:  # not of strings alone
        return _text(_array_literal(value))
    return '{"' + '","'.join(value) + '"}' if quiet and value else _text(_array_literal(value))


def _json_array(value: Iterable[Any]) -> str:
    return _text(_array_literal(value, json=True))


def _array_literal(value: Iterable[Any], *, json: bool = False) -> str:
    parts = []
    for item in map(native, value):
        if item is None:
            parts.append("NULL")
        elif isinstance(item, (list, tuple)) and not json:
            parts.append(_array_literal(item))
        else:
            plain = to_json(item) if json or isinstance(item, Mapping) else _plain(item)
            parts.append('"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"')
    return "{" + ",".join(parts) + "}"


def _plain(value: Any) -> str:
    """Return a value's text before COPY's escapes."""
    if isinstance(value, str):
        return value
    return (
        "\\x" + value.hex() if isinstance(value, (bytes, bytearray)) else TEXT[type(value)](value)
    )


_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_NUMBER = re.compile('"\ue000(.*?)\ue000"')


def _extra(value: Any) -> Any:
    if isinstance(value, Decimal):
        return f"\ue000{value}\ue000"  # json writes no exact number: unquoted in `to_json`
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if value is JSON_NULL:
        return None
    for kind, plain in ((Mapping, dict), ((set, frozenset), list)):
        if isinstance(value, kind):
            return plain(value)
    if of_numpy(type(value)):
        return native(value)
    raise UnfitError(f"a {type(value).__name__} within a json value")


_ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_extra
)


def to_json(value: Any) -> str:
    """Return the JSON of a value, with every digit of a Decimal. Raises UnfitError."""
    return _checked_json(_json(value))


def _json(value: Any) -> str:
    try:
        return _ENCODER.encode(value)
    except ValueError:
        raise UnfitError("NaN or an infinity, which JSON does not have,") from None


def _checked_json(text: str) -> str:
    if "\\u0000" in text and _NUL.search(text):
        raise UnfitError("the character NUL, which PostgreSQL does not store,")
    return _NUMBER.sub(r"\1", text) if "\ue000" in text else text


def json_texts(many: Sequence[Any]) -> Sequence[str | None]:
    """Return the JSON of values, not yet escaped for COPY; None stays None. Raises UnfitError."""
    found = [None if value is None else _json(value) for value in many]
    everything = "".join(text for text in found if text is not None)
    if "\\u0000" in everything or "\ue000" in everything:
        return [text and _checked_json(text) for text in found]
    return found


class _Encoders(dict[type, Callable[[Any], str]]):
    """Encoders by type; a subclass gets that of its nearest parent. Raises UnfitError."""

    def __missing__(self, kind: type) -> Callable[[Any], str]:
        for parent in kind.__mro__:
            if parent in self and parent is not object:
                self[kind] = self[parent]
                return self[kind]
        raise UnfitError(f"a {kind.__name__}")


TEXT: _Encoders = _Encoders(
    {
        type(None): lambda value: "\\N",
        bool: lambda value: "t" if value else "f",
        int: str,
        float: repr,
        Decimal: str,
        str: _text,
        Enum: lambda value: TEXT[type(value.value)](value.value),
        datetime: methodcaller("isoformat", " "),
        InfiniteTimestamp: _infinite_text,
        date: date.isoformat,
        InfiniteDate: _infinite_text,
        time: time.isoformat,
        timedelta: _duration,
        UUID: str,
        bytes: lambda value: "\\\\x" + value.hex(),
        bytearray: lambda value: "\\\\x" + value.hex(),
        memoryview: lambda value: "\\\\x" + value.hex(),
        dict: lambda value: _text(to_json(value)),
        list: _array,
        tuple: _array,
        JsonNull: lambda value: "null",
    }
)


class _JsonEncoders(_Encoders):
    def __missing__(self, kind: type) -> Callable[[Any], str]:
        self[kind] = lambda value: _text(to_json(value))
        return self[kind]


JSON = _JsonEncoders({type(None): TEXT[type(None)]})


def encoders(type_name: str) -> _Encoders:
    """Return the encoders of a column's values, by their types, for a PostgreSQL type."""
    if type_name in ("json[]", "jsonb[]"):
        return _Encoders({**TEXT, list: _json_array, tuple: _json_array})
    return JSON if type_name in ("json", "jsonb") else TEXT


# --- the type of a column that only its values tell -------------------------------------------

_TYPES: list[tuple[Any, str]] = [  # a class or several → PostgreSQL's type
    (bool, "boolean"),
    (int, "bigint"),
    (float, "double precision"),
    (Decimal, "numeric"),
    (str, "text"),
    (datetime, "timestamp"),
    (date, "date"),
    (time, "time"),
    (timedelta, "interval"),
    (UUID, "uuid"),
    ((bytes, bytearray, memoryview), "bytea"),
    ((Mapping, list, tuple), "jsonb"),
]
_WIDER = {("bigint", "numeric"), ("bigint", "double precision")}


def type_of(value: Any) -> str:
    """Return the PostgreSQL type for a value. Raises UnfitError where there is none."""
    if isinstance(value, Enum):
        return type_of(value.value)
    found = next((name for kind, name in _TYPES if isinstance(value, kind)), None)
    if found == "timestamp" and value.tzinfo is not None:
        return "timestamptz"
    if found == "bigint" and not -(2**63) <= value < 2**63:
        return "numeric"
    if found is not None:
        return found
    raise UnfitError(f"a {type(value).__name__}")


def common_type(one: str | None, other: str) -> str | None:
    """Return the type that holds the values of both; None where there is none."""
    if one is None or one == other or (one, other) in _WIDER:
        return other
    return one if (other, one) in _WIDER else None


_FAMILIES: dict[str, set[str]] = {
    "smallint": {"bigint"},
    "integer": {"bigint"},
    "bigint": {"bigint"},
    "real": {"double precision"},
    "double precision": {"double precision"},
    "numeric": {"numeric", "bigint"},
    "boolean": {"boolean"},
    "date": {"date"},
    "timestamp without time zone": {"timestamp"},
    "timestamp with time zone": {"timestamptz"},
    "time without time zone": {"time"},
    "time with time zone": {"time"},
    "interval": {"interval", "text"},
    "uuid": {"uuid", "text"},
    "bytea": {"bytea"},
}


_MOMENTS = {"date", "timestamp", "timestamptz", "time"}
_ISO = re.compile(r"\d{4,}-\d\d-\d\d|\d\d:\d\d:\d\d")


def fits(value: Any, type_name: str) -> bool:
    """Whether a value looks as if it came unchanged from a column of this type."""
    if type_name in ("json", "jsonb"):
        return isinstance(value, (Mapping, list, JsonNull))
    if type_name.endswith("[]"):
        return isinstance(value, (list, tuple))
    name = re.sub(r"\(.*?\)", "", type_name)  # `timestamp(3) without time zone`
    family = _FAMILIES.get(name, {"text"})
    if isinstance(value, str) and "text" not in family:
        # Text where Python has no value, such as a year before Christ; ISO's is unambiguous.
        return family <= _MOMENTS and _ISO.match(value) is not None
    return type_of(value) in family
