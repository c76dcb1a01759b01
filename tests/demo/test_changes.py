"""`exporter demo --changes`, run in a folder that has nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_it_shows_that_raw_is_the_source(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "exporter", "demo", "--changes", "--rows", "3000"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        "account 1,000 rows at the source, 1,000 in raw: the same",
        "entry 3,000 rows at the source, 3,000 in raw: the same",
        "account 990 rows at the source, 990 in raw: the same",
        "entry 3,970 rows at the source, 3,970 in raw: the same",
    ):
        assert line in told
    assert [line for line in told if line.startswith("$")] == [
        "$ exporter load",
        "$ exporter load",
        "$ exporter slots show",
        next(line for line in told if line.startswith("$ exporter slots drop exporter_analytics_")),
    ]
    assert list(tmp_path.iterdir()) == []
