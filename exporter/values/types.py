"""The PostgreSQL type of a column that only its values tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from exporter.values.natives import UnfitError
from exporter.values.text import JsonNull

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


def plain(type_name: str) -> str:
    """Return the type that values alone would give a column, where it has one of a table."""
    return {"smallint": "bigint", "integer": "bigint", "real": "double precision"}.get(
        type_name, type_name
    )


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
