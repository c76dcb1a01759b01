"""Values that travel as changes are exact, whatever their type, as texts and in binary."""

from __future__ import annotations

import pytest

from exporter.config.project import definitions
from exporter.errors import SourceError
from exporter.source import Table, find_table, pgoutput
from exporter.source.changes import Gatherer
from exporter.source.folded import Retyped
from exporter.source.landed import unlanded
from exporter.source.member import Member, Snapshot
from exporter.wire import connect
from tests.conftest import Workplace, compare
from tests.helpers import every_type
from tests.helpers.changes import define, results, same


def _typed(place: Workplace, exclude: list[str]) -> Table:
    """Declare the table ``typed`` without these columns; return it."""
    every_type.declare(place, table="typed", read="changes", exclude=exclude)
    return _found(place)


def _found(place: Workplace) -> Table:
    """The table that is declared, as a load finds it."""
    (definition,) = definitions(place.folder)
    with connect("DATABASE_URL_CORE") as source, connect("DATABASE_URL_ANALYTICS") as destination:
        return find_table(source, definition.source, destination)


@pytest.fixture
def urls(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A workplace whose databases are those of this process, too."""
    monkeypatch.setenv("DATABASE_URL_CORE", place.core)
    monkeypatch.setenv("DATABASE_URL_ANALYTICS", place.analytics)
    return place


@pytest.mark.parametrize("binary", [False, True])
def test_every_type_comes_by_its_changes(urls: Workplace, binary: bool) -> None:
    place = urls
    every_type.make(place)
    exclude = [
        name
        for (name,) in place.query(
            place.core,
            "select attname from pg_attribute where attrelid = 'typed'::regclass"
            " and attgenerated <> ''",
        )
    ]
    place.query(
        place.core, "create table spare as select * from typed; delete from typed; analyze typed"
    )
    table = _typed(place, exclude)
    texts = [column.name for column in table.landed if not column.streamed]
    assert texts, "then all would come in binary"
    if binary:  # one that does not keeps all the others from it
        table = _typed(place, [*exclude, *texts])
        assert len(table.landed) > 2 * len(texts)
    results(place)
    names = [every_type.quoted(column.name) for column in table.landed]
    listed = ", ".join(names)
    place.query(place.core, f"insert into typed ({listed}) select {listed} from spare")
    assert results(place)["Typed"]["rows_written"] == every_type.ROWS
    everything = ", ".join(f"{name}::text" for name in names)
    compare(place, "typed", "analytics_raw.typed", everything)
    # The next row's values under this row's key: all of them are updated.
    others = ", ".join(names[1:])
    place.query(
        place.core,
        f"update typed t set ({others}) = (select {others} from spare s where s.id = t.id + 1)"
        f" where id < {every_type.ROWS}",
    )
    assert results(place)["Typed"]["rows_written"] == every_type.ROWS - 1
    compare(place, "typed", "analytics_raw.typed", everything)


def test_values_that_look_like_what_stands_between_values(urls: Workplace) -> None:
    """In binary a number, and bytes, may be what tells a message's values apart."""
    place = urls
    marks = [0x62000000, 0x6E6E6E6E, 0x62, None]  # b, n
    numbers = ", ".join("null" if one is None else str(one) for one in marks)
    place.query(
        place.core,
        "create table odd (d bytea, n int, id int primary key, t text, big bigint, last int);"
        "create table spare as select d, n, row_number() over ()::int as id, t, big, l as last"
        f" from unnest(array[{numbers}]) n, unnest(array[{numbers}]) l,"
        " unnest(array['', 'b\\000\\000\\000', 'b\\000\\000\\000\\005nnnnn', 'nnb', null]::bytea[])"
        " d,"
        " unnest(array['', 'b', repeat('n', 98), repeat('b', 110), repeat('n', 254),"
        "  repeat('b', 255), repeat('n', 256), null]) t,"
        " unnest(array[0, 7061644215716937728, 7061644215738036590, null]) big;"
        f"update spare set id = id + {0x62000000 - 1000}",
    )
    define(place, "odd")
    assert all(column.streamed for column in _found(place).landed)
    results(place)
    binary = every_type.version(place, place.core) >= 140000
    sent = _sent(place, "insert into odd select * from spare", binary=binary)
    rows = [one for one in sent if one[0] == pgoutput.INSERT]
    found = {one: pgoutput.short(one, b"b" if binary else b"t", 3) for one in rows}
    short = {one: b"\0\0\0" + b"\0\0\0".join(parts) for one, parts in found.items() if parts}
    assert 100 < len(short) < len(rows)
    assert [*short.values()] == [b"".join(filter(None, pgoutput.inserted(one))) for one in short]
    results(place)
    same(place, "odd")
    place.query(
        place.core,
        "update odd o set n = s.last, d = s.d, t = s.t, big = s.n, last = s.n from spare s"
        " where s.id = o.id + 1",
    )
    results(place)
    same(place, "odd")


def test_a_column_that_gets_another_type_amid_the_changes(urls: Workplace) -> None:
    """In binary, a whole number is some other one for what has become of it."""
    place = urls
    place.query(place.core, "create table thing (id int primary key, v int)")
    define(place, "thing")
    table = _found(place)
    sent = _sent(
        place,
        "insert into thing values (1, 1)",
        "alter table thing alter v type real; insert into thing values (2, 0.5)",
    )
    end = pgoutput.committed([one for one in sent if one[0] == pgoutput.COMMIT][-1])
    names = tuple(column.name for column in table.columns)
    types = {column.name: column.streamed for column in table.columns}
    member = Member("thing", table.oid, names, ("id",), frozenset(names), types=types)
    with pytest.raises(Retyped):
        list(Gatherer([member], 0, end).chunks(iter(sent)))
    results(place)
    place.query(place.core, "insert into thing values (3, 3); delete from thing where id = 1")
    place.query(
        place.core, "alter table thing alter v type double precision; update thing set v = 9"
    )
    results(place)
    same(place, "thing")


def _sent(place: Workplace, *statements: str, binary: bool = False) -> list[bytes]:
    """The messages that a slot sends of these, of all tables."""
    place.query(
        place.core,
        "create publication p for all tables with (publish_via_partition_root)",
    )
    slot = f"sent_{place.core.rpartition('/')[2].partition('?')[0]}"
    place.query(place.core, f"select pg_create_logical_replication_slot('{slot}', 'pgoutput')")
    for statement in statements:
        place.query(place.core, statement)
    options = "'proto_version', '1', 'publication_names', 'p'"
    options += ", 'binary', 'true'" if binary else ""
    peek = f"pg_logical_slot_peek_binary_changes('{slot}', null, null, {options})"
    sent = [bytes(data) for (data,) in place.query(place.core, f"select data from {peek}")]
    place.query(place.core, f"select pg_drop_replication_slot('{slot}')")
    return sent


def test_a_transaction_that_is_sent_again_makes_no_versions(place: Workplace) -> None:
    place.query(place.core, "create table thing (id int primary key)")
    sent = _sent(place, *(f"insert into thing values ({number})" for number in (1, 2)))
    oid, near = place.query(place.core, "select 'thing'::regclass::oid::bigint, txid_current()")[0]
    member = Member("thing", oid, ("id",), ("id",), frozenset({"id"}), near=near)
    first, second = (one for one in sent if one[0] == pgoutput.COMMIT)

    def found(landed: bytes | None) -> int:
        commit = landed and pgoutput.commit_of(landed)
        gatherer = Gatherer([member], 0, pgoutput.committed(second))
        (chunk,) = gatherer.chunks(unlanded(iter(sent), 0, commit))
        return sum(len(part.rows) for part in chunk.changes["thing"].parts)

    assert [found(landed) for landed in (None, first)] == [2, 1]


def test_what_a_partition_was_before_the_copy_is_not_what_it_is(place: Workplace) -> None:
    """Nor is another table, described behind this one's changes, a partition of it."""
    place.query(
        place.core,
        "create table part (id int primary key, code int not null) partition by range (id);"
        "create table part_1 partition of part for values from (0) to (10);"
        "create table part_2 partition of part for values from (10) to (20);"
        "create unique index by_code on part_1 (code); insert into part values (1, 1), (11, 11);"
        "create table other (id int, code int not null unique);"
        "alter table other replica identity using index other_code_key;"
        "create table seen (snapshot text)",
    )
    sent = _sent(
        place,
        "alter table part_1 replica identity using index by_code; insert into part values (2, 2);"
        "alter table part_1 replica identity default",
        "insert into seen select pg_current_snapshot()::text",
        "delete from part where id = 11",
        "insert into other values (1, 1)",
        "delete from part where id = 11; insert into part values (12, 12)",
    )
    commits = [one for one in sent if one[0] == pgoutput.COMMIT]
    ((oid,),) = place.query(place.core, "select 'part'::regclass::oid::bigint")
    ((seen,),) = place.query(place.core, "table seen")
    names = ("id", "code")
    unseen = Member("part", oid, names, ("id",), frozenset(names))

    def rows(member: Member, landed: bytes | None) -> int:
        gatherer = Gatherer([member], 0, pgoutput.committed(commits[-1]))
        (chunk,) = gatherer.chunks(unlanded(iter(sent), 0, landed))
        return len(chunk.changes["part"].keys)

    with pytest.raises(SourceError, match="the changes lack id"):
        rows(unseen, None)
    assert rows(unseen._replace(snapshot=Snapshot.of_text(seen)), None) == 2
    assert rows(unseen, pgoutput.commit_of(commits[0])) == 2
