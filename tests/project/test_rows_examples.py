"""The examples of docs/rows.md, against a web service that is really asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT, Workplace
from tests.helpers.tracker import TOKEN, Tracker, running_tracker

READERS = ROOT / "docs" / "readers"
BENCH = ROOT / ".bench" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"


@pytest.fixture
def tracker(place: Workplace) -> Iterator[Tracker]:
    shutil.copytree(READERS, place.folder / "readers", ignore=shutil.ignore_patterns("*.yml"))
    shutil.copy(READERS / "sources.yml", place.folder / "models")
    with running_tracker() as tracker:
        tracker.issues = [_issue(number) for number in range(250)]
        yield tracker


def _issue(number: int, title: str = "") -> dict[str, object]:
    return {
        "id": number,
        "changed_at": f"2026-01-02T{number // 60:02}:{number % 60:02}:00Z",
        "title": title or f"issue {number}",
        "labels": ["bug"] if number % 2 else [],
        "author": {"id": number % 7, "login": f"author {number % 7}"},
    }


def _titles(place: Workplace) -> list[tuple[object, ...]]:
    return place.query(place.analytics, "select id, title from analytics_raw.issue order by id")


def test_a_paged_web_service(place: Workplace, tracker: Tracker) -> None:
    known = {"TRACKER_URL": tracker.address, "TRACKER_TOKEN": TOKEN}
    assert place.load(**known)["rows_read"] == 250
    assert (tracker.asked, tracker.down) == (["", "", ""], 0)
    assert _titles(place) == [(number, f"issue {number}") for number in range(250)]
    assert place.types("analytics_raw.issue") == {
        "id": "bigint",
        "changed_at": "timestamp with time zone",
        "title": "text",
        "labels": "jsonb",
        "author": "text",
        "author_id": "bigint",
        "_exported_at": "timestamp with time zone",
    }
    tracker.issues += [_issue(245, "late, within the lookback"), _issue(250)]
    del tracker.issues[245]
    second = place.load(**known)
    assert (second["rows_read"], second["rows_written"]) == (12, 2)
    assert tracker.asked[3:] == ["2026-01-02T03:59:00+00:00"]
    assert _titles(place)[245:] == [
        (245, "late, within the lookback"),
        *((number, f"issue {number}") for number in range(246, 251)),
    ]


def test_a_wrong_token_is_told_and_not_shown(place: Workplace, tracker: Tracker) -> None:
    known = {"TRACKER_URL": tracker.address, "TRACKER_TOKEN": "wrong-token"}
    done = place.run("exporter", "load", **known)
    assert done.returncode == 1
    line = [n for n, text in enumerate((READERS / "issues.py").read_text().splitlines(), 1)
            if "raise_for_status" in text]  # fmt: skip
    assert f"after 0 rows: readers/issues.py:{line[0]}: HTTPError: 401" in done.stderr
    assert "wrong-token" not in done.stderr


def test_a_resource_of_dlt(place: Workplace, tracker: Tracker) -> None:
    """dlt is in the benchmark's environment: its packages are beside ours here."""
    if not (BENCH / "dlt").is_dir():
        pytest.skip("no dlt: make .bench/.done")
    file = place.folder / "models" / "sources.yml"
    file.write_text(file.read_text().replace("readers.issues:", "readers.issues_by_dlt:"))
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "exporter", "load", "--json"],
            cwd=place.folder,
            env={
                **place.environment,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(BENCH)]),
                "HOME": str(place.folder),
                "RUNTIME__DLTHUB_TELEMETRY": "false",
                "TRACKER_URL": tracker.address,
                "TRACKER_TOKEN": TOKEN,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert _titles(place) == [(number, f"issue {number}") for number in range(250)]
    assert '"rows_read": 11' in done.stdout
    assert tracker.asked[-1] == "2026-01-02T03:59:00+00:00"
