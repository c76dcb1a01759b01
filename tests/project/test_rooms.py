"""The contract of the rooms: a room imports only from those below it, and there is no circle."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def _contracts(folder: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command as main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_room_imports_upwards(tmp_path: Path) -> None:
    done = _contracts(ROOT)
    assert done.returncode == 0, done.stdout
    shutil.copytree(ROOT / "exporter", tmp_path / "exporter")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "exporter" / "wire" / "copy.py").open("a") as file:
        file.write("\nfrom exporter.source.catalog import Table as Table\n")
    done = _contracts(tmp_path)
    assert done.returncode == 1
    assert "exporter.wire is not allowed to import exporter.source" in done.stdout
