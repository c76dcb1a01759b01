"""Tables without a cursor: their rows are known by their transactions."""

from __future__ import annotations

import psycopg
import pytest

from tests.conftest import Workplace, compare
from tests.helpers.tables import BARE as ITEM

LOG = f"{ITEM}        mode: append\n"
TABLE = """
create table item (id int primary key, v text);
insert into item select n, 'v' || n from generate_series(1, 2000) n; analyze item
"""
KEYLESS = TABLE.replace(" primary key", "")


def _refused(place: Workplace, *words: str) -> str:
    done = place.run("exporter", "load", *words)
    assert done.returncode in (1, 2), done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def _equal(place: Workplace, *words: str) -> dict[str, object]:
    done = place.load("Item", *words)
    compare(place, "public.item", "analytics_raw.item")
    return done


def _stop_first_load(place: Workplace, id: int) -> None:
    """Begin the first load anew, with a raw table that refuses a row, as a kill would leave it."""
    place.query(
        place.analytics,
        "truncate analytics_raw.item; delete from analytics_raw._exporter_state;"
        f"alter table analytics_raw.item add constraint stop check (id <> {id})",
    )
    assert place.run("exporter", "load").returncode == 1
    place.query(place.analytics, "alter table analytics_raw.item drop constraint stop")


def test_what_changed_travels_and_nothing_else(place: Workplace) -> None:
    place.define(f"{ITEM}        deletes: remove\n")
    place.query(place.core, TABLE)
    assert _equal(place)["rows_read"] == 2000
    assert _equal(place)["rows_read"] == 0
    place.query(
        place.core,
        "update item set v = 'new' where id <= 3; insert into item values (5000, 'x');"
        "delete from item where id between 10 and 20; update item set id = 6000 where id = 30",
    )
    done = _equal(place)
    assert (done["rows_read"], done["rows_written"], done["rows_deleted"]) == (5, 5, 12)
    assert done["cursor"] is not None
    done = _equal(place)
    assert (done["rows_read"], done["rows_deleted"]) == (0, 0)


def test_most_deletes_holds(place: Workplace) -> None:
    place.define(f"{ITEM}        deletes: mark\n")
    place.query(place.core, TABLE)
    place.load("Item")
    place.query(
        place.core, "delete from item where id > 1000; update item set v = 'n' where id = 1"
    )
    refused = place.run("exporter", "load")
    assert refused.returncode == 1
    assert "1,000 of the 2,000 rows of raw (50 %) are gone at the source" in refused.stderr
    assert "--reconcile --max-deletes 50" in refused.stderr
    # The rows that came have landed.
    count = "select count(*) from analytics_raw.item where v = 'n'"
    assert place.query(place.analytics, count) == [(1,)]
    done = place.load("Item", "--reconcile", "--max-deletes", "50")
    assert done["rows_deleted"] == 1000
    assert place.load("Item")["rows_deleted"] == 0


def test_an_empty_table_and_one_that_was_emptied(place: Workplace) -> None:
    place.define(f"{ITEM}        deletes: remove\n")
    place.query(place.core, "create table item (id int primary key, v text)")
    for _ in range(2):
        done = place.run("exporter", "load")
        assert (done.returncode, done.stderr) == (0, "")
    place.query(place.core, "insert into item values (1, 'a'), (2, 'b')")
    assert _equal(place)["rows_read"] == 2
    place.query(place.analytics, "truncate analytics_raw.item")
    assert "the load begins anew" in place.run("exporter", "load").stderr
    assert _equal(place)["rows_read"] == 0


def test_a_row_of_a_transaction_that_was_open(place: Workplace) -> None:
    place.define(ITEM)
    place.query(place.core, TABLE)
    with psycopg.connect(place.core) as late:
        late.execute("insert into item values (9000, 'late')")
        with late.transaction():
            late.execute("insert into item values (9001, 'of a savepoint')")
        place.load("Item")
        place.query(place.core, "insert into item values (9002, 'meanwhile')")
        place.load("Item")
        # A row that is certainly new, before those of the old transaction.
        with psycopg.connect(place.core, autocommit=True) as alone:
            alone.execute("delete from item where id < 500")
            late.commit()
            alone.execute("vacuum item")
            alone.execute("insert into item values (1, 'in the first block')")
    place.load("Item")
    found = "select id, v from {} where id > 8999 or id = 1 order by id"
    assert place.query(place.core, found.format("item")) == place.query(
        place.analytics, found.format("analytics_raw.item")
    )


def test_a_table_without_a_primary_key(place: Workplace) -> None:
    place.define(ITEM)
    place.query(place.core, KEYLESS)
    error = _refused(place, "Item")
    assert "public.item has no primary key" in error
    assert "exporter.conflict_columns" in error
    assert "exporter.mode: append" in error
    place.define(f"{ITEM}        conflict_columns: [id]\n")
    assert _equal(place)["rows_written"] == 2000
    place.query(place.core, "insert into item values (1, 'again'), (1, 'and again')")
    assert "share conflict_columns (id)" in _refused(place, "Item")


def test_a_primary_key_that_does_not_land(place: Workplace) -> None:
    place.define(f"{ITEM}          exclude: [id]\n")
    place.query(place.core, TABLE)
    assert "leaves out id, a column of the primary key" in _refused(place, "Item")


@pytest.mark.parametrize(
    "relation",
    [
        "create view item as select 1 as id",
        "create extension postgres_fdw; create server s foreign data wrapper postgres_fdw;"
        "create foreign table item (id int) server s",
    ],
)
def test_rows_that_tell_no_transaction(place: Workplace, relation: str) -> None:
    place.define(f"{ITEM}        conflict_columns: [id]\n")
    place.query(place.core, relation)
    error = _refused(place, "Item")
    assert "cannot be scanned" in error
    assert "exporter.source.cursor" in error


def test_a_materialized_view(place: Workplace) -> None:
    place.define(f"{ITEM}        conflict_columns: [id]\n        deletes: remove\n")
    place.query(
        place.core,
        "create table base (id int, v text); insert into base select n, 'v' from"
        " generate_series(1, 100) n; create materialized view item as select * from base;"
        "create unique index on item (id)",
    )
    assert place.load("Item")["rows_written"] == 100
    place.query(
        place.core,
        "update base set v = 'w' where id = 1; delete from base where id = 2;"
        "refresh materialized view concurrently item",
    )
    done = place.load("Item")
    assert (done["rows_read"], done["rows_deleted"]) == (1, 1)
    place.query(place.core, "refresh materialized view item")
    done = place.load("Item")
    assert (done["rows_read"], done["rows_written"]) == (99, 0)
    found = place.query(place.analytics, "select count(*), min(id) from analytics_raw.item")
    assert found == [(99, 1)]


PARTS = """
create table item (id int, day date, v text, primary key (id, day)) partition by range (day);
create table item_1 partition of item for values from ('2026-01-01') to ('2026-02-01');
create table item_2 partition of item for values from ('2026-02-01') to ('2026-03-01')
    partition by list (id);
create table item_2a partition of item_2 default;
insert into item select n, '2026-01-15', 'v' from generate_series(1, 900) n;
insert into item select n, '2026-02-15', 'v' from generate_series(1, 900) n
"""


def test_partitions(place: Workplace) -> None:
    place.define(f"{ITEM}        deletes: remove\n")
    place.query(place.core, PARTS)
    planned = place.run("exporter", "load", "--dry-run").stdout
    assert "first load, from block 0" in planned
    assert "2 times" in planned
    assert _equal(place)["rows_read"] == 1800
    place.query(
        place.core,
        "update item set day = '2026-02-10' where id = 7 and day = '2026-01-15';"
        "create table item_3 partition of item for values from ('2026-03-01') to ('2026-04-01');"
        "insert into item values (1, '2026-03-03', 'new')",
    )
    done = _equal(place)
    assert (done["rows_read"], done["rows_deleted"]) == (2, 1)
    place.query(
        place.core,
        "create table old (like item); insert into old values (1, '2025-01-01', 'old');"
        "insert into old select 2, '2025-01-01', 'old'",
    )
    _equal(place)
    place.query(
        place.core,
        "alter table item attach partition old for values from ('2025-01-01') to ('2026-01-01')",
    )
    assert "new partition with rows older than the position" in place.run("exporter", "load").stderr
    compare(place, "public.item", "analytics_raw.item")
    place.query(place.core, "alter table item detach partition old")
    assert _equal(place)["rows_deleted"] == 2


def test_a_partitioned_table_without_a_partition(place: Workplace) -> None:
    place.define(ITEM)
    place.query(place.core, "create table item (id int primary key, v text) partition by hash (id)")
    for _ in range(2):
        assert place.load("Item")["rows_read"] == 0
    place.query(
        place.core,
        "create table item_0 partition of item for values with (modulus 1, remainder 0);"
        "insert into item values (1, 'a')",
    )
    assert _equal(place)["rows_read"] == 1


def test_a_first_load_goes_on_in_partitions_that_grow(place: Workplace) -> None:
    place.define(f"{ITEM}        batch_rows: 500\n")
    place.query(
        place.core,
        "create table item (id int primary key, v text) partition by range (id);"
        "create table item_0 partition of item for values from (0) to (100000);"
        "create table item_1 partition of item for values from (100000) to (200000);"
        "insert into item select n, repeat('x', 90) from generate_series(1, 3000) n;"
        "insert into item select n, repeat('x', 90) from generate_series(100001, 103000) n;"
        "analyze item",
    )
    place.load("Item")
    _stop_first_load(place, 102000)
    place.query(
        place.core,
        "insert into item select n, repeat('x', 90) from generate_series(3001, 6000) n;"
        "update item set v = 'changed' where id = 7; delete from item where id = 102999",
    )
    done = place.run("exporter", "load", "-v")
    assert done.returncode == 0
    assert "first load: from block" in done.stderr
    assert "from block 0" not in done.stderr
    compare(place, "public.item", "analytics_raw.item")


def test_another_way_of_reading(place: Workplace) -> None:
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz default now());"
        "insert into item select generate_series(1, 9)",
    )
    cursor = "          cursor: {field: at, id_field: id}\n        conflict_columns: [id]\n"
    place.define(ITEM + cursor)
    _equal(place)
    place.define(f"{ITEM}          read: scan\n{cursor}")
    done = place.run("exporter", "load")
    assert "source.read was cursor and is scan: everything is read once" in done.stderr
    assert _equal(place)["rows_read"] == 0
    place.query(place.core, "update item set at = '2001-01-01' where id = 1")
    assert _equal(place)["rows_read"] == 1
    error = _refused(place, "Item", "--since", "2026-01-01")
    assert "is scanned, and has no cursor for --since" in error


def test_a_small_table_is_scanned_beside_its_cursor(place: Workplace) -> None:
    place.query(
        place.core,
        "create table item (id int primary key, at timestamptz default now(), v text);"
        "create index on item (at, id); insert into item select generate_series(1, 9)",
    )
    cursor = "          cursor: {field: at, id_field: id}\n        deletes: remove\n"
    place.define(f"{ITEM}{cursor}        conflict_columns: [id]\n")
    _equal(place)
    place.query(
        place.core,
        "insert into item values (20, '2001-01-01'); update item set v = 'silent' where id = 3;"
        "delete from item where id = 4; insert into item values (21)",
    )
    done = _equal(place)
    assert (done["rows_read"], done["rows_deleted"], done["rows_swept"]) == (3, 1, 0)


# -- logs


def test_a_log_lands_each_row_once(place: Workplace) -> None:
    place.define(LOG)
    place.query(place.core, KEYLESS)
    with psycopg.connect(place.core) as late, psycopg.connect(place.core) as other:
        late.execute("insert into item values (1, 'of an open transaction')")
        other.execute("insert into item values (1, 'that is rolled back')")
        place.query(place.core, "insert into item values (1, 'younger, and committed')")
        assert place.load("Item")["rows_read"] == 2000
        place.query(place.core, "insert into item values (1, 'after it')")
        assert place.load("Item")["rows_read"] == 0  # an older writer is open
        with late.transaction():
            late.execute("insert into item values (2, 'of a savepoint')")
        late.commit()
        other.rollback()
    assert _equal(place)["rows_read"] == 4
    assert _equal(place)["rows_read"] == 0
    with psycopg.connect(place.core, autocommit=True) as alone:
        alone.execute("vacuum full item")
    place.query(place.core, "insert into item values (3, 'after vacuum')")
    assert _equal(place)["rows_read"] == 1
    place.query(place.analytics, "truncate analytics_raw.item")
    place.query(place.core, "insert into item values (4, 'the next one')")
    done = place.run("exporter", "load")
    assert "a log goes on behind its position" in done.stderr
    assert place.query(place.analytics, "select id from analytics_raw.item") == [(4,)]
    assert place.load("Item", "--full-refresh")["rows_read"] == 2006
    _equal(place)


def test_a_log_that_was_written_anew_is_refused(place: Workplace) -> None:
    place.define(LOG)
    place.query(place.core, KEYLESS)
    place.load("Item")
    place.query(place.core, "alter table item set unlogged")
    refused = place.run("exporter", "load")
    assert refused.returncode == 1
    assert "public.item was written anew" in refused.stderr
    assert "Item is append-only: read again, its rows would be there twice" in refused.stderr
    assert place.run("exporter", "state", "adopt", "Item").returncode == 0
    place.query(place.core, "insert into item values (1, 'new')")
    assert _equal(place)["rows_read"] == 1


def test_a_log_of_prepared_transactions(place: Workplace) -> None:
    (most,) = place.query(place.core, "show max_prepared_transactions")[0]
    if most == "0":
        pytest.skip("max_prepared_transactions is 0")
    place.define(LOG)
    place.query(place.core, KEYLESS)
    place.query(place.core, "begin; insert into item values (1, 'p'); prepare transaction 'one'")
    try:
        place.query(place.core, "insert into item values (2, 'after it')")
        assert place.load("Item")["rows_read"] == 2000
    finally:
        place.query(place.core, "commit prepared 'one'")
    assert _equal(place)["rows_read"] == 2


def test_a_log_that_was_killed_in_its_first_load(place: Workplace) -> None:
    """It goes on where it was, and takes no row twice, though newer ones are in old blocks."""
    place.define(LOG.replace("mode: append", "mode: append\n        batch_rows: 100"))
    place.query(place.core, KEYLESS)
    place.load("Item")
    _stop_first_load(place, 1500)
    (landed,) = place.query(place.analytics, "select count(*) from analytics_raw.item")[0]
    assert 0 < landed < 2000
    with psycopg.connect(place.core, autocommit=True) as alone:
        alone.execute("delete from item where id < 50")
        alone.execute("vacuum item")
    place.query(
        place.core, "insert into item select 7, 'in an old block' from generate_series(1, 9)"
    )
    new = "count(*) filter (where v = 'in an old block')"
    for written in (2009 - landed, 0):  # what was committed meanwhile, too, and none of it twice
        assert place.load("Item")["rows_written"] == written
        found = place.query(place.analytics, f"select count(*), {new} from analytics_raw.item")
        assert found == [(2009, 9)]


def test_a_large_scan_is_shared(place: Workplace) -> None:
    place.define(ITEM)
    place.query(
        place.core,
        "create table item (id int primary key, v text);"
        "insert into item select n, repeat('x', 1700) from generate_series(1, 36000) n",
    )
    place.load("Item", "-j", "2")
    place.query(place.core, "update item set v = 'changed' where id % 100 = 0")
    done = place.run("exporter", "load", "-v", "-j", "2")
    assert done.returncode == 0
    assert "scan: from block 0 of 9,0" in done.stderr
    assert "360 rows read, 360 written" in done.stdout
    compare(place, "public.item", "analytics_raw.item")
    # One that was killed in the middle begins again: what it had not seen may lie before its place.
    place.query(place.core, "update item set v = 'again' where id in (1, 35999)")
    place.query(place.analytics, "update analytics_raw._exporter_state set next_block = 8192")
    assert _equal(place, "-j", "2")["rows_read"] == 2
    assert _equal(place)["rows_read"] == 0


def test_a_log_whose_load_stops_between_its_rows_and_its_end(place: Workplace) -> None:
    place.define(LOG)
    place.query(place.core, KEYLESS)
    place.load("Item")
    place.query(place.core, "insert into item values (1, 'new')")
    place.query(
        place.analytics,
        "alter table analytics_raw._exporter_runs add constraint never check (status <> 'ok')"
        " not valid",
    )
    assert place.run("exporter", "load").returncode == 1
    place.query(place.analytics, "alter table analytics_raw._exporter_runs drop constraint never")
    _equal(place)
