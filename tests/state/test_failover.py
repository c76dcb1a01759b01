"""A real pair: a standby as source, its promotion after it missed commits; a subscriber."""

from __future__ import annotations

from exporter.demo.embedded import running_server
from tests.conftest import Workplace, compare
from tests.helpers.processes import until
from tests.helpers.tables import ITEM
from tests.helpers.versions import caught_up, cut_off, run, standby_of

_PARTS = {
    "cursor": "cursor: {field: at, id_field: id}\n          read: cursor",
    "scan": "read: scan",
}
_TABLE = (
    "create table {0} (id int primary key, at timestamptz not null default clock_timestamp(),"
    " v text); create index on {0} (at, id);"
    "insert into {0} select n, now() - interval '1 hour', 'first' from generate_series(1, 500) n"
)


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


def test_a_standby_that_is_promoted_without_the_last_commits(place: Workplace) -> None:
    _define(place)
    with running_server({"fsync": "off", "wal_level": "logical"}) as primary:
        for name in _PARTS:
            run(primary, _TABLE.format(name))
        with standby_of(primary) as standby:
            caught_up(primary, standby)
            place.core = standby.url("postgres")
            told = place.run("exporter", "load")
            assert told.returncode == 0, told.stderr
            for name in _PARTS:
                assert told.stderr.count(f"{name}: public.{name} is read from a standby") == (
                    name == "cursor"
                ), told.stderr
            place.core = primary.url("postgres")
            assert place.run("exporter", "load").returncode == 0
            cut_off(standby)
            for name in _PARTS:  # what is lost, after it has landed
                run(
                    primary,
                    f"update {name} set v = 'lost', at = clock_timestamp() where id <= 20;"
                    f"insert into {name} (id, v) select n, 'lost' from generate_series(501, 520) n",
                )
            assert place.run("exporter", "load").returncode == 0
            primary.stop("immediate")
            run(standby, "select pg_promote()")
            for name in _PARTS:
                run(
                    standby,
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
        run(publisher, _TABLE.format("item"))
        run(publisher, "create publication p for table item")
        with running_server({"fsync": "off"}) as subscriber:
            url = subscriber.url("postgres")
            run(
                subscriber,
                "create table item (id int primary key, at timestamptz not null, v text)",
            )
            run(
                subscriber,
                "create subscription s connection"
                f" 'host={publisher.folder} dbname=postgres user=postgres' publication p",
            )
            until(lambda: run(subscriber, "select count(*) from item") == [(500,)])
            place.core = url
            done = place.run("exporter", "load")
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("public.item is filled by logical replication: the") == 1
            warned = place.run("exporter", "check", "Item")
            assert "filled by logical replication" in " ".join(warned.stdout.split())
            compare(place, "public.item", "analytics_raw.item")
            run(subscriber, "drop subscription s")
