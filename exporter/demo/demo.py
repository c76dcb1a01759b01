"""``exporter demo``: the commands of the main job, run on an embedded server."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import psycopg

from exporter.demo.embedded import Server, running_server
from exporter.errors import ExporterError, ProjectError
from exporter.terminal import text

_SCHEMA = Path(__file__).with_name("demo.sql")
_ROWS = """
insert into "StatEvent"
select 'evt_' || lpad(n::text, 12, '0'), (array['click', 'print', 'apply', 'account'])
        [1 + (n * 7919::bigint %% 10 > 4)::int + (n %% 9 = 0)::int + (n %% 50 = 0)::int]
        ::"StatEventType",
    stamp, stamp, 'clk_' || md5(n::text), 'https://www.example.org/missions/' || n %% 5000,
    'www.example.org', n %% 17 = 0, n %% 17 <> 0,
    (enum_range(null::"StatSource"))[1 + n %% 6],
    case when n %% 20 <> 0 then 'src_' || n %% 700 end,
    'pub_' || n %% 90, 'pub_' || n %% 40, 'mis_' || n %% 5000, 'client_' || n %% 9000,
    'tag' || n %% 12, array['tag' || n %% 12, 'tag' || n %% 7],
    case when n %% 50 = 0 then (enum_range(null::"StatEventStatus"))[1 + n %% 6] end,
    jsonb_build_object('campaign', n %% 300, 'device', (array['mobile', 'desktop'])[1 + n %% 2])
from (
    select n, (now() at time zone 'UTC') - (%(to)s - n) * interval '20 milliseconds' as stamp
    from generate_series(%(from)s::int, %(to)s::int) n
) s
"""
_CHANGE = """
update "StatEvent" set status = 'VALIDATED', updated_at = now() at time zone 'UTC'
where id in (select id from "StatEvent" order by md5(id) limit %s)
"""
_SHOW_CURSOR = "\x1b[?25h"
# Ctrl-C amid a statement: that it cannot be rolled back would come behind the demo's last line.
logging.getLogger("psycopg").addHandler(logging.NullHandler())


def run(root: Path, rows: int, keep: bool) -> None:
    """Run the demo of a project with that many rows; ``keep`` leaves the server up until Ctrl-C.

    Raises ExporterError when a command fails.
    """
    with databases(root) as (core, analytics):
        click.echo(
            f'\nAn embedded PostgreSQL with two databases; core."StatEvent" gets {rows:,} rows.'
        )
        fill(core, 1, rows)
        _load_and_build(root, core, analytics)
        share = max(1, rows // 100)
        click.echo(f"\nAt the source, {share:,} rows change and {share:,} are added. Once more:")
        with psycopg.connect(core) as connection:
            connection.execute(_CHANGE, (share,))
        fill(core, rows + 1, rows + share)
        _load_and_build(root, core, analytics)
        _show(analytics)
        if keep:
            keep_up(core, analytics)


def keep_up(core: str, analytics: str) -> None:
    """Print the URLs, and wait for Ctrl-C."""
    click.echo("\nThe server stays up until Ctrl-C. In another terminal:\n")
    click.echo(f"  export DATABASE_URL_CORE='{core}'")
    click.echo(f"  export DATABASE_URL_ANALYTICS='{analytics}'")
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


@contextlib.contextmanager
def databases(root: Path) -> Iterator[tuple[str, str]]:
    """Run a server with two databases that the environment names; yield their URLs."""
    with running_server({"max_connections": "50"}) as server, dbt_environment(root):
        core, analytics = create_databases(server)
        os.environ.update(DATABASE_URL_CORE=core, DATABASE_URL_ANALYTICS=analytics)
        os.environ.pop("BATCH_SIZE", None)
        yield core, analytics


def create_databases(server: Server) -> tuple[str, str]:
    """Create ``core``, with an empty StatEvent, and ``analytics``; return their URLs."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute("create database core")
        connection.execute("create database analytics")
    core = server.url("core")
    with psycopg.connect(core) as connection:
        connection.execute(_SCHEMA.read_bytes())
    return core, server.url("analytics")


def fill(url: str, first: int, last: int) -> None:
    """Insert the events ``first`` to ``last``, stamped up to now."""
    with psycopg.connect(url) as connection:
        connection.execute(_ROWS, {"from": first, "to": last})
        connection.execute('analyze "StatEvent"')


@contextlib.contextmanager
def dbt_environment(root: Path) -> Iterator[None]:
    """Give dbt a profile, on DATABASE_URL_ANALYTICS, and temporary folders of its own."""
    before = dict(os.environ)
    profile = root / "profiles.yml.example"
    if not profile.is_file():
        raise ProjectError(f"no {profile}", hint="run the demo in dbt-exporter's own repository")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(profile, f"{folder}/profiles.yml")
        os.environ.update(
            DBT_PROFILES_DIR=folder,
            DBT_TARGET_PATH=f"{folder}/target",
            DBT_LOG_PATH=folder,
            PYTHONWARNINGS="ignore:resource_tracker",  # cleans up after a dbt that was killed
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        )
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _load_and_build(root: Path, core: str, analytics: str) -> None:
    before = _counts(core, analytics)
    command_line(root, "exporter", "load", "StatEvent")
    command_line(root, "dbt", "build", "-s", "+stat_event", "--quiet", "--no-use-colors")
    after = _counts(core, analytics)
    for name in after:
        click.echo(f"  {name:<26} {before[name]:>9,} → {after[name]:>9,} rows")


def command_line(root: Path, *words: str) -> None:
    """Run a command as a person would, in a folder. Raises ExporterError when it fails."""
    click.echo(f"\n$ {' '.join(words)}")
    begin = time.monotonic()
    try:
        # In a session of its own: after Ctrl-C we report, not dbt with a traceback.
        done = subprocess.run(words, cwd=root, check=False, start_new_session=True)
    except BaseException:
        if sys.stderr.isatty():
            click.echo(_SHOW_CURSOR, err=True, nl=False)  # a killed command's bar has hidden it
        raise
    if done.returncode != 0:
        raise ExporterError(f"{' '.join(words)} ended with exit status {done.returncode}")
    click.echo(f"  ({time.monotonic() - begin:.1f} s)")


def _counts(core: str, analytics: str) -> dict[str, int]:
    tables = {
        'core."StatEvent"': (core, 'public."StatEvent"'),
        "analytics_raw.stat_event": (analytics, "analytics_raw.stat_event"),
        "analytics.stat_event": (analytics, "analytics.stat_event"),
    }
    counts = {}
    for name, (url, table) in tables.items():
        counts[name] = 0
        with contextlib.suppress(psycopg.errors.UndefinedTable), psycopg.connect(url) as connection:
            query = f"select count(*) from {table}".encode()  # noqa: S608  our own names
            counts[name] = int(connection.execute(query).fetchall()[0][0])
    return counts


def _show(analytics: str) -> None:
    click.echo("\nThe newest rows of analytics.stat_event:\n")
    names = "old_id, type_label, source, is_widget, to_partner_id, status"
    with psycopg.connect(analytics) as connection:
        rows = connection.execute(
            f"select {names} from analytics.stat_event"  # noqa: S608  our own names
            " order by _exported_at desc, old_id limit 5".encode()
        ).fetchall()
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    for line in text.table(names.split(", "), cells):
        click.echo(f"  {line}")
