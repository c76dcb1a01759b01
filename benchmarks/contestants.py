"""Who takes part: each a command for the first load, and one for every load after it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

ROOT = Path(__file__).resolve().parent.parent
# The columns of StatEvent as the raw table has them: enums as text.
COLUMNS = {
    "id": "text",
    "type": "text",
    "created_at": "timestamp(3)",
    "updated_at": "timestamp(3)",
    "click_id": "text",
    "referer": "text",
    "host": "text",
    "is_bot": "boolean",
    "is_human": "boolean",
    "source": "text",
    "source_id": "text",
    "from_publisher_id": "text",
    "to_publisher_id": "text",
    "mission_id": "text",
    "mission_client_id": "text",
    "tag": "text",
    "tags": "text[]",
    "status": "text",
    "custom_attributes": "jsonb",
}
NAMES = ", ".join(COLUMNS)
SELECTED = ", ".join(
    f"{name}::text" if name in ("type", "source", "status") else name for name in COLUMNS
)
TYPED = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())


@dataclass(frozen=True)
class Place:
    """The two databases, and a folder for what a contestant keeps."""

    core: str
    analytics: str
    folder: Path


Command = Callable[[Place], list[str]]


FIRST, NOTHING_NEW = "first load", "nothing new"


@dataclass(frozen=True)
class Contestant:
    """``clear`` is SQL in the destination before a first load; ``table`` what it fills."""

    name: str
    table: str
    clear: str
    first: Command | None
    again: Command | None
    largest: int  # rows

    @property
    def follows(self) -> bool:
        """Whether its table follows the changes of the source."""
        return self.again is not None and bool(self.table)

    def command(self, phase: str) -> Command | None:
        """What it runs in a phase: one that lands nothing takes part where nothing is new."""
        if phase == FIRST:
            return self.first
        return self.again if self.follows or phase == NOTHING_NEW else None


def _psql(url: str, *statements: str) -> list[str]:
    command = ["psql", url, "-qX", "-v", "ON_ERROR_STOP=1"]
    for statement in statements:
        command += ["-c", statement]
    return command


def _pipe(place: Place) -> list[str]:
    out = _psql(place.core, f'copy (select {SELECTED} from "StatEvent") to stdout (format binary)')
    into = _psql(
        place.analytics,
        "create schema bench_pipe",
        f"create table bench_pipe.stat_event ({TYPED})",
        f"copy bench_pipe.stat_event ({NAMES}) from stdin (format binary)",
        "alter table bench_pipe.stat_event add primary key (id)",
    )
    return ["sh", "-c", f"{shlex.join(out)} | {shlex.join(into)}"]


def _fdw_upsert(condition: str) -> str:
    others = [name for name in COLUMNS if name != "id"]
    return (
        f"insert into bench_fdw.stat_event ({NAMES}) select {NAMES} from bench_fdw.source"
        f" {condition} on conflict (id) do update set ({', '.join(others)})"
        f" = row({', '.join(f'excluded.{name}' for name in others)})"
    )


def fdw_first(place: Place) -> list[str]:
    parts = conninfo_to_dict(place.core)
    user = parts.pop("user", "postgres")
    password = parts.pop("password", None)
    options = ", ".join(f"{name} '{value}'" for name, value in parts.items())
    secret = f", password '{password}'" if password else ""
    return _psql(
        place.analytics,
        "create extension if not exists postgres_fdw",
        "create schema bench_fdw",
        "drop server if exists bench_core cascade",
        "create server bench_core foreign data wrapper postgres_fdw"
        f" options (fetch_size '50000', {options})",
        f"create user mapping for current_user server bench_core options (user '{user}'{secret})",
        f"create foreign table bench_fdw.source ({TYPED}) server bench_core"
        " options (schema_name 'public', table_name 'StatEvent')",
        f"create table bench_fdw.stat_event ({TYPED}, primary key (id))",
        _fdw_upsert(""),
        "create index on bench_fdw.stat_event (updated_at)",  # to find the last position
    )


def fdw_again(place: Place) -> list[str]:
    script = (
        "select max(updated_at) as last from bench_fdw.stat_event \\gset\n"
        + _fdw_upsert("where updated_at > :'last'::timestamp")
        + ";\n"
    )
    file = place.folder / "fdw.sql"
    file.write_text(script)
    return ["psql", place.analytics, "-qX", "-v", "ON_ERROR_STOP=1", "-f", str(file)]


def _exporter(_: Place) -> list[str]:
    return _load("StatEvent", ROOT)


def _scan(_: Place) -> list[str]:
    return _load("StatEventScan", ROOT / "benchmarks" / "scan")


def _load(key: str, project: Path) -> list[str]:
    exporter = str(Path(sys.executable).parent / "exporter")
    return [exporter, "load", key, "--project-dir", str(project)]


def _dlt(_: Place) -> list[str]:
    return [str(ROOT / ".bench" / "bin" / "python"), str(ROOT / "benchmarks" / "dlt_job.py")]


def _imports(_: Place) -> list[str]:
    return [sys.executable, "-c", "import psycopg, click, yaml"]


PIPE, FDW, EXPORTER, DLT = "psql pipe", "postgres_fdw", "exporter", "dlt"
SCAN = "exporter, by scan"
IMPORTS = "python -c 'import psycopg, click, yaml'"
CONTESTANTS = (
    Contestant(
        PIPE,
        "bench_pipe.stat_event",
        "drop schema if exists bench_pipe cascade",
        _pipe,
        None,
        10**9,
    ),
    Contestant(
        FDW,
        "bench_fdw.stat_event",
        "drop schema if exists bench_fdw cascade",
        fdw_first,
        fdw_again,
        10**9,
    ),
    Contestant(
        EXPORTER,
        "analytics_raw.stat_event",
        "drop schema if exists analytics_raw cascade",
        _exporter,
        _exporter,
        10**9,
    ),
    Contestant(
        SCAN,
        "bench_scan.stat_event",
        "drop schema if exists bench_scan cascade",
        _scan,
        _scan,
        10**9,
    ),
    Contestant(
        DLT,
        "bench_dlt.stat_event",
        "drop schema if exists bench_dlt, bench_dlt_staging cascade",
        _dlt,
        _dlt,
        10**6,  # beyond it, a round takes longer than all the others together
    ),
    Contestant(IMPORTS, "", "select", None, _imports, 10**9),
)
