"""Change capture, its servers and what stands before them: crashes, and what they do not give."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from exporter.demo.embedded import Server, running_server
from exporter.errors import SourceError
from exporter.source import slots as source_slots
from exporter.wire import connect
from exporter.wire.replication import lsn_number
from tests.conftest import Workplace, empty_project
from tests.helpers.changes import define, refused, results, same, slots
from tests.helpers.processes import start_load, wait_unlocked
from tests.load.test_changes_stress import SCHEMA, TABLES, Writers
from tests.wire.test_sessions import _pooled, bouncer

__all__ = ["bouncer"]
THING = "create table thing (id int primary key, a text); insert into thing values (1, 'a')"
LOGICAL = {"wal_level": "logical", "fsync": "off"}
# What is committed without waiting for the disk is not there soon.
LAZY = {"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB", "wal_buffers": "64MB"}


# -- crashes


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Server, Server, Workplace]]:
    """A source and a destination, each a server of its own."""
    with (
        running_server({**LOGICAL, "max_prepared_transactions": "4"}) as source,
        running_server({"fsync": "off", **LAZY}) as destination,
    ):
        urls = source.url("postgres"), destination.url("postgres")
        for place in empty_project(urls, tmp_path):
            yield source, destination, place


@pytest.mark.parametrize("rounds", [2, pytest.param(12, marks=pytest.mark.long)])
def test_both_servers_crash_at_once(two: tuple[Server, Server, Workplace], rounds: int) -> None:
    source, destination, place = two
    place.query(place.core, SCHEMA)
    define(place, *TABLES, indexed="conflict_columns: [code]")
    results(place)
    writers = Writers(place, 2)
    try:
        for number in range(rounds):
            time.sleep(0.5)
            process = start_load(place)
            time.sleep(0.7 + 0.13 * number)
            destination.stop("immediate")
            source.stop("immediate")
            process.kill()
            process.communicate()
            source.start()
            destination.start()
    finally:
        writers.stop()
    wait_unlocked(place)
    results(place)
    same(place, *TABLES)


def test_what_the_source_forgets_is_on_disk(two: tuple[Server, Server, Workplace]) -> None:
    """Whatever the role says: what is committed without waiting for it is lost in this crash."""
    _, destination, place = two
    place.query(place.core, THING)
    place.query(place.analytics, "create table marker (a int)")
    place.query(place.analytics, "alter role postgres set synchronous_commit = off; checkpoint")
    define(place, "thing")
    results(place)
    place.query(place.core, "insert into thing values (2, 'b'); delete from thing where id = 1")
    stored = "select lsn from analytics_raw._exporter_slots"
    results(place)
    before = place.query(place.analytics, stored)
    place.query(place.analytics, "insert into marker values (1)")
    destination.stop("immediate")
    destination.start()
    assert place.query(place.analytics, "table marker") == []
    assert place.query(place.analytics, stored) == before
    same(place, "thing")


def test_a_crash_loses_nothing_that_was_confirmed(two: tuple[Server, Server, Workplace]) -> None:
    """Most commits of a load do not wait for the disk: the source keeps what they have."""
    _, destination, place = two
    place.query(place.core, THING)
    define(place, "thing")
    results(place)
    place.query(
        place.core,
        "do $$ begin for n in 1 .. 12 loop insert into thing"
        " select 10000 * n + i, repeat('a', 350) from generate_series(0, 9999) i; commit;"
        " end loop; end $$",
    )
    stored = "select lsn::text from analytics_raw._exporter_slots"
    seen = place.query(place.analytics, stored)
    process = start_load(place)
    for _ in range(2):
        before = seen
        while (seen := place.query(place.analytics, stored)) == before:
            assert process.poll() is None
    destination.stop("immediate")
    process.kill()
    process.communicate()
    destination.start()
    wait_unlocked(place)
    lost = lsn_number(place.query(place.analytics, stored)[0][0])
    assert lost < lsn_number(seen[0][0])
    confirmed = "select confirmed_flush_lsn::text from pg_replication_slots"
    assert lsn_number(place.query(place.core, confirmed)[0][0]) <= lost
    assert results(place)["thing"]["status"] == "ok"
    same(place, "thing")


def test_a_source_that_forgot_what_was_confirmed(two: tuple[Server, Server, Workplace]) -> None:
    """A slot is written to disk now and then: what it sends again has landed."""
    source, _, place = two
    place.query(place.core, THING)
    define(place, "thing")
    results(place)
    for statement in ("insert into thing values (2, 'b')", "update thing set a = 'c'"):
        place.query(place.core, statement)
        results(place)
    source.stop("immediate")
    source.start()
    confirmed = place.query(
        place.core, "select confirmed_flush_lsn::text from pg_replication_slots"
    )
    stored = place.query(place.analytics, "select lsn::text from analytics_raw._exporter_slots")
    assert lsn_number(confirmed[0][0]) < lsn_number(stored[0][0])
    found = results(place)["thing"]
    assert (found["rows_read"], found["rows_deleted"]) == (0, 0)
    same(place, "thing")


def test_wal_that_nobody_writes_to_disk(two: tuple[Server, Server, Workplace]) -> None:
    """What a reader tidies up stays in memory until it ends, or somebody commits."""
    _, _, place = two
    place.query(place.core, THING)
    define(place, "thing")
    results(place)
    place.query(place.core, "insert into thing values (2, 'b')")
    with psycopg.connect(place.core) as reader:
        reader.execute("select pg_logical_emit_message(false, 'test', repeat('a', 100))")
        assert results(place)["thing"]["rows_read"] == 1
    same(place, "thing")


# -- what a server does not give


@pytest.fixture
def scarce(tmp_path: Path) -> Iterator[Workplace]:
    """A server with one slot and one sender."""
    with running_server({**LOGICAL, "max_replication_slots": "1", "max_wal_senders": "1"}) as one:
        url = one.url("postgres")
        yield from empty_project((url, url), tmp_path)


def test_no_slot_and_no_sender_is_left(scarce: Workplace) -> None:
    place = scarce
    place.query(place.core, THING)
    define(place, "thing")
    sender = psycopg.pq.PGconn.connect(f"{place.core}&replication=database".encode())
    status, said = refused(place)
    assert status == 1
    assert "raise max_wal_senders" in said
    assert slots(place) == []
    sender.finish()
    place.query(place.core, "select pg_create_physical_replication_slot('other')")
    try:
        status, said = refused(place)
        assert status == 1
        assert "raise max_replication_slots" in said
        assert slots(place) == []
    finally:
        place.query(place.core, "select pg_drop_replication_slot('other')")
    results(place)
    same(place, "thing")


def test_a_slot_of_our_name_that_somebody_else_made(place: Workplace) -> None:
    place.query(place.core, THING)
    define(place, "thing")
    results(place)
    name = slots(place)[0][0]
    place.query(place.core, f"select pg_drop_replication_slot('{name}')")
    try:
        place.query(
            place.core, f"select pg_create_logical_replication_slot('{name}', 'test_decoding')"
        )
    except psycopg.errors.UndefinedFile:
        pytest.skip("this server has no test_decoding")
    status, said = refused(place)
    assert status == 1
    assert "its plugin is test_decoding" in said
    assert f"select pg_drop_replication_slot('{name}')" in said
    assert (name,) in slots(place)


@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_a_pooler_does_not_lead_to_a_slot(
    place: Workplace, bouncer: tuple[Path, int], mode: str
) -> None:
    place.query(place.core, THING)
    define(place, "thing")
    direct = place.core
    with _pooled(bouncer, place.core, mode) as place.core:
        status, said = refused(place)
        assert status == 1
        assert "pooler" in said
        assert "name the server itself" in said
    place.core = direct
    assert slots(place) == []


def test_a_prepared_transaction_that_stays_open(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making a slot waits for it, and a copy does: not for ever, and it is named."""
    monkeypatch.setenv("DATABASE_URL_CORE", place.core)
    monkeypatch.setattr(source_slots, "_WAIT", 1.5)
    monkeypatch.setattr(source_slots, "_TELL", 0.5)
    place.query(place.core, THING)
    with psycopg.connect(place.core, autocommit=True) as writer, connect("DATABASE_URL_CORE") as s:
        writer.execute("begin; insert into thing values (7, 'open'); prepare transaction 'two'")
        told: list[str] = []
        try:
            for wait in (
                lambda: source_slots.make(s, "exporter_prepared", told.append),
                lambda: source_slots.await_writers(s, told.append),
            ):
                with pytest.raises(SourceError, match="the prepared transaction two did not end"):
                    wait()
        finally:
            writer.execute("rollback prepared 'two'")
        assert len(told) == 2
        source_slots.drop(s, "exporter_prepared")
