"""Sessions: settings that take effect, poolers, servers that fall silent."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest

from exporter.errors import DatabaseError
from exporter.wire import connect
from tests.conftest import Workplace, compare
from tests.helpers.processes import until, wait_unlocked
from tests.helpers.tables import ITEM

# The same text under every setting of a server.
VALUES = "id, extract(epoch from at), day - date '2000-01-01', v"


@pytest.fixture
def items(place: Workplace) -> Workplace:
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null, day date, v numeric);"
        "insert into item select n, now() - interval '1 hour', '2026-02-03', n / 3.0"
        " from generate_series(1, 20) n",
    )
    return place


def _name(url: str) -> str:
    return urlsplit(url).path[1:]


@pytest.mark.parametrize("side", ["core", "analytics"])
def test_settings_of_a_database_do_no_harm(items: Workplace, side: str) -> None:
    url = getattr(items, side)
    for setting in (
        "datestyle = 'SQL, DMY'",
        "intervalstyle = 'iso_8601'",
        "timezone = 'America/Caracas'",
        "extra_float_digits = -3",
        "default_transaction_isolation = 'repeatable read'",
        "statement_timeout = 50",
        "idle_in_transaction_session_timeout = 50",
    ):
        items.query(url, f"alter database {_name(url)} set {setting}")
    nap = 'columns: [id, at, day, v, {name: nap, expression: "pg_sleep(0.005)::text"}]'
    items.define(ITEM.replace("table: item", f"table: item\n          {nap}"))
    items.load("Item", "-j", "2")
    items.query(items.core, "update item set at = now(), v = v + 1")
    assert items.load("Item")["rows_written"] == 20
    compare(items, "public.item", "analytics_raw.item", VALUES)


def test_functions_in_public_are_not_run(items: Workplace) -> None:
    items.query(
        items.core,
        "create table seen (who text);"
        "create function public.format(text, bigint, integer, oid) returns text language sql as"
        " $$ insert into seen values (current_user) returning 'x' $$;"
        "create function public.max(timestamptz) returns timestamptz language sql as"
        " $$ insert into seen values ('max'); select now() $$;"
        "create function public.age(xid) returns int language sql as"
        " $$ insert into seen values ('age'); select 0 $$",
    )
    for words in (["load"], ["load"], ["check"], ["status"], ["verify"], ["load", "--dry-run"]):
        assert items.run("exporter", *words).returncode == 0
    assert items.query(items.core, "select count(*) from seen") == [(0,)]


def test_a_key_of_an_extension_is_compared_by_its_own_operators(place: Workplace) -> None:
    for url in (place.core, place.analytics):
        place.query(url, "create schema far; create extension ltree schema far")
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id far.ltree primary key, at timestamptz not null default now());"
        "insert into item select ('a.b' || n)::far.ltree from generate_series(1, 1000) n",
    )
    place.load("Item")
    place.query(
        place.core,
        "insert into item select ('c' || n)::far.ltree from generate_series(1, 100) n;"
        "update item set at = now() where id::text = 'a.b7'",
    )
    place.load("Item", BATCH_SIZE="10")
    compare(place, "public.item", "analytics_raw.item", "id::text, at")
    assert place.run("exporter", "verify").returncode == 0


def test_a_setting_that_does_not_take_effect_is_told(
    items: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.wire import settings

    monkeypatch.setenv("DATABASE_URL_CORE", items.core)
    monkeypatch.setitem(settings.REQUIRED, "datestyle", "iso, mdy")  # read back as ISO, MDY
    with pytest.raises(DatabaseError, match="setting datestyle is ISO, MDY"):
        connect("DATABASE_URL_CORE")


def test_who_calls_himself_like_us_is_waited_for(items: Workplace) -> None:
    items.load()
    items.query(items.core, "update item set at = now() - interval '30 minutes'")
    with psycopg.connect(items.core, application_name="dbt-exporter") as writer:
        writer.execute("insert into item values (100, now())")
        time.sleep(0.2)
        items.query(items.core, "insert into item values (101, now() + interval '6 minutes')")
        items.define(ITEM.replace("id_field: id", "id_field: id, lookback: 0 seconds"))
        items.run("exporter", "load", "Item")
        writer.commit()
    items.run("exporter", "load", "Item")
    compare(items, "public.item", "analytics_raw.item")


# -- PgBouncer


@pytest.fixture
def bouncer() -> Iterator[tuple[Path, int]]:
    """A folder for PgBouncer's files, and a port."""
    if not shutil.which("pgbouncer"):
        pytest.skip("no pgbouncer here (Debian: pgbouncer)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), port


@contextlib.contextmanager
def _pooled(bouncer: tuple[Path, int], url: str, mode: str) -> Iterator[str]:
    """The URL of a database through PgBouncer, installed as it comes."""
    folder, port = bouncer
    host = parse_qs(urlsplit(url).query)["host"][0]
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "ini").write_text(
        f"[databases]\n* = host={host} port=5432 user=postgres\n[pgbouncer]\npool_mode = {mode}\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\nunix_socket_dir =\n"
        f"auth_file = {folder}/users\nlogfile = {folder}/log\n"
    )
    for one in (folder, *folder.iterdir()):
        one.chmod(0o777)
    process = subprocess.Popen(
        ["pgbouncer", "-q", str(folder / "ini")], user="postgres" if _is_root() else None
    )
    try:
        until(lambda: _answers(port))
        yield f"postgresql://postgres@127.0.0.1:{port}/{_name(url)}"
    finally:
        process.terminate()
        process.wait()


def _is_root() -> bool:
    import os

    return os.geteuid() == 0


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def test_a_pooler_in_session_mode(items: Workplace, bouncer: tuple[Path, int]) -> None:
    items.query(items.core, f"alter database {_name(items.core)} set datestyle = 'SQL, DMY'")
    direct = items.core, items.analytics
    with _pooled(bouncer, items.core, "session") as items.core:
        items.load("Item")
        items.query(direct[0], "update item set day = '2026-03-02'::date, at = now()")
        items.analytics = f"{items.core.rpartition('/')[0]}/{_name(direct[1])}"
        assert items.load("Item", "-j", "2")["rows_written"] == 20
    items.core, items.analytics = direct
    compare(items, "public.item", "analytics_raw.item", VALUES)


@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_a_pooler_that_changes_the_server_process(
    items: Workplace, bouncer: tuple[Path, int], mode: str
) -> None:
    with _pooled(bouncer, items.core, mode) as items.core:
        done = items.run("exporter", "load")
        assert done.returncode == 1
        assert "DATABASE_URL_CORE leads through a pooler" in done.stderr
        assert "session mode" in done.stderr


# -- a peer that says nothing


@dataclass
class Relay:
    """Passes bytes between a port and a server's socket, until it falls silent."""

    target: str
    silent: threading.Event = field(default_factory=threading.Event)
    passed: int = 0  # bytes from the server
    most: int = 2**60  # after which it falls silent

    def __post_init__(self) -> None:
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self._threads: list[threading.Thread] = []
        self.port = self._sockets[0].getsockname()[1]
        self._begin(self._accept)

    def _begin(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._sockets[0].accept()
                server = socket.socket(socket.AF_UNIX)
                self._sockets += [client, server]
                server.connect(self.target)
                self._begin(self._pass, client, server, False)
                self._begin(self._pass, server, client, True)

    def _pass(self, one: socket.socket, other: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if counts:
                    self.passed += len(data)
                    if self.passed > self.most:
                        self.silent.set()
                while self.silent.is_set():
                    time.sleep(0.05)
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def url(self, url: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{_name(url)}?sslmode=disable"

    def close(self) -> None:
        self.most = 2**60
        self.silent.clear()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()


@pytest.fixture
def relay(place: Workplace) -> Iterator[Relay]:
    made = Relay(f"{parse_qs(urlsplit(place.core).query)['host'][0]}/.s.PGSQL.5432")
    yield made
    made.close()


@pytest.mark.parametrize("side", ["core", pytest.param("analytics", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("words", "number"),
    [
        (("load",), signal.SIGINT),
        (("load", "-j", "2"), signal.SIGTERM),
        (("load", "--full-refresh"), signal.SIGINT),
    ],
)
def test_a_silent_peer_and_a_signal(
    place: Workplace, relay: Relay, side: str, words: tuple[str, ...], number: signal.Signals
) -> None:
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz default now(), pad text);"
        "insert into item select n, now(), repeat('x', 500) from generate_series(1, 60000) n",
    )
    if "--full-refresh" in words:
        place.load("Item")
        place.query(place.core, "update item set pad = 'y' || pad")
    relay.most = 2_000_000 if side == "core" else 3_500
    direct, urls = getattr(place, side), {}
    urls[f"DATABASE_URL_{side.upper()}"] = relay.url(direct)
    with subprocess.Popen(
        [sys.executable, "-m", "exporter", *words],
        cwd=place.folder,
        env={**place.environment, **urls},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until(lambda: relay.silent.is_set() or process.poll() is not None)
        time.sleep(0.3)
        process.send_signal(number)
        began = time.monotonic()
        try:
            _, said = process.communicate(timeout=8)
        finally:
            process.kill()
        seconds = time.monotonic() - began
    assert process.returncode == 128 + number, said
    assert seconds < 5.2, said
    assert "Traceback" not in said
    relay.close()  # as the server's own keepalives would find it out
    wait_unlocked(place)
    place.load("Item")
    compare(place, "public.item", "analytics_raw.item")


def test_a_silent_peer_is_given_up(items: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout")
    monkeypatch.setenv("DATABASE_URL_CORE", items.core)
    with connect("DATABASE_URL_CORE") as session:
        found = session.info.get_parameters()
        idle, interval, count, timeout = (int(found[name]) for name in names)
        assert idle + interval * count <= 60
        assert timeout <= 60_000
    monkeypatch.setenv("DATABASE_URL_CORE", f"{items.core}&tcp_user_timeout=1234")
    with connect("DATABASE_URL_CORE") as session:
        assert session.info.get_parameters()["tcp_user_timeout"] == "1234"
