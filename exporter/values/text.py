"""Python's values as COPY's text, exactly.

Where Python has no exact value, PostgreSQL's own text stands for it: an interval with months, a
timestamp before Christ or after the year 9999, a range, a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from operator import methodcaller
from typing import Any
from uuid import UUID

from exporter.values.natives import UnfitError, native, of_numpy


class InfiniteDate(date):
    """A date's `infinity` or `-infinity`: year 9999 or 1 to Python, and itself to PostgreSQL."""


class InfiniteTimestamp(datetime):
    """The same for a timestamp."""


class JsonNull:
    """JSON's own null as a column's whole value, which is not SQL's NULL."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "JSON_NULL"

    def __reduce__(self) -> str:
        return "JSON_NULL"  # unpickled on a worker, it is this very object again


JSON_NULL = JsonNull()


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
