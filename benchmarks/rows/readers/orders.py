"""Orders as a web service would give them: dicts of eight values."""

import os
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any


def orders(since: datetime | None = None) -> Iterator[dict[str, Any]]:
    begin = datetime(2026, 1, 1, tzinfo=timezone.utc)
    for number in range(int(os.environ["BENCH_ROWS"])):
        at = begin + timedelta(seconds=number)
        if since is None or at >= since:
            yield {
                "id": number,
                "at": at,
                "customer": f"customer {number % 1000}",
                "email": f"someone.{number}@example.org",
                "amount": number / 100,
                "paid": number % 3 == 0,
                "address": {"city": "Bern", "zip": str(number % 10000), "lines": 2},
                "note": None if number % 2 else "a note of some words",
            }
