"""A load of a slot beforehand and afterwards: the dry run, the positions, what people are told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import Workplace, as_role
from tests.helpers.changes import by_ranges, define, results, same, slots, two_tables
from tests.monitoring.test_notify import Receiver, receiver

__all__ = ["receiver"]
FIRST = {True: "first load", False: "full refresh"}  # the path of a first copy
_STATE = "select md5(string_agg(t::text || xmin, ',' order by t::text)) from analytics_raw.{} t"


@pytest.fixture
def two(place: Workplace) -> Workplace:
    """Two tables that are going to share a slot."""
    two_tables(place)
    return place


def _rehearsed(place: Workplace, *words: str) -> dict[str, dict[str, Any]]:
    """What a dry run says; checked that it leaves everything as it was."""
    before = _everything(place)
    done = place.run("exporter", "load", "--dry-run", "--json", *words)
    assert done.returncode == 0, done.stderr
    people = place.run("exporter", "load", "--dry-run", *words)
    assert people.returncode == 0, people.stderr
    assert _everything(place) == before
    found = {one["key"]: one for one in map(json.loads, done.stdout.splitlines())}
    for key in found:
        assert f"\n{key}: " in people.stdout
    return found


def _everything(place: Workplace) -> list[Any]:
    """What a load, or who reads a slot, could leave behind."""
    found: list[Any] = place.query(
        place.core,
        "select slot_name, confirmed_flush_lsn, restart_lsn, catalog_xmin"
        " from pg_replication_slots where database = current_database()",
    )
    found += place.query(place.core, "select pubname, tablename from pg_publication_tables")
    names = place.query(
        place.analytics,
        "select relname, c.oid from pg_class c where relnamespace ="
        " to_regnamespace('analytics_raw') and relkind = 'r' order by 1",
    )
    for name, oid in names:
        found += [oid, *place.query(place.analytics, _STATE.format(name))]
    return found


def test_a_dry_run_before_the_first_load(two: Workplace) -> None:
    said = _rehearsed(two)
    assert set(said) == {"a", "b"}
    for key, one in said.items():
        slot = one["slot"]
        assert (slot["made"], slot["why"], slot["bytes"]) == (True, "there is none yet", None)
        assert slot["publication"][0].startswith("create publication ")
        assert (one["path"], one["why_copied"]) == (
            FIRST[by_ranges(two)],
            "its rows are copied, then its changes follow",
        )
        assert one["changes"][0].startswith(f'create table "analytics_raw"."{key}"')
        assert len(two.query(two.core, one["source"][0])) == 20
    assert slots(two) == []
    assert results(two)["a"]["rows_written"] == 20


def test_a_dry_run_says_what_the_load_then_does(two: Workplace) -> None:
    results(two)
    two.query(two.core, "delete from a where id = 1; update b set v = 0")
    said = _rehearsed(two, "a")
    assert set(said) == {"a", "b"}  # a slot is read for all of its tables
    name = slots(two)[0][0]
    for one in said.values():
        slot = one["slot"]
        assert (slot["name"], slot["made"], slot["publication"]) == (name, False, [])
        assert 0 < slot["bytes"] < 1024**2
        assert (one["path"], one["why_copied"], one["source"]) == ("changes", None, [])
        assert one["cursor"]["value"]
    found = results(two)
    assert (found["a"]["rows_deleted"], found["b"]["rows_written"]) == (1, 20)
    # A table that joins, one that leaves, and one that is asked for anew.
    two.query(two.core, "create table c (id int primary key); insert into c values (1)")
    define(two, "a", "c")
    said = _rehearsed(two)
    assert said["c"]["path"] == FIRST[by_ranges(two)]
    assert said["a"]["path"] == "changes"
    statements = said["a"]["slot"]["publication"]
    assert [one.partition(name)[2] for one in statements] == [
        '" drop table "public"."b"',
        '" add table "public"."c"',
    ]
    said = _rehearsed(two, "--full-refresh", "a")
    assert (said["a"]["path"], said["a"]["why_copied"]) == (
        "full refresh",
        "--full-refresh asks for it",
    )


@pytest.mark.parametrize(
    ("at", "statement", "slot", "table"),
    [
        ("core", "select pg_drop_replication_slot('{}')", "is not at the source any more", ""),
        ("core", "alter publication {} drop table a", None, ""),
        ("core", "alter table a alter v type bigint", None, "public.a was written anew"),
        ("analytics", "drop table analytics_raw.a", None, "raw has no row"),
        ("analytics", "update analytics_raw._exporter_slots set timeline = 7", "timeline 7", ""),
    ],
)
def test_a_dry_run_says_why_a_table_is_copied(
    two: Workplace, at: str, statement: str, slot: str | None, table: str
) -> None:
    results(two)
    two.query(two.core, "delete from a where id = 2")
    two.query(getattr(two, at), statement.format(slots(two)[0][0]))
    said = _rehearsed(two)
    assert bool(said["a"]["slot"]["made"]) is bool(slot)
    assert (slot or "") in (said["a"]["slot"]["why"] or "")
    assert said["a"]["why_copied"]
    assert table in said["a"]["why_copied"]
    assert bool(said["b"]["why_copied"]) is bool(slot)
    done = two.run("exporter", "load", "--json")
    found = {one["key"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert found["a"]["rows_read"] == 19
    assert found["b"]["rows_read"] == (20 if slot else 0)
    # And what the load itself tells, it tells once.
    told = found["a"]["notices"] + found["b"]["notices"]
    assert len(told) == len(set(told))
    assert told
    assert (slot or table or "was not in the publication") in str(told)
    same(two, "a", "b")


def test_a_dry_run_that_a_load_would_refuse(two: Workplace) -> None:
    two.query(two.core, "alter table b replica identity nothing")
    done = two.run("exporter", "load", "--dry-run")
    assert done.returncode == 1
    assert "replica identity of public.b" in done.stderr


def test_messages_name_what_became_of_the_slot(two: Workplace, receiver: Receiver) -> None:
    done = two.run("exporter", "load", "--json", **receiver.environment)
    assert done.returncode == 0, done.stderr
    name = slots(two)[0][0]
    made = f"made the slot and the publication {name}"
    (message,) = receiver.messages
    assert message.startswith(":warning: *exporter load ended with a warning*")
    assert message.count(made) == 1
    told = [one for line in done.stdout.splitlines() for one in json.loads(line)["notices"]]
    assert [one.startswith(made) for one in told] == [True]
    two.query(two.core, f"select pg_drop_replication_slot('{name}')")
    two.load(**receiver.environment)
    message = receiver.messages[-1]
    assert message.count(f"the slot {name} is not at the source any more") == 1
    assert message.count(made) == 1
    two.query(two.core, f"alter publication {name} drop table b; delete from b where id = 1")
    two.load(**receiver.environment)
    assert receiver.messages[-1].count(f"was not in the publication {name}") == 1
    two.load(**receiver.environment)
    assert receiver.messages[-1].startswith(":white_check_mark:")
    same(two, "a", "b")


def test_stored_positions(two: Workplace) -> None:
    results(two)
    name = slots(two)[0][0]
    shown = two.run("exporter", "state", "show").stdout
    assert shown.count(f"of the WAL, from {name}") == 2
    told = [
        json.loads(line)
        for line in two.run("exporter", "state", "show", "--json").stdout.splitlines()
    ]
    assert [one["slot"] for one in told] == [name, name]
    done = two.run("exporter", "state", "set", "a", "0/1")
    assert done.returncode == 2
    assert "a is read by its changes: its position is that of the slot" in done.stderr
    # Forgotten, or bound anew, a position is that of a table that is copied again.
    for words, said in (
        (("reset", "a"), "a: nothing yet; the next load reads everything"),
        (("adopt", "b"), "b: is copied again by the next load, then its changes follow"),
    ):
        done = two.run("exporter", "state", *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout
        two.query(two.core, "delete from a where id = 3; update b set v = 7 where id = 3")
        assert results(two)[words[1]]["rows_read"] >= 19
        same(two, "a", "b")
    two.query(two.core, "delete from a where id = 4")
    found = results(two)["a"]
    assert (found["rows_deleted"], found["notices"]) == (1, [])


def test_an_owner_makes_the_publication(two: Workplace) -> None:
    """For a role that does not own the tables; what the load prints is what helps."""
    role = two.core.rpartition("/")[2].partition("?")[0]
    two.query(
        two.core,
        f"create role {role} login replication password 'secret'; grant select on a, b to {role}",
    )
    try:
        core = as_role(two.core, role)
        done = two.run("exporter", "load", DATABASE_URL_CORE=core)
        assert done.returncode == 1
        statement = done.stderr.partition("as the owner of the tables: ")[2].splitlines()[0]
        assert statement.startswith("create publication")
        two.query(two.core, statement)
        for _ in range(2):
            done = two.run("exporter", "load", DATABASE_URL_CORE=core)
            assert done.returncode == 0, done.stderr
            same(two, "a", "b")
            two.query(two.core, "delete from a where id < 4; update b set v = -v")
        # A slot that is lost does not take the owner's work with it.
        two.query(two.core, f"select pg_drop_replication_slot('{slots(two)[0][0]}')")
        done = two.run("exporter", "load", DATABASE_URL_CORE=core)
        assert done.returncode == 0, done.stderr
        same(two, "a", "b")
        checked = two.run("exporter", "check", DATABASE_URL_CORE=core)
        assert "sends 2 tables" in checked.stdout
    finally:
        two.query(two.core, f"drop owned by {role}; drop role {role}")


def test_destinations_that_are_copies_of_each_other_part(two: Workplace) -> None:
    """They know one slot at first; none must take the other's for its own, load after load."""
    results(two)
    name = two.analytics.rpartition("/")[2].partition("?")[0]
    server = two.analytics.replace(f"/{name}", "/postgres")
    two.query(server, f"create database {name}_copy template {name}")
    copy = two.analytics.replace(f"/{name}", f"/{name}_copy")
    try:
        for number in range(1, 6):
            two.query(two.core, f"delete from a where id = {number}")
            for url in (two.analytics, copy):
                done = two.run("exporter", "load", DATABASE_URL_ANALYTICS=url)
                assert done.returncode == 0, done.stderr
                assert two.query(url, "select min(id) from analytics_raw.a") == [(number + 1,)]
                assert number < 3 or "is made anew" not in done.stderr
    finally:
        two.query(server, f"drop database {name}_copy with (force)")
