"""A real pair: a standby as source, its promotion after it missed commits; a subscriber."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from exporter.demo.embedded import Server, find_binaries, running_server
from tests.conftest import Workplace, compare
from tests.helpers.processes import until
from tests.helpers.tables import ITEM

_PARTS = {
    "cursor": "cursor: {field: at, id_field: id}\n          read: cursor",
    "scan": "read: scan",
}
_TABLE = (
    "create table {0} (id int primary key, at timestamptz not null default clock_timestamp(),"
    " v text); create index on {0} (at, id);"
    "insert into {0} select n, now() - interval '1 hour', 'first' from generate_series(1, 500) n"
)


def _run(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def _standby(primary: Server, folder: Path) -> Iterator[Server]:
    """A server that streams from another, made by pg_basebackup."""
    if not (find_binaries() / "pg_basebackup").is_file():
        pytest.skip("this PostgreSQL comes without pg_basebackup")
    server = Server(folder, primary.binaries, {"fsync": "off", "hot_standby": "on"})
    account = server._as_account()
    folder.mkdir(mode=0o700)
    if account:
        os.chown(folder, account["user"], account["group"])
    command = [str(primary.binaries / "pg_basebackup"), "-h", str(primary.folder), "-U", "postgres"]
    subprocess.run(
        [*command, "-D", str(server.data), "-R", "-X", "stream", "-c", "fast"],
        check=True,
        capture_output=True,
        cwd=folder,
        **account,
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _caught_up(primary: Server, standby: Server) -> None:
    place = _run(primary.url("postgres"), "select pg_current_wal_lsn()")[0][0]
    behind = f"select pg_last_wal_replay_lsn() >= '{place}'"
    until(lambda: _run(standby.url("postgres"), behind) == [(True,)])


def _define(place: Workplace) -> None:
    place.define(
        *(
            ITEM.replace("- name: item", f"- name: {name}")
            .replace("key: Item", f"key: {name}")
            .replace("table: item", f"table: {name}")
            .replace("cursor: {field: at, id_field: id}", way)
            + "        deletes: remove\n"
            for name, way in _PARTS.items()
        )
    )


def test_a_standby_that_is_promoted_without_the_last_commits(
    place: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _define(place)
    with running_server({"fsync": "off", "wal_level": "logical"}) as primary:
        for name in _PARTS:
            _run(primary.url("postgres"), _TABLE.format(name))
        with _standby(primary, primary.folder / "standby") as standby:
            _caught_up(primary, standby)
            place.core = standby.url("postgres")
            told = place.run("exporter", "load")
            assert told.returncode == 0, told.stderr
            for name in _PARTS:
                assert told.stderr.count(f"{name}: public.{name} is read from a standby") == (
                    name == "cursor"
                ), told.stderr
            place.core = primary.url("postgres")
            assert place.run("exporter", "load").returncode == 0
            for statement in (
                "alter system set primary_conninfo = ''",
                "select pg_reload_conf()",
            ):
                _run(standby.url("postgres"), statement)
            receiver = "select count(*) from pg_stat_wal_receiver"
            until(lambda: _run(standby.url("postgres"), receiver) == [(0,)])
            for name in _PARTS:  # what is lost, after it has landed
                _run(
                    primary.url("postgres"),
                    f"update {name} set v = 'lost', at = clock_timestamp() where id <= 20;"
                    f"insert into {name} (id, v) select n, 'lost' from generate_series(501, 520) n",
                )
            assert place.run("exporter", "load").returncode == 0
            primary.stop("immediate")
            _run(standby.url("postgres"), "select pg_promote()")
            for name in _PARTS:
                _run(
                    standby.url("postgres"),
                    f"insert into {name} (id, v) select n, 'new' from generate_series(501, 510) n;"
                    f"update {name} set v = 'new' where id between 100 and 110",
                )
            place.core = standby.url("postgres")
            done = place.run("exporter", "load")
            assert done.returncode == 0, done.stderr
            for name in _PARTS:
                assert f"{name}: the source is on timeline 2, and was on 1" in done.stderr
            for name in _PARTS:
                compare(place, f"public.{name}", f"analytics_raw.{name}")


def test_a_subscriber_as_source(place: Workplace) -> None:
    place.define(ITEM.replace("id_field: id}", "id_field: id}\n          read: cursor"))
    with running_server({"fsync": "off", "wal_level": "logical"}) as publisher:
        _run(publisher.url("postgres"), _TABLE.format("item"))
        _run(publisher.url("postgres"), "create publication p for table item")
        with running_server({"fsync": "off"}) as subscriber:
            url = subscriber.url("postgres")
            _run(url, "create table item (id int primary key, at timestamptz not null, v text)")
            _run(
                url,
                "create subscription s connection"
                f" 'host={publisher.folder} dbname=postgres user=postgres' publication p",
            )
            until(lambda: _run(url, "select count(*) from item") == [(500,)])
            place.core = url
            done = place.run("exporter", "load")
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("public.item is filled by logical replication: the") == 1
            warned = place.run("exporter", "check", "Item")
            assert "filled by logical replication" in " ".join(warned.stdout.split())
            compare(place, "public.item", "analytics_raw.item")
            _run(url, "drop subscription s")
