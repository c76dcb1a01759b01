"""Rows that are gone at the source: marked or removed, and alive again when they come back."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from exporter.demo.embedded import Server, running_server
from tests.conftest import Workplace, compare
from tests.helpers.tables import ITEM as SMALL
from tests.helpers.verdicts import named, verify

RAW = "analytics_raw.item"
# A scan looks for them by itself: see tests/source/test_scan.py.
ITEM = SMALL.replace("table: item", "table: item\n          read: cursor")
MARK = ITEM.rstrip() + "\n        deletes: mark\n"
REMOVE = ITEM.rstrip() + "\n        deletes: remove\n"
FREEZE = "        schema: freeze\n"


def _items(place: Workplace, definition: str, rows: int = 20) -> Workplace:
    place.define(definition)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null default now(), v text);"
        f"insert into item (id, v) select n, 'v' || n from generate_series(1, {rows}) n;"
        "create index on item (at, id)",
    )
    place.load("Item")
    return place


def _marked(place: Workplace) -> list[int]:
    found = place.query(
        place.analytics,
        f"select id, _deleted_at = _exported_at from {RAW} where _deleted_at is not null"
        " order by id",
    )
    assert all(same for _, same in found)
    return [id for id, _ in found]


def test_a_row_that_comes_back_is_alive_again(place: Workplace) -> None:
    _items(place, MARK)
    place.query(place.analytics, f"update {RAW} set _deleted_at = _exported_at where id in (3, 4)")
    before = place.query(place.analytics, f"select max(_exported_at) from {RAW}")
    place.query(place.core, "update item set at = now() where id = 3")  # an ordinary load sees it
    place.load("Item")
    assert _marked(place) == [4]
    assert place.load("Item", "--since", "2000-01-01")["rows_written"] == 1
    assert _marked(place) == []
    assert place.query(place.analytics, f"select max(_exported_at) from {RAW}") > before


def test_a_full_refresh_marks_what_is_gone(place: Workplace) -> None:
    _items(place, MARK)
    place.query(place.analytics, f"update {RAW} set _deleted_at = _exported_at where id = 9")
    place.query(place.core, "delete from item where id in (1, 2)")
    assert place.load("Item", "--full-refresh", "--max-deletes", "100")["rows_deleted"] == 2
    assert _marked(place) == [1, 2]
    stamps = f"select _deleted_at from {RAW} where id = 1"
    first = place.query(place.analytics, stamps)
    assert place.load("Item", "--full-refresh", "--max-deletes", "100")["rows_deleted"] == 0
    assert place.query(place.analytics, stamps) == first
    place.query(place.core, "insert into item values (1, now(), 'back')")
    place.load("Item", "--full-refresh", "--max-deletes", "100")
    assert _marked(place) == [2]


def test_the_column_is_added_when_it_is_asked_for(place: Workplace) -> None:
    _items(place, ITEM)
    place.define(MARK + FREEZE)
    done = place.run("exporter", "load", "Item")
    assert done.returncode == 1
    assert 'alter table "analytics_raw"."item" add column "_deleted_at" timestamptz' in done.stderr
    place.define(MARK)
    done = place.run("exporter", "load", "Item")
    assert "has _deleted_at from now on" in done.stderr
    assert "_deleted_at" not in place.run("exporter", "load", "Item").stderr
    place.query(place.analytics, f"update {RAW} set _deleted_at = now() where id = 3")
    place.define(ITEM)  # what is left of it does not hide a row that is there
    place.query(place.core, "update item set at = now() where id = 3")
    place.load("Item")
    assert _marked(place) == []


def test_a_source_with_a_column_of_that_name(place: Workplace) -> None:
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz not null, _deleted_at timestamptz);"
        "insert into item values (1, now(), '2020-01-01')",
    )
    place.load("Item")
    place.query(place.core, "update item set at = now()")
    place.load("Item")
    compare(place, "public.item", RAW, "id, at, _deleted_at")
    place.define(MARK)
    done = place.run("exporter", "load", "Item")
    assert done.returncode == 1
    assert "exporter.source.exclude: [_deleted_at]" in done.stderr


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        (MARK.replace("mark", "maybe"), "exporter.deletes must be one of ignore, mark, remove"),
        (MARK.replace("        conflict_columns: [id]\n", ""), "exporter.deletes must be ignore"),
    ],
)
def test_a_wrong_key_is_refused(place: Workplace, definition: str, said: str) -> None:
    place.define(definition)
    done = place.run("exporter", "load")
    assert done.returncode == 2
    assert said in done.stderr


def test_reconcile_marks_what_is_gone(place: Workplace) -> None:
    _items(place, MARK)
    place.query(place.core, "delete from item where id in (4, 5)")
    place.query(place.core, "insert into item (id, v) values (21, 'new')")
    assert place.load("Item")["rows_deleted"] == 0  # not without being asked to
    assert named(verify(place, "Item", status=1)) == [("extra", "4", []), ("extra", "5", [])]
    done = place.load("Item", "--reconcile")
    assert (done["rows_read"], done["rows_deleted"]) == (0, 2)
    assert _marked(place) == [4, 5]
    assert verify(place, "Item")["status"] == "equal"
    assert place.load("Item", "--reconcile")["rows_deleted"] == 0
    assert place.query(
        place.analytics,
        "select command, status, rows_deleted from analytics_raw._exporter_runs order by id",
    )[-2:] == [("load --reconcile", "ok", 2), ("load --reconcile", "ok", 0)]
    place.query(place.core, "insert into item (id, v) values (4, 'back')")
    place.load("Item")
    assert _marked(place) == [5]
    place.query(place.core, "insert into item values (5, '2020-01-01', 'back, dated back')")
    assert named(verify(place, "Item", status=1)) == [("missing", "5", [])]
    assert verify(place, "Item", "--repair")["status"] == "repaired"
    compare(place, "public.item", RAW, "id, at, v")
    assert _marked(place) == []


def test_reconcile_removes_what_is_gone(place: Workplace) -> None:
    _items(place, REMOVE, rows=3000)
    place.query(place.core, "delete from item where id % 11 = 0")
    place.query(place.core, "update item set id = 5000 where id = 7")  # its old key is gone, too
    counts = set()
    process = subprocess.Popen(
        [sys.executable, "-m", "exporter", "load", "--reconcile"],
        cwd=place.folder,
        env=place.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    with psycopg.connect(place.analytics, autocommit=True) as reader:
        while process.poll() is None:
            row = reader.execute(f"select count(*) from {RAW}".encode()).fetchone()
            counts.add(row[0] if row else None)
            time.sleep(0.005)
    assert "273 deleted" in process.communicate()[0]
    assert counts <= {3000, 3001, 2728}  # before; with 5000; and without what is gone
    compare(place, "public.item", RAW)


@pytest.mark.parametrize("definition", [MARK, REMOVE])
def test_a_share_is_the_most_that_goes(place: Workplace, definition: str) -> None:
    _items(place, definition)
    place.query(place.core, "delete from item where id <= 3; insert into item values (21, now())")
    done = place.run("exporter", "load", "Item", "--reconcile")
    assert done.returncode == 1
    assert "3 of the 21 rows of raw (14 %) are gone at the source" in done.stderr
    assert "exporter load Item --reconcile --max-deletes 15" in done.stderr
    assert place.query(place.analytics, f"select count(*) from {RAW}") == [(21,)]  # the new one
    assert place.query(
        place.analytics,
        "select status, rows_deleted from analytics_raw._exporter_runs order by id desc limit 1",
    ) == [("failed", 0)]
    assert place.load("Item", "--reconcile", "--max-deletes", "15")["rows_deleted"] == 3
    for command, flag in (("load", "--reconcile"), ("verify", "--repair")):
        done = place.run("exporter", command, "Item", "--max-deletes", "15")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"--max-deletes goes with {flag}" in done.stderr
    place.query(place.core, "truncate item")  # by accident
    for words in (("load", "Item", "--reconcile"), ("verify", "Item", "--repair")):
        done = place.run("exporter", *words)
        assert done.returncode == 1
        assert "18 of the 18 rows of raw (100 %)" in done.stderr
        assert f"exporter {' '.join(words)} --max-deletes 100" in done.stderr
    assert verify(place, "Item", status=1)["extra"] == 18
    done = verify(place, "Item", "--repair", "--max-deletes", "100")
    assert (done["status"], done["deleted"]) == ("repaired", 18)


def test_reconcile_needs_to_be_declared(place: Workplace) -> None:
    _items(place, ITEM)
    for words in ((), ("Item",)):
        done = place.run("exporter", "load", "--reconcile", *words)
        assert done.returncode == 2
        assert "exporter.deletes is ignore" in done.stderr
    other = REMOVE.replace("name: item", "name: other").replace("key: Item", "key: Other")
    place.define(ITEM, other)
    place.query(place.core, "delete from item where id = 1")
    place.run("exporter", "load", "Other")
    assert place.run("exporter", "load", "--reconcile").returncode == 0
    assert place.query(place.analytics, f"select count(*) from {RAW}") == [(20,)]
    assert place.query(place.analytics, "select count(*) from analytics_raw.other") == [(19,)]


def test_nobody_loses_a_row_to_a_reconcile_beside_writers(place: Workplace) -> None:
    _items(place, REMOVE, rows=2000)
    until = time.monotonic() + 6

    def write(writer: int) -> None:
        chance = random.Random(writer)
        with psycopg.connect(place.core) as connection:
            while time.monotonic() < until:
                for number in chance.sample(range(writer, 2000, 3), 10):
                    connection.execute("delete from item where id = %s", (number,))
                    if chance.random() < 0.8:
                        connection.execute(
                            "insert into item (id, v) values (%s, %s)", (number, str(number))
                        )
                time.sleep(chance.uniform(0, 0.3))
                connection.commit()

    writers = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for one in writers:
        one.start()
    deleted = 0
    while time.monotonic() < until:
        deleted += place.load("Item", "--reconcile", "--max-deletes", "50")["rows_deleted"]
    for one in writers:
        one.join()
    assert deleted
    place.load("Item", "--reconcile", "--max-deletes", "50")
    compare(place, "public.item", RAW)


MODEL = """
{{ config(materialized='incremental', incremental_strategy='upsert', unique_key='id',
    meta={'upsert_delete_when': '_deleted_at is not null'}) }}
select id, v, _deleted_at, _exported_at from {{ source('analytics_raw', 'item') }}
{% if is_incremental() %} where {{ dbt_exporter.new_rows() }} {% endif %}
"""


@pytest.mark.long
def test_a_model_follows_the_marks(bare: Workplace) -> None:
    (bare.folder / "models" / "staging" / "sources.yml").write_text(
        "version: 2\nsources:\n  - name: analytics_raw\n    tables:\n"
        + "".join(f"      {line}\n" for line in MARK.strip("\n").splitlines())
    )
    (bare.folder / "models" / "marts" / "kept.sql").write_text(MODEL)
    bare.query(
        bare.core,
        "create table item (id int primary key, at timestamptz not null default now(), v text);"
        "insert into item (id, v) select n, 'v' from generate_series(1, 20) n",
    )
    kept = "select array_agg(id order by id) from analytics.kept where id > 17"
    for change, left in (
        ("select", [18, 19, 20]),
        ("delete from item where id = 18", [19, 20]),
        ("insert into item (id, v) values (18, 'back'); delete from item where id = 20", [18, 19]),
    ):
        bare.query(bare.core, change)
        bare.load("Item", "--reconcile")
        bare.dbt("run", "--quiet", "-s", "kept")
        assert bare.query(bare.analytics, kept) == [(left,)]


@pytest.fixture
def standby(place: Workplace) -> Iterator[tuple[Workplace, Workplace]]:
    """The same place on a hot standby, and on the server that it follows."""
    with running_server() as primary, tempfile.TemporaryDirectory(prefix="dbt-") as folder:
        copy = Server(Path(folder), primary.binaries, {})
        backup = [primary.binaries / "pg_basebackup", "-d", primary.url("postgres"), "-c", "fast"]
        subprocess.run([*backup, "-R", "-D", copy.data], check=True, capture_output=True)
        owner = primary.data.stat()
        for path in (copy.folder, copy.data, *copy.data.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
        copy.start()
        try:
            place.core = primary.url("postgres")
            yield Workplace(place.folder, copy.url("postgres"), place.analytics), place
        finally:
            copy.stop()


def _caught_up(primary: Workplace, standby: Workplace) -> None:
    end = primary.query(primary.core, "select pg_current_wal_lsn()")[0][0]
    for _ in range(200):
        if standby.query(standby.core, f"select pg_last_wal_replay_lsn() >= '{end}'") == [(True,)]:
            return
        time.sleep(0.05)
    raise AssertionError("the standby does not follow")


def test_a_standby_that_lags_deletes_nothing(standby: tuple[Workplace, Workplace]) -> None:
    follower, primary = standby
    _items(primary, REMOVE)
    _caught_up(primary, follower)
    assert verify(follower, "Item")["status"] == "equal"
    follower.query(follower.core, "select pg_wal_replay_pause()")
    primary.query(primary.core, "insert into item (id, v) values (21, 'new')")
    primary.query(primary.core, "delete from item where id = 1")
    primary.load("Item")
    found = verify(follower, "Item")  # what it has not been told of yet
    assert named(found) == [("in flight", "21", [])]
    assert follower.load("Item", "--reconcile")["rows_deleted"] == 0
    follower.query(follower.core, "select pg_wal_replay_resume()")
    _caught_up(primary, follower)
    primary.query(
        primary.analytics, f"update {RAW} set _exported_at = _exported_at - interval '1 hour'"
    )
    assert named(verify(follower, "Item", status=1)) == [("extra", "1", [])]
    assert follower.load("Item", "--reconcile")["rows_deleted"] == 1
    compare(primary, "public.item", RAW)
