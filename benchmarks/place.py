"""Where the benchmarks run, and where their figures go."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict

from benchmarks.contestants import ROOT, Place
from exporter.demo.demo import create_databases, fill
from exporter.demo.embedded import running_server

T = TypeVar("T")
SETTINGS = {
    "shared_buffers": "1GB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "30min",
    "maintenance_work_mem": "512MB",
    "work_mem": "64MB",
}


@contextlib.contextmanager
def place_of() -> Iterator[Place]:
    """The databases that the environment names, or those of an embedded server."""
    with tempfile.TemporaryDirectory() as folder:
        core, analytics = (os.environ.get(f"DATABASE_URL_{n}") for n in ("CORE", "ANALYTICS"))
        if core and analytics:
            yield Place(core, analytics, Path(folder))
            return
        with running_server(SETTINGS) as server:
            os.environ["PATH"] = f"{server.binaries}{os.pathsep}{os.environ['PATH']}"
            yield Place(*create_databases(server), Path(folder))


def sql(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def about(rounds: int) -> str:
    with running_server() as server:
        version = sql(server.url("postgres"), "show server_version")[0][0]
    today = datetime.date.today().isoformat()
    return (
        f"{today}, PostgreSQL {version}, Python {platform.python_version()},"
        f" {os.cpu_count()} cores; medians of {rounds}"
    )


def make_project(folder: Path, url: str, models: dict[str, str]) -> None:
    """A dbt project on a database, with the product's macros and these models by file name."""
    parts = conninfo_to_dict(url)
    output = {
        "type": "postgres",
        "host": parts["host"],
        "port": int(str(parts.get("port", 5432))),
        "user": parts["user"],
        "password": parts.get("password", "none"),
        "dbname": parts["dbname"],
        "schema": "public",
        "threads": 1,
    }
    profile = {"dbt_exporter": {"target": "bench", "outputs": {"bench": output}}}
    (folder / "profiles.yml").write_text(json.dumps(profile))
    (folder / "dbt_project.yml").write_text("name: dbt_exporter\nprofile: dbt_exporter\n")
    shutil.copytree(ROOT / "macros", folder / "macros")
    (folder / "models").mkdir()
    for name, text in models.items():
        (folder / "models" / name).write_text(text)


def fill_source(place: Place, rows: int) -> None:
    """Give core's StatEvent so many rows, and no others, the last of them stamped a day ago."""
    sql(place.core, 'truncate "StatEvent"')
    for first in range(1, rows + 1, 500_000):
        fill(place.core, first, min(first + 499_999, rows))
    sql(
        place.core,
        'alter table "StatEvent" alter updated_at type timestamp(3)'
        " using updated_at - interval '1 day'",
    )
    sql(place.core, 'vacuum (analyze) "StatEvent"')


def rotated(contestants: Sequence[T], number: int) -> list[T]:
    """The contestants in the order of a round: each round begins with another one."""
    first = number % len(contestants)
    return [*contestants[first:], *contestants[:first]]


def write_section(name: str, text: str) -> None:
    """Put a benchmark's figures where README.md has its mark."""
    file = ROOT / "benchmarks" / "README.md"
    section = re.compile(rf"(<!-- {name} -->).*?(?=\n## |\Z)", re.DOTALL)
    file.write_text(section.sub(lambda mark: f"{mark[1]}\n\n{text}", file.read_text()))
