"""What people are told of change capture: how far behind a slot is, and what is amiss."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client.openmetrics import parser

from exporter.demo import embedded
from exporter.demo.embedded import running_server
from exporter.monitoring import metrics
from exporter.monitoring import slots as monitored
from tests.conftest import Workplace, as_role, empty_project
from tests.helpers.changes import define, refused, results, same, slots, two_tables
from tests.helpers.processes import start_load

WAL = (
    "create table filler_{0} as select repeat(md5(i::text), 9) as a from generate_series(1, {1}) i"
)
MB = 1024**2
SCANNED = """
- name: a
  config: {meta: {exporter: {key: a, source: {table: a, read: scan}}}}
"""


@pytest.fixture
def two(place: Workplace) -> Workplace:
    """Two tables of one slot, copied."""
    _two_tables(place)
    return place


def _two_tables(place: Workplace) -> None:
    two_tables(place)
    results(place)


def _told(place: Workplace, *words: str, status: int = 0, **env: str) -> list[dict[str, Any]]:
    done = place.run("exporter", *words, "--json", **env)
    assert done.returncode == status, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _checked(place: Workplace, status: int = 0, **env: str) -> list[tuple[str, str, str, str]]:
    found = _told(place, "check", status=status, **env)
    return [(it["status"], it["subject"], it["check"], it["message"]) for it in found]


def _slot(place: Workplace) -> str:
    return str(slots(place)[0][0])


def test_how_far_behind_a_slot_is(two: Workplace) -> None:
    two.query(two.core, WAL.format(1, 50_000))
    two.query(two.core, "update a set v = 0")
    for one in _told(two, "status"):
        behind = one["behind"]
        assert (behind["rows"], behind["estimated"]) == (None, False)
        assert 10 * MB < behind["bytes"] < 100 * MB
        assert 0 < behind["seconds"] < 60
    (shown,) = _told(two, "slots", "show")
    assert shown["database"] == two.core.rpartition("/")[2].partition("?")[0]
    assert (shown["slot"], shown["status"]) == (_slot(two), "ok")
    assert shown["tables"] == ["public.a", "public.b"]
    assert 10 * MB < shown["bytes_behind"] <= shown["bytes_held_back"]
    assert 0 < shown["seconds_since_read"] < 60
    for words in (("status",), ("slots", "show")):
        said = two.run("exporter", *words)
        assert " MB" in said.stdout
        assert said.stderr == ""
    results(two)
    assert all(one["behind"]["bytes"] < MB for one in _told(two, "status"))
    (shown,) = _told(two, "slots", "show")
    assert shown["bytes_behind"] < MB


def test_what_has_landed_in_part_does_not_count_as_read(two: Workplace) -> None:
    """Then a change that raw refuses stops each load."""
    last, reached = (
        f"select {column} from analytics_raw._exporter_slots" for column in ("read_at", "lsn")
    )
    two.query(two.core, "alter table b add big text")
    before = two.query(two.analytics, last)
    results(two)
    read, lsn = (two.query(two.analytics, one) for one in (last, reached))
    assert read > before
    two.query(two.analytics, "alter table analytics_raw.a add check (v < 1000)")
    for begin in range(1000, 13000, 2000):  # of which several chunks are made
        two.query(
            two.core,
            "insert into b select i, 5, repeat(md5(i::text), 50)"
            f" from generate_series({begin}, {begin + 1999}) i",
        )
    two.query(two.core, "insert into a values (99999, 5000)")
    refused(two)
    assert two.query(two.analytics, reached) > lsn
    assert two.query(two.analytics, last) == read


def test_a_table_of_an_earlier_version(two: Workplace) -> None:
    two.query(two.analytics, "alter table analytics_raw._exporter_slots drop read_at")
    assert [one["behind"]["seconds"] for one in _told(two, "status")] != []
    assert _told(two, "slots", "show")[0]["read_at"] is None
    assert "has never been read to its end" in str(_checked(two))
    results(two)
    assert _told(two, "slots", "show")[0]["read_at"]


def test_a_slot_that_nobody_reads_for_long(two: Workplace) -> None:
    two.query(
        two.analytics,
        "update analytics_raw._exporter_slots set read_at = now() - interval '2 days 1 hour'",
    )
    said = f"{_slot(two)} was read to its end 2d ago"
    (found,) = [it for it in _told(two, "check") if said in it["message"]]
    assert (found["status"], found["subject"], found["check"]) == ("warn", "core", "slot")
    assert found["fix"] == ["exporter load", f"exporter slots drop {_slot(two)}"]
    assert said in two.run("exporter", "status").stderr
    assert 2 * 86400 < _told(two, "status")[0]["behind"]["seconds"] < 3 * 86400


def test_a_slot_that_no_definition_needs_any_more(two: Workplace) -> None:
    name = _slot(two)
    two.define(SCANNED)
    said = "no definition is read by its changes there any more"
    (found,) = [it for it in _told(two, "check") if said in it["message"]]
    assert found["fix"] == [f"exporter slots drop {name}"]
    done = two.run("exporter", "status")
    assert said in done.stderr
    assert f"exporter slots drop {name}" in done.stderr
    assert _told(two, "slots", "show")[0]["status"] == "not needed"
    assert two.run("exporter", "slots", "drop", name).returncode == 0
    assert slots(two) == []
    assert said not in str(_checked(two)) + two.run("exporter", "status").stderr


def test_a_slot_to_whose_database_no_definition_leads(two: Workplace) -> None:
    two.query(
        two.analytics,
        "insert into analytics_raw._exporter_slots (slot, cluster, database, lsn)"
        " values ('exporter_x_00000000', '1', '5/ledger', '0/1')",
    )
    said = "exporter_x_00000000 keeps WAL for this destination in database ledger"
    assert said in str(_checked(two))
    assert said in two.run("exporter", "status").stderr


def test_a_slot_that_was_dropped_by_hand(two: Workplace) -> None:
    name = _slot(two)
    two.query(two.core, f"select pg_drop_replication_slot('{name}')")
    said = f"{name} is not at the source any more"
    assert said in str(_checked(two))
    assert said in two.run("exporter", "status").stderr


def test_several_sources(two: Workplace) -> None:
    name = two.core.rpartition("/")[2].partition("?")[0]
    two.query(two.core, f"create database {name}_billing")
    billing = two.core.replace(f"/{name}", f"/{name}_billing")
    two.query(billing, "create table c (id int primary key); insert into c values (1)")
    try:
        define(two, "a", "b", "c")
        file = two.folder / "models" / "sources.yml"
        file.write_text(file.read_text().replace("{table: c,", "{table: c, database: BILLING,"))
        found = {one["key"]: one for one in _told(two, "load", DATABASE_URL_BILLING=billing)}
        assert found["c"]["rows_written"] == 1
        two.query(billing, "insert into c values (2)")
        two.query(two.core, "delete from a where id = 1")
        found = {one["key"]: one for one in _told(two, "load", "c", DATABASE_URL_BILLING=billing)}
        assert {key: one["rows_read"] for key, one in found.items()} == {"c": 1}
        shown = _told(two, "slots", "show", DATABASE_URL_BILLING=billing)
        assert {one["database"]: one["tables"] for one in shown} == {
            name: ["public.a", "public.b"],
            f"{name}_billing": ["public.c"],
        }
        told = {it["key"]: it for it in _told(two, "status", DATABASE_URL_BILLING=billing)}
        assert told["c"]["behind"]["bytes"] is not None
        checked = _checked(two, DATABASE_URL_BILLING=billing)
        for subject in ("core", "billing"):
            assert [it for it in checked if it[:3] == ("ok", subject, "slot")], subject
            assert ("ok", subject, "wal_level", "logical") in checked
        # One that is down does not hide the others; nobody thinks that its slot is not needed.
        down = "postgresql://nobody@127.0.0.1:1/none?connect_timeout=1"
        done = two.run("exporter", "slots", "show", DATABASE_URL_BILLING=down)
        assert done.returncode == 1
        assert "public.a" in done.stdout
        assert "DATABASE_URL_BILLING" in done.stderr
        assert "keeps WAL for" not in done.stderr
        # Without a definition that leads there, its URL is asked for, and helps.
        define(two, "a", "b")
        (theirs,) = [one["slot"] for one in shown if one["database"] == f"{name}_billing"]
        done = two.run("exporter", "status")
        assert f"{theirs} keeps WAL for this destination in database {name}_billing" in done.stderr
        assert two.run("exporter", "slots", "drop", theirs).returncode == 2
        done = two.run("exporter", "slots", "drop", theirs, DATABASE_URL_CORE=billing)
        assert done.returncode == 0, done.stderr
        assert two.query(billing, "select count(*) from pg_publication") == [(0,)]
        assert two.run("exporter", "status").stderr == ""
    finally:
        two.query(
            two.core,
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots"
            f" where database = '{name}_billing'",
        )
        two.query(two.core, f"drop database {name}_billing with (force)")


def test_metrics(two: Workplace) -> None:
    file = two.folder / "load.prom"
    two.query(two.core, WAL.format(1, 20_000))
    before = time.time()
    results(two, "--metrics-file", str(file))
    labels = (_slot(two), two.core.rpartition("/")[2].partition("?")[0])
    families, values = _parsed(file)
    for name, meaning in metrics.SLOTS.items():
        assert families[name] == ("gauge", meaning)
    assert 0 <= values["exporter_slot_behind_bytes", labels] < MB
    assert 0 <= values["exporter_slot_held_back_bytes", labels] < 100 * MB
    assert before < values["exporter_slot_read_timestamp_seconds", labels] < time.time()
    assert 0 < values["exporter_slot_seconds_since_read", labels] < 60
    assert values["exporter_slot_lost", labels] == 0
    # A load that fails says how much is left behind, and that the slot is not read.
    read = values["exporter_slot_read_timestamp_seconds", labels]
    two.query(two.analytics, "alter table analytics_raw.a add check (v < 1000)")
    two.query(two.core, WAL.format(2, 20_000))
    two.query(two.core, "insert into a values (99999, 5000)")
    assert refused(two, "--metrics-file", str(file))[0] == 1
    _, values = _parsed(file)
    assert values["exporter_slot_behind_bytes", labels] > 5 * MB
    assert values["exporter_slot_read_timestamp_seconds", labels] == read
    # What is dropped leaves the file.
    two.define(SCANNED)
    assert two.run("exporter", "slots", "drop", labels[0]).returncode == 0
    two.run("exporter", "load", "--metrics-file", str(file))
    assert "exporter_slot" not in file.read_text()


def _parsed(
    file: Path,
) -> tuple[dict[str, tuple[str, str]], dict[tuple[str, tuple[str, ...]], float]]:
    families = list(parser.text_string_to_metric_families(file.read_text()))
    return (
        {one.name: (one.type, one.documentation) for one in families},
        {
            (it.name, tuple(it.labels[name] for name in ("slot", "database"))): it.value
            for one in families
            for it in one.samples
            if "slot" in it.labels
        },
    )


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[Workplace]:
    """A server with few slots that gives up those which nobody reads."""
    settings = {
        "wal_level": "logical",
        "max_slot_wal_keep_size": "20MB",
        "max_wal_size": "40MB",
        "min_wal_size": "32MB",
        "max_replication_slots": "2",
        "max_wal_senders": "2",
        "fsync": "off",
    }
    with running_server(settings) as server:
        url = server.url("postgres")
        yield from empty_project((url, url), tmp_path)


def test_what_a_source_needs_and_keeps(tight: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tight
    for name in ("one", "two"):
        place.query(
            place.core, f"select pg_create_logical_replication_slot('exporter_{name}', 'pgoutput')"
        )
    place.query(place.core, "create table a (id int primary key, v int); insert into a values (1)")
    define(place, "a")
    role = place.core.rpartition("/")[2].partition("?")[0]
    place.query(place.core, f"create role {role} login password 'x'; grant select on a to {role}")
    core = as_role(place.core, role)
    found = _told(place, "check", status=1, DATABASE_URL_CORE=core)
    told = {(it["status"], it["check"]): it for it in found if it["subject"] == "core"}
    assert "2 of 2 (max_replication_slots)" in told["fail", "slots"]["message"]
    assert told["fail", "replication"]["fix"] == [f"alter role {role} replication"]
    place.query(place.core, told["fail", "replication"]["fix"][0])
    assert "0 of 2 (max_wal_senders)" in told["ok", "wal senders"]["message"]
    assert "20 MB at most" in told["ok", "wal kept"]["message"]
    assert told["ok", "wal_level"]["message"] == "logical"
    found = _told(place, "check", status=1, DATABASE_URL_CORE=core)
    told = {(it["status"], it["check"]): it for it in found if it["subject"] == "core"}
    assert ("ok", "replication") in told
    assert "own public.a" in told["fail", "publication"]["message"]
    # Of another destination: said once it keeps much.
    assert "is of another destination" in told["ok", "slot"]["message"]
    place.query(place.core, WAL.format(0, 40_000))
    checked = [it for it in _checked(place, 1) if it[2] == "slot"]
    assert {it[0] for it in checked} == {"warn"}
    assert "exporter_one is of another destination, or of this one before" in str(checked)
    for name in ("one", "two"):
        done = place.run("exporter", "slots", "drop", f"exporter_{name}")
        assert done.returncode == 0, done.stderr
    results(place)
    assert ("ok", "a", "replica identity", "has id") in _checked(place)
    # A slot that holds back much, and then one that is lost.
    place.query(place.core, WAL.format(1, 40_000))
    name = _slot(place)
    (found,) = [it for it in _told(place, "check") if it["check"] == "slot"]
    assert found["status"] == "warn"
    assert f"{name} holds back" in found["message"]
    for number in (2, 3, 4):
        place.query(place.core, WAL.format(number, 90_000))
        place.query(place.core, "checkpoint")
    for words in (("check",), ("status",), ("slots", "show")):
        done = place.run("exporter", *words)
        assert f"{name} is lost" in " ".join((done.stdout + done.stderr).split()), words
    assert _told(place, "slots", "show")[0]["status"] == "lost"
    file = place.folder / "x.prom"
    for variable, value in place.environment.items():
        monkeypatch.setenv(variable, value)
    overview = monitored.current({"DATABASE_URL_CORE": True}, pytest.fail)
    metrics.write(file, [], overview.slots, time.time())
    _, values = _parsed(file)
    assert [v for (one, _), v in values.items() if one == "exporter_slot_lost"] == [1]
    results(place)
    assert _told(place, "slots", "show")[0]["status"] == "ok"


def test_what_amazon_calls_the_right(tight: Workplace) -> None:
    """There no role has the attribute: it is a member of one that has."""
    place = tight
    place.query(place.core, "create table a (id int primary key)")
    define(place, "a")
    role = place.core.rpartition("/")[2].partition("?")[0]
    place.query(
        place.core,
        f"create role {role} login password 'x'; create role rds_replication;"
        f" alter table a owner to {role};"
        f" grant create on database {role} to {role}",
    )
    core = as_role(place.core, role)
    found = _told(place, "check", status=1, DATABASE_URL_CORE=core)
    told = {(it["status"], it["check"]): it for it in found if it["subject"] == "core"}
    assert told["fail", "replication"]["fix"] == [f"grant rds_replication to {role}"]
    place.query(place.core, told["fail", "replication"]["fix"][0])
    assert ("ok", "core", "replication", "the role may read a slot") in _checked(
        place, DATABASE_URL_CORE=core
    )


@pytest.fixture
def newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    """A project on the newest PostgreSQL of this machine, which has failover slots from 17 on."""
    folder = list(embedded._candidates())[-1]
    monkeypatch.setenv("EXPORTER_PG_BIN", str(folder))
    with running_server({"wal_level": "logical", "fsync": "off"}) as server:
        with psycopg.connect(server.url("postgres")) as session:
            if session.info.server_version < 170000:
                pytest.skip("no PostgreSQL 17 or newer here")
        url = server.url("postgres")
        yield from empty_project((url, url), tmp_path)


def test_a_standby_may_take_the_slot_over(newest: Workplace) -> None:
    """And nobody has to have one: a load does not wait for it."""
    _two_tables(newest)
    assert newest.query(newest.core, "select failover from pg_replication_slots") == [(True,)]
    newest.query(newest.core, "delete from a where id > 15; update b set v = 0")
    results(newest)
    same(newest, "a", "b")
    assert newest.run("exporter", "status").stderr == ""
    # Where the source waits for one, it gives out no change before: that is no silent wait.
    newest.query(newest.core, "alter system set synchronized_standby_slots = 'other, \"west\"'")
    newest.query(newest.core, "select pg_reload_conf(); delete from a where id = 1")
    assert "none reads other, west" in refused(newest)[1]
    assert "loads wait for the standby of other, west" in str(_checked(newest, 1))
    newest.query(newest.core, "select pg_create_physical_replication_slot('slow', true)")
    newest.query(newest.core, "alter system set synchronized_standby_slots = 'slow'")
    lsn = newest.query(newest.core, "select pg_reload_conf(), pg_current_wal_lsn()")[0][1]
    reader = psycopg.pq.PGconn.connect(f"{newest.core}&replication=true".encode())
    reader.send_query(f"START_REPLICATION SLOT slow {lsn}".encode())
    newest.query(newest.core, "delete from a where id = 2")
    process = start_load(newest)
    assert process.stderr
    assert select.select([process.stderr], [], [], 30)[0]
    assert "waits for the standby of slow" in process.stderr.readline()
    newest.query(newest.core, "alter system reset synchronized_standby_slots")
    newest.query(newest.core, "select pg_reload_conf()")
    _, err = process.communicate(timeout=60)
    reader.finish()
    assert process.returncode == 0, err
    same(newest, "a", "b")


def test_a_slot_that_the_last_definition_of_all_left_behind(place: Workplace) -> None:
    place.query(place.core, "create table one (id int primary key)")
    define(place, "one")
    results(place)
    place.define()
    said = " ".join(place.run("exporter", "check").stdout.split())
    assert "holds back" in said
    assert f"→ exporter slots drop {slots(place)[0][0]}" in said
