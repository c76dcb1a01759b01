"""`make docs`: serves dbt docs of this project, with core's tables in the lineage.

It uses the databases that the environment or `.env` names, else an embedded server with the demo's
rows. Arguments such as ``--port 9000`` go to `dbt docs serve`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from exporter.config import environment
from exporter.demo import demo

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str) -> None:
    """Run a command in the project's folder. Raises CalledProcessError."""
    subprocess.run(words, cwd=ROOT, check=True)


@contextlib.contextmanager
def filled() -> Iterator[None]:
    """Run the demo's databases, with rows loaded and models built."""
    with demo.databases(ROOT) as (core, _):
        demo.fill(core, 1, 1000)
        run("exporter", "load")
        run("dbt", "build", "--quiet")
        yield


def main() -> None:
    """Generate dbt docs, complete the lineage, and serve them until Ctrl-C."""
    environment.load_environment(ROOT, None)
    given = os.environ.get("DATABASE_URL_ANALYTICS")
    with demo.dbt_environment(ROOT) if given else filled():
        run("dbt", "docs", "generate", "--quiet")
        run("exporter", "docs")
        with contextlib.suppress(KeyboardInterrupt):
            run("dbt", "docs", "serve", *sys.argv[1:])


if __name__ == "__main__":
    main()
