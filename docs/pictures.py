"""Redraws docs/images/ from real output: `.venv/bin/python -m docs.pictures`.

Needs Chromium with its chromedriver. Figures and times in the pictures change with every run.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from docs.serve import ROOT, filled, run
from exporter.demo import demo
from tests.helpers.browser import browser, served

IMAGES = ROOT / "docs" / "images"


def main() -> None:
    """Make every picture."""
    IMAGES.mkdir(exist_ok=True)
    terminal("demo", "make demo")
    with filled():
        run("dbt", "docs", "generate", "--quiet")
        run("exporter", "docs")
        lineage(Path(os.environ["DBT_TARGET_PATH"]))
        core = os.environ["DATABASE_URL_CORE"]
        demo.fill(core, 1001, 12_000)
        run("exporter", "load", "-q")
        demo.fill(core, 12_001, 12_040)
        terminal("status", "exporter status", "exporter status StatEvent")


def lineage(target: Path) -> None:
    """Take a screenshot of the lineage in dbt docs, without its tests."""
    page = "#!/overview?g_v=1&g_i=%2Bexposure:*"
    with browser() as chrome, served(target) as address:
        chrome.set_window_size(1200, 520)
        chrome.get(f"{address}/{page}")
        time.sleep(3)  # it is drawn with an animation
        chrome.find_element("id", "cy").screenshot(str(IMAGES / "lineage.png"))


def terminal(name: str, *commands: str) -> None:
    """Draw the output of commands as on a terminal of 80 columns."""
    environment = {**os.environ, "COLUMNS": "80", "PYTHONUNBUFFERED": "1"}
    console = Console(record=True, width=80, file=io.StringIO())
    for command in commands:
        done = subprocess.run(
            command.split(), cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        console.print(Text.from_ansi(f"$ {command}\n{done.stdout.strip()}\n"))
    drawing = console.export_svg(title=commands[0])
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.S)  # fetched from elsewhere
    (IMAGES / f"{name}.svg").write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
