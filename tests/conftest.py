"""Real servers, real commands: an embedded PostgreSQL, or the ones that the environment names."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
import pytest

from exporter.demo import demo
from exporter.demo.embedded import running_server
from tests.helpers.warm import Warm

# A shell that runs the tests in the background has them ignore Ctrl-C, and so all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
# Most of what tests do on a disk is to make and drop databases, of some hundred files each. ext4
# looks through the files that were deleted lately whenever it makes one: a sixth of all time.
MEMORY = Path("/dev/shm")
if not os.environ.get("TMPDIR") and MEMORY.is_dir() and os.access(MEMORY, os.W_OK):  # noqa: SIM102
    if shutil.disk_usage(MEMORY).free > 8 * 2**30:
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)


def _database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@pytest.fixture(scope="session")
def servers() -> Iterator[tuple[str, str]]:
    """The URLs of a source and of a destination server; any database of theirs."""
    given = os.environ.get("DATABASE_URL_CORE"), os.environ.get("DATABASE_URL_ANALYTICS")
    if given[0] and given[1]:
        yield given[0], given[1]
        return
    settings = {"max_prepared_transactions": "10", "fsync": "off", "full_page_writes": "off"}
    slots = {"wal_level": "logical", "max_replication_slots": "50", "max_wal_senders": "50"}
    with running_server(settings | slots) as server:
        yield server.url("postgres"), server.url("postgres")


@functools.cache
def _warm() -> Warm:
    server = Warm(ROOT)
    atexit.register(server.close)
    return server


@dataclass
class Workplace:
    """A dbt project, two new databases, and the commands run there."""

    folder: Path
    core: str
    analytics: str

    @property
    def environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in ("BATCH_SIZE", "PYTHONWARNINGS")}
        env.update(
            DATABASE_URL_CORE=self.core,
            DATABASE_URL_ANALYTICS=self.analytics,
            DBT_PROFILES_DIR=str(self.folder),
            DBT_SEND_ANONYMOUS_USAGE_STATS="false",
        )
        return env

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `exporter` or `dbt` in a process that has imported them, or `python` in a new one."""
        env = {**self.environment, **environment, "PYTHONPATH": str(ROOT)}
        env = {name: value for name, value in env.items() if value}
        if words[0] != "python":
            return _warm().run(words[0], [*words[1:]], self.folder, env, timeout=300)
        return subprocess.run(
            [sys.executable, *words[1:]],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def load(self, *words: str, **environment: str) -> dict[str, Any]:
        done = self.run("exporter", "load", "--json", *words, **environment)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def dbt(self, *words: str) -> str:
        done = self.run("dbt", *words, "--no-use-colors")
        assert done.returncode == 0, done.stdout
        return done.stdout

    def refused(self, *words: str) -> str:
        """What `dbt run` says where it has to fail."""
        done = self.run("dbt", "run", "--no-use-colors", *words)
        assert done.returncode == 1, done.stdout
        return done.stdout

    def query(self, url: str, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def types(self, relation: str) -> dict[str, str]:
        """Name → type of the columns of a relation at the destination, in their order."""
        return dict(
            self.query(
                self.analytics,
                "select attname, format_type(atttypid, atttypmod) from pg_attribute where"
                f" attrelid = '{relation}'::regclass and attnum > 0 and not attisdropped"
                " order by attnum",
            )
        )

    def define(self, *tables: str) -> None:
        """Write the sources file: one YAML text a table, below ``tables:``."""
        text = "version: 2\nsources:\n  - name: analytics_raw\n    tables:\n"
        for table in tables:
            text += "".join(f"      {line}\n" for line in table.strip("\n").splitlines())
        (self.folder / "models" / "sources.yml").write_text(text)


def compare(place: Workplace, source: str, raw: str, columns: str = "*") -> None:
    """Assert that a source table and its raw table hold the same rows, column by column."""
    names = columns
    if columns == "*":
        schema, _, table = source.partition(".")
        names = ", ".join(
            f'"{row[0]}"::text'
            for row in place.query(
                place.core,
                "select column_name from information_schema.columns where table_schema ="
                f" '{schema}' and table_name = '{table.strip(chr(34))}' order by ordinal_position",
            )
        )
        assert names, f"{source} needs its schema"
    statement = "select md5(string_agg(whole::text, '\n' order by whole::text collate \"C\")),"
    statement += " count(*) from (select {} from {}) whole"  # no column has this name
    ours = place.query(place.core, statement.format(names, source))
    theirs = place.query(place.analytics, statement.format(names, raw))
    assert ours == theirs


@pytest.fixture
def place(servers: tuple[str, str], tmp_path: Path) -> Iterator[Workplace]:
    """An empty dbt project on two new databases."""
    yield from empty_project(servers, tmp_path)


@pytest.fixture
def product(servers: tuple[str, str], tmp_path: Path) -> Iterator[Workplace]:
    """A copy of this repository's dbt project; core holds an empty StatEvent."""
    yield from product_in(servers, tmp_path)


def product_in(servers: tuple[str, str], folder: Path) -> Iterator[Workplace]:
    for name in ("models", "macros", "seeds", "tests/dbt"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "dbt_project.yml", folder)
    shutil.copy(ROOT / "profiles.yml.example", folder / "profiles.yml")
    for place in _workplace(servers, folder):
        with psycopg.connect(place.core) as connection:
            connection.execute((ROOT / "exporter" / "demo" / "demo.sql").read_bytes())
        yield place


@pytest.fixture
def bare(product: Workplace) -> Workplace:
    """The same without the product's own models and tests."""
    for folder in ("models/staging", "models/marts", "tests/dbt"):
        for file in (product.folder / folder).iterdir():
            file.unlink()
    return product


def empty_project(servers: tuple[str, str], folder: Path) -> Iterator[Workplace]:
    (folder / "dbt_project.yml").write_text("name: shop\nprofile: dbt_exporter\n")
    (folder / "models").mkdir()
    yield from _workplace(servers, folder)


def _workplace(servers: tuple[str, str], folder: Path) -> Iterator[Workplace]:
    suffix = uuid.uuid4().hex[:10]
    names = f"core_{suffix}", f"analytics_{suffix}"
    for url, name in zip(servers, names, strict=True):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"create database {name}".encode())
    yield Workplace(folder, _database(servers[0], names[0]), _database(servers[1], names[1]))
    for url, name in zip(servers, names, strict=True):
        with psycopg.connect(url, autocommit=True) as connection:
            _drop_slots(connection, name)
            connection.execute(f"drop database {name} with (force)".encode())


def _drop_slots(connection: psycopg.Connection[Any], database: str) -> None:
    for slot, pid in connection.execute(
        "select slot_name, active_pid from pg_replication_slots where database = %s", (database,)
    ).fetchall():
        if pid:
            connection.execute("select pg_terminate_backend(%s, 10000)", (pid,))
        connection.execute("select pg_drop_replication_slot(%s)", (slot,))


def as_role(url: str, role: str) -> str:
    """The same database as another role, whose password is `secret`."""
    parts = urlsplit(url)
    where = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(role)}:secret@{where}"))


fill = demo.fill
