"""A cursor's values in Python: what is greater, how far back is looked, and PostgreSQL's text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta, timezone
from typing import Any

_UTC = timezone.utc
_ZONES = timedelta(hours=12)  # clocks west of UTC run behind it by no more
# Python itself reads all of it from 3.11 on.
_ISO = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?"
    r" ?(?:([Zz])|([+-])(\d\d):?(\d\d)?)?)?"
)


class Scale:
    """The values of a cursor of one type: times with or without a zone, days, or integers."""

    def __init__(self, kind: str) -> None:
        if kind == "date":
            self._kind: type = date
        else:
            self._kind = datetime if kind.startswith("timestamp") else int
        self._zoned = kind.endswith("with time zone") or kind.startswith("timestamptz")

    def of(self, values: Sequence[Any]) -> list[Any]:
        """Return values as they compare. Raises ValueError for what is none of this type."""
        kinds = set(map(type, values))
        if kinds == {self._kind} and (self._kind is not datetime or self._are_utc(values)):
            return list(values)
        return [self.one(value) for value in values]

    def _are_utc(self, values: Sequence[datetime]) -> bool:
        return self._zoned and {value.tzinfo for value in values} == {_UTC}

    def one(self, value: Any) -> Any:
        """Return a value, or its text, as it compares. Raises ValueError."""
        if self._kind is int:
            if isinstance(value, (int, str)) and not isinstance(value, bool):
                return int(value)
            raise ValueError("no whole number")
        if isinstance(value, str):
            value = _read(value)
        elif not isinstance(value, date):
            raise ValueError("no time")
        if self._kind is date:
            return value.date() if isinstance(value, datetime) else value
        if not isinstance(value, datetime):
            value = datetime.combine(value, time())
        if self._zoned:
            return value.replace(tzinfo=_UTC) if value.tzinfo is None else value.astimezone(_UTC)
        if value.tzinfo is not None:
            raise ValueError("a time with a zone, and the column has none: data_type: timestamptz")
        return value

    def back(self, value: Any, lookback: timedelta | int | None) -> Any:
        """Return the value from which is read again; the lookback's default is that of tables."""
        if self._kind is int:
            return value - (lookback if isinstance(lookback, int) else 0)
        length = lookback if isinstance(lookback, timedelta) else timedelta(minutes=5)
        try:
            if self._kind is date:
                return (datetime.combine(value, time()) - length).date()
            return value - length
        except OverflowError:
            return value

    def bounded(self, value: Any, clock: datetime) -> Any:
        """Return a value, or an earlier one that no clock has passed.

        From a row that is dated ahead nothing would be found. A time without a zone may be of any.
        """
        if self._kind is int:
            return value
        if self._kind is date:
            return min(value, (clock - _ZONES).date())
        return min(value, clock if self._zoned else (clock - _ZONES).replace(tzinfo=None))

    def text(self, value: Any) -> str:
        """Return PostgreSQL's text of a value."""
        if self._kind is datetime:
            return str(value.isoformat(" ")).replace("+00:00", "+00")
        return str(value)


def _read(value: str) -> date:
    """Return the time or the day that a text in ISO 8601 gives. Raises ValueError."""
    found = _ISO.fullmatch(value.strip())
    if found is None:
        raise ValueError("no time in ISO 8601")
    year, month, day, hour, minute, second, fraction, zulu, sign, hours, minutes = found.groups()
    if hour is None:
        return date(int(year), int(month), int(day))
    micros = int(((fraction or "") + "000000")[:6])
    zone = _UTC if zulu else None
    if sign:
        offset = timedelta(hours=int(hours), minutes=int(minutes or 0))
        zone = timezone(-offset if sign == "-" else offset)
    return datetime(
        int(year), int(month), int(day), int(hour), int(minute), int(second or 0), micros, zone
    )
