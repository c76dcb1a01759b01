"""The tutorial: each of its commands run, in order, and what it prints compared with the page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.demo.embedded import find_binaries
from tests.conftest import ROOT, Workplace

PAGE = (ROOT / "docs" / "tutorial.md").read_text()


def _masked(text: str) -> str:
    """Numbers, times and the width of columns differ from run to run."""
    return re.sub(r"\d[\d,.:+-]*( \d[\d.:+-]*)?", "#", " ".join(text.split()))


def _steps() -> Iterator[tuple[str, list[str]]]:
    """The commands of each block, and the lines that the page says they print."""
    for commands, printed in re.findall(
        r"^```sh\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", PAGE, re.S | re.M
    ):
        yield commands, printed.splitlines()


@pytest.mark.long
def test_tutorial(product: Workplace) -> None:
    if not shutil.which("psql", path=_path()):
        pytest.skip("no psql here")
    shutil.copy(ROOT / "profiles.yml.example", product.folder)
    (product.folder / "profiles.yml").unlink()
    steps = list(_steps())
    assert len(steps) == PAGE.count("```sh\n")
    script = "".join(f"echo @@@\n{commands}" for commands, _ in steps)
    environment = {**product.environment, "PATH": _path(), "NO_COLOR": "1"}
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=product.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    outputs = done.stdout.split("@@@\n")[1:]
    for (commands, printed), output in zip(steps, outputs, strict=True):
        lines = iter([_masked(line) for line in output.splitlines()])
        for line in printed:
            assert _masked(line) in lines, (commands, line, output)


def _path() -> str:
    ours = (Path(sys.executable).parent, find_binaries())
    return os.pathsep.join([*map(str, ours), os.environ["PATH"]])
