"""numpy's scalars and arrays as Python's values. numpy itself is not imported."""

from __future__ import annotations

import re
from typing import Any

_FINE = re.compile(r"\[\d*(ns|ps|fs|as)\]")


class UnfitError(Exception):
    """A value that a column cannot hold; str() names its kind, never the value."""


def of_numpy(kind: type) -> bool:
    """Whether a type is one of numpy's."""
    return kind.__module__.partition(".")[0] == "numpy"


def native(value: Any) -> Any:
    """Return a value, one of numpy as Python's; None for NaT. Raises UnfitError."""
    kind = type(value)
    if not of_numpy(kind):
        return value
    if not hasattr(value, "tolist"):
        raise UnfitError(f"a {kind.__name__}")
    if value.ndim:
        return [native(item) for item in value]
    found, moment = value.tolist(), value.dtype.kind in "mM"
    if moment and type(found) is int and _FINE.search(value.dtype.str):
        rounded = value.astype(f"{value.dtype.kind}8[us]")  # as Python and PostgreSQL have it
        if rounded != value:
            raise UnfitError("nanoseconds, which PostgreSQL does not have (round them),")
        found = rounded.tolist()
    # Python has no such number; or the moment has no unit, or lies outside of Python's years
    if value.dtype.kind == "V" or of_numpy(type(found)) or (moment and type(found) is int):
        raise UnfitError(f"a {kind.__name__} that no value of Python equals,")
    return found
