"""Server programs of several versions, and servers that follow another."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from exporter.demo import embedded
from exporter.demo.embedded import Server
from tests.helpers.processes import until

LOGICAL = {"wal_level": "logical", "max_replication_slots": "10", "max_wal_senders": "10"}


@functools.cache
def programs() -> dict[int, Path]:
    """The folders of server programs by major version: the machine's, and those named."""
    named = [Path(one) for one in os.environ.get("EXPORTER_TEST_PG_BINS", "").split(":") if one]
    found: dict[int, Path] = {}
    for folder in [*named, *embedded._candidates()]:
        if (folder / "postgres").is_file():
            command = [folder / "postgres", "--version"]
            said = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(int(said.stdout.split()[2].split(".")[0]), folder)
    return found


def others() -> list[int]:
    """The versions on this machine beside the one that the tests run on."""
    own = embedded.find_binaries()
    return sorted(major for major, folder in programs().items() if folder != own)


@contextlib.contextmanager
def server_of(major: int, settings: dict[str, str]) -> Iterator[Server]:
    """Run a server of that version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPORTER_PG_BIN", str(programs()[major]))
        with embedded.running_server({"fsync": "off", **settings}) as server:
            yield server


def run(server: Server, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def copied(server: Server, name: str, settings: dict[str, str]) -> Server:
    """A server with the data that another has now, for which that one is stopped a moment."""
    folder = server.folder / name
    server.stop()
    folder.mkdir(mode=0o700)
    shutil.copytree(server.data, folder / "data")
    for path in [folder, *folder.rglob("*")]:
        shutil.chown(path, server.data.owner(), server.data.group())
    server.start()
    return Server(folder, server.binaries, settings)


@contextlib.contextmanager
def standby_of(primary: Server, name: str = "standby", **settings: str) -> Iterator[Server]:
    """A server that streams from another."""
    standby = copied(primary, name, {**primary.settings, **settings})
    (standby.data / "standby.signal").touch()
    with (standby.data / "postgresql.auto.conf").open("a") as file:
        file.write(f"primary_conninfo = 'host={primary.folder} user=postgres dbname=postgres'\n")
    shutil.chown(standby.data / "standby.signal", standby.data.owner(), standby.data.group())
    standby.start()
    try:
        yield standby
    finally:
        standby.stop()


def caught_up(primary: Server, standby: Server) -> None:
    """Wait until the standby has all that the primary has committed."""
    place = run(primary, "select pg_current_wal_lsn()")[0][0]
    behind = f"select pg_last_wal_replay_lsn() >= '{place}'"
    until(lambda: run(standby, behind) == [(True,)])


def cut_off(standby: Server) -> None:
    """Let a standby get nothing of its primary any more."""
    run(standby, "alter system set primary_conninfo = ''")
    run(standby, "select pg_reload_conf()")
    receiver = "select count(*) from pg_stat_wal_receiver"
    until(lambda: run(standby, receiver) == [(0,)])
