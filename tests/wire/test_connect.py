"""What a URL may say, what is known of one's own sessions, and servers that stop in the middle."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
import pytest

from exporter.errors import DatabaseError
from exporter.source.snapshot import observe
from exporter.state import State
from exporter.wire import Connection, connect, own_sessions
from tests.conftest import ROOT, Workplace, compare
from tests.helpers.processes import started, until, wait_unlocked
from tests.helpers.tables import ITEM, SLOW, slow_table
from tests.wire.test_sessions import Relay, _pooled, bouncer, items, relay

__all__ = ["bouncer", "items", "relay"]  # fixtures
CORE = "DATABASE_URL_CORE"


@contextlib.contextmanager
def _session(monkeypatch: pytest.MonkeyPatch, url: str, **parameters: str) -> Iterator[Connection]:
    asked = "&".join(f"{name}={quote(value)}" for name, value in parameters.items())
    monkeypatch.setenv(CORE, f"{url}{'&' if '?' in url else '?'}{asked}")
    with connect(CORE) as session:
        yield session


def _shown(session: Connection, name: str) -> str:
    row = session.execute("select current_setting(%s)", (name,)).fetchone()
    assert row is not None
    return str(row[0])


def test_what_the_url_asks_for_holds_unless_rows_depend_on_it(
    items: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "-c lock_timeout=5s --statement-timeout=7min -c datestyle=SQL -csearch_path=public"
    with _session(monkeypatch, items.core, options=asked, client_encoding="LATIN1") as session:
        session.execute("discard all")
        session.settle()
        shown = [_shown(session, one) for one in ("lock_timeout", "statement_timeout")]
        assert shown == ["5s", "7min"]
        shown = [_shown(session, one) for one in ("datestyle", "search_path", "client_encoding")]
        assert shown == ["ISO, MDY", "pg_catalog", "UTF8"]
        assert _shown(session, "idle_in_transaction_session_timeout") == "0"


def test_rows_that_a_policy_hides_are_an_error(items: Workplace) -> None:
    role = f"reader_{os.urandom(4).hex()}"
    items.query(
        items.core,
        f"create role {role} login password 'secret'; grant select on item to {role};"
        "alter table item enable row level security;"
        f"create policy few on item for select to {role} using (id < 5)",
    )
    try:
        parts = urlsplit(items.core)
        url = parts._replace(netloc=f"{role}:secret@").geturl()
        done = items.run("exporter", "load", DATABASE_URL_CORE=url)
        assert done.returncode == 1
        assert "row security hides rows of public.item" in done.stderr
    finally:
        items.query(items.core, f"drop owned by {role}; drop role {role}")


@pytest.mark.parametrize("wrong", ["database", "port", "option"])
def test_no_message_has_the_password(items: Workplace, wrong: str) -> None:
    password = "o@p/e n:s#e?s%a;me"
    parts = urlsplit(items.core)
    url = parts._replace(netloc=f"postgres:{quote(password, '')}@").geturl()
    url = {
        "database": url.replace(parts.path, "/nowhere"),
        "port": f"{url}&port=1",
        "option": f"{url}&options=-c%20statement_timeout%3Dsoon",
    }[wrong]
    done = items.run("exporter", "load", "-v", DATABASE_URL_CORE=url)
    assert done.returncode == 1
    assert "DATABASE_URL_CORE: " in done.stderr
    told = done.stderr + done.stdout
    assert not [part for part in (password, quote(password, ""), "o@p", "s%a;me") if part in told]


def test_own_sessions_alone_do_not_hold_the_horizon_back(
    items: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL_ANALYTICS", items.core)
    with (
        _session(monkeypatch, items.core) as session,
        _session(monkeypatch, items.core) as reader,
        connect("DATABASE_URL_ANALYTICS") as elsewhere,  # for all that is known, another server
        psycopg.connect(items.core, application_name="dbt-exporter") as stranger,
    ):
        assert set(own_sessions(session)[0]) == {one.info.backend_pid for one in (session, reader)}
        reader.execute("begin; select from public.item")
        free = observe(session, State())
        assert free.oldest_open >= free.clock
        stranger.execute("select from item")
        held = observe(session, State())
        assert held.oldest_open < held.clock
        stranger.rollback()
        elsewhere.execute("begin; select from public.item")
        held = observe(session, State())
        assert held.oldest_open < held.clock
        reader.close()
        assert own_sessions(session)[0] == [session.info.backend_pid]


def test_sessions_are_counted_while_threads_open_them(
    items: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[BaseException] = []
    monkeypatch.setenv(CORE, items.core)

    def work() -> None:
        try:
            for _ in range(20):
                with connect(CORE) as session:
                    own_sessions(session)
        except BaseException as error:  # noqa: BLE001  told below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# -- PgBouncer


@pytest.mark.parametrize(
    ("mode", "setting", "refused"),
    [
        ("session", "default_pool_size = 1", False),
        ("transaction", "default_pool_size = 1", True),
        ("transaction", "server_round_robin = 1", True),
    ],
)
def test_a_pool_is_told_by_what_it_does(
    items: Workplace,
    bouncer: tuple[Path, int],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    setting: str,
    refused: bool,
) -> None:
    begin = time.monotonic()
    with _pooled(bouncer, items.core, f"{mode}\n{setting}") as url:
        if refused:
            with (
                pytest.raises(DatabaseError, match="leads through a pooler"),
                _session(monkeypatch, url),
            ):
                pass
        else:
            with _session(monkeypatch, url) as session:
                assert session.backend
    assert time.monotonic() - begin < 15


def test_ctrl_c_through_a_pooler_ends_what_the_server_does(
    place: Workplace, bouncer: tuple[Path, int]
) -> None:
    slow_table(place, 300)
    direct = place.core
    reading = (
        "select 1 from pg_stat_activity where query like 'copy%pg_sleep%' and state = 'active'"
        " and datname = current_database()"
    )
    with _pooled(bouncer, place.core, "session") as place.core:
        with started(place, "load", "Slow") as process:
            until(lambda: bool(place.query(direct, reading)))
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        assert (process.returncode, said) == (130, "exporter: Slow: interrupted\n")
        assert place.query(direct, reading) == []


# -- servers that stop in the middle


def _wide_slow_table(place: Workplace) -> None:
    """Rows that come one by one, of which some fill a block."""
    slow_table(place, 400)
    place.define(SLOW.replace("[id, at,", "[id, at, pad,"))


def _stopped(process: subprocess.Popen[str], number: signal.Signals, *, recorded: bool) -> None:
    """Stop a load; where the destination takes new sessions, it ends in order."""
    process.send_signal(number)
    began = time.monotonic()
    try:
        _, said = process.communicate(timeout=8)
    finally:
        process.kill()
    assert process.returncode == 128 + number, said
    assert time.monotonic() - began < 5.2, said
    assert "Traceback" not in said
    if recorded:
        assert said.startswith("exporter: Slow: interrupted")


@pytest.mark.parametrize("side", ["core", pytest.param("analytics", marks=pytest.mark.long)])
@pytest.mark.parametrize("path", [pytest.param("first", marks=pytest.mark.long), "increment"])
def test_a_peer_that_falls_silent_while_few_bytes_are_on_their_way(
    place: Workplace, relay: Relay, side: str, path: str
) -> None:
    """A full buffer is not what keeps the process, but the answer that does not come."""
    _wide_slow_table(place)
    if path == "increment":
        place.query(place.core, "delete from slow where id > 8")
        place.load("Slow")
        place.query(place.core, "insert into slow select n, now() from generate_series(9, 400) n")
    url = {f"DATABASE_URL_{side.upper()}": relay.url(getattr(place, side))}
    copying = "select 1 from pg_stat_activity where query ilike 'copy%' and state = 'active'"
    copying += " and datname = current_database()"
    with started(place, "load", "Slow", **url) as process:
        until(lambda: bool(place.query(place.analytics, copying)))
        relay.silent.set()
        time.sleep(1)
        _stopped(process, signal.SIGTERM, recorded=side == "core")
    relay.close()
    wait_unlocked(place)
    place.load("Slow")
    compare(place, "public.slow", "analytics_raw.slow", "id, at")


@pytest.mark.parametrize("side", ["core", pytest.param("analytics", marks=pytest.mark.long)])
def test_a_server_process_that_stands_still(place: Workplace, side: str) -> None:
    _wide_slow_table(place)
    pids = (
        "select pid from pg_stat_activity where query ilike 'copy%' and state = 'active'"
        " and datname = current_database()"
    )
    url = getattr(place, side)
    with started(place, "load", "Slow") as process:
        until(lambda: bool(place.query(url, pids)))
        (pid,) = place.query(url, pids)[0]
        try:
            os.kill(pid, signal.SIGSTOP)
        except (PermissionError, ProcessLookupError):
            pytest.skip("the server's processes are not ours to stop")
        try:
            time.sleep(0.5)
            _stopped(process, signal.SIGINT, recorded=True)
        finally:
            os.kill(pid, signal.SIGCONT)
    wait_unlocked(place)
    place.load("Slow")
    compare(place, "public.slow", "analytics_raw.slow", "id, at")


def test_a_job_in_the_background_goes_on_ignoring_ctrl_c(place: Workplace) -> None:
    slow_table(place, 60)
    shell = shutil.which("sh")
    assert shell
    command = f"trap '' INT; exec {sys.executable} -m exporter load Slow --json"
    with subprocess.Popen(
        [shell, "-c", command],
        cwd=place.folder,
        env={**place.environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        copying = "select 1 from pg_stat_activity where query like 'copy%pg_sleep%'"
        until(lambda: bool(place.query(place.core, copying)) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert '"rows_written": 60' in out


def test_a_signal_while_a_load_waits_to_try_again(place: Workplace, relay: Relay) -> None:
    """In a thread, where no signal is raised."""
    slow_table(place, 400)
    url = relay.url(place.core)
    with started(place, "load", "-j", "2", DATABASE_URL_CORE=url, BATCH_SIZE="10") as process:
        copying = "select 1 from pg_stat_activity where query like 'copy%pg_sleep%'"
        until(lambda: bool(place.query(place.core, copying)) or process.poll() is not None)
        relay.close()  # nobody listens any more
        time.sleep(6)  # the waits have grown by then
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 143, said
    assert time.monotonic() - began < 3
    assert said.splitlines()[-1] == "exporter: Slow: interrupted by SIGTERM"


def test_keys_are_of_one_table_though_they_look_elsewhere(place: Workplace) -> None:
    """A session that has looked further for one definition does not for the next."""
    place.define(
        ITEM.replace("table: item", "table: items"),
        ITEM.replace("Item", "Other").replace("name: item", "name: other"),
    )
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz default now());"
        "create view items as select * from item; insert into item values (1);"
        "create table caught (name text);"
        "create function public.format(text, bigint, integer, oid) returns text language sql"
        " as $$ insert into caught values ('format') returning 'x' $$",
    )
    assert place.run("exporter", "load").returncode == 0
    assert place.query(place.core, "select * from caught") == []
