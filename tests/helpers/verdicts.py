"""What `exporter verify` says."""

from __future__ import annotations

import json
from typing import Any

from tests.conftest import Workplace


def verify(place: Workplace, *words: str, status: int = 0) -> dict[str, Any]:
    """What `exporter verify --json` says; it must end with that status."""
    done = place.run("exporter", "verify", "--json", *words)
    assert done.returncode == status, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def named(verdict: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Kind, key and columns of the rows that a verdict names."""
    return [
        (one["kind"], ",".join(str(value) for value in one["key"].values()), one["columns"])
        for one in verdict["rows"]
    ]
