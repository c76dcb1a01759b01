"""Rows that a Python function yields: typed, upserted, in one transaction or batch by batch."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from tests.conftest import Workplace
from tests.helpers.tables import forget_everything

EVENT = """
- name: event
  config:
    meta:
      exporter:
        key: Event
        source:
          rows: readers.shop:events
          cursor: {field: at}
        conflict_columns: [id]
"""
IN_ORDER = (
    EVENT.replace("cursor:", "in_order: true\n          cursor:") + "        batch_rows: 10\n"
)
# What the functions of these tests are made with. `calls` is read by the tests.
SOME = """
import datetime as dt
import decimal, enum, os, pathlib, uuid

BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)

def event(n, **more):
    return {"id": n, "at": BEGIN + dt.timedelta(minutes=n), "name": f"n{n}", **more}

def called(since):
    with open(pathlib.Path(__file__).with_name("calls"), "a") as file:
        print(repr(since), file=file)

"""


@pytest.fixture
def shop(place: Workplace) -> Workplace:
    (place.folder / "readers").mkdir()
    place.define(EVENT)
    return place


def write(place: Workplace, text: str) -> None:
    # Python takes a file of the same size and second for the one that it has compiled.
    shutil.rmtree(place.folder / "readers" / "__pycache__", ignore_errors=True)
    (place.folder / "readers" / "shop.py").write_text(SOME + text)


def calls(place: Workplace) -> list[str]:
    file = place.folder / "readers" / "calls"
    return file.read_text().splitlines() if file.exists() else []


def rows(place: Workplace, columns: str = "id, name") -> list[tuple[Any, ...]]:
    return place.query(place.analytics, f"select {columns} from analytics_raw.event order by id")


def failed(place: Workplace, *words: str, status: int = 1, **environment: str) -> str:
    done = place.run("exporter", "load", *words, **environment)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def position(place: Workplace) -> dict[str, Any]:
    done = place.run("exporter", "state", "show", "--json")
    return dict(json.loads(done.stdout))


# -- from where


def test_the_function_is_asked_from_the_last_value_less_the_lookback(shop: Workplace) -> None:
    write(
        shop,
        """
ROWS = [event(n) for n in (3, 1, 2)]

def events(since):
    called(since)
    yield from (one for one in ROWS if since is None or one["at"] >= since)
""",
    )
    first = shop.load()
    assert (first["rows_read"], first["rows_written"], first["batches"]) == (3, 3, 1)
    assert first["cursor"] == {"value": "2026-01-01 00:03:00+00", "id": None}
    text = (shop.folder / "readers" / "shop.py").read_text()
    text = text.replace("(3, 1, 2)", "(3, 9, 2, 14)")
    text += "    yield event(3, name='changed')\n"
    (shop.folder / "readers" / "shop.py").write_text(text)
    second = shop.load()
    assert (second["rows_read"], second["rows_written"], second["rows_unchanged"]) == (5, 3, 2)
    assert rows(shop) == [(1, "n1"), (2, "n2"), (3, "changed"), (9, "n9"), (14, "n14")]
    shop.load()
    assert shop.load("--full-refresh", "--max-deletes", "50")["rows_deleted"] == 1
    assert calls(shop) == [
        "None",
        "datetime.datetime(2025, 12, 31, 23, 58, tzinfo=datetime.timezone.utc)",
        "datetime.datetime(2026, 1, 1, 0, 9, tzinfo=datetime.timezone.utc)",
        "None",
    ]
    assert rows(shop, "id") == [(2,), (3,), (9,), (14,)]


CURSORS = [
    ("int", "41", None, "41"),
    ("int", "41", "10", "31"),
    ("date", "dt.date(2026, 3, 1)", None, "datetime.date(2026, 2, 28)"),
    ("date", "dt.date(2026, 3, 1)", "2 days", "datetime.date(2026, 2, 27)"),
    (
        "naive",
        "dt.datetime(2026, 3, 1, 12)",
        "1 hour",
        "datetime.datetime(2026, 3, 1, 11, 0)",
    ),
    (
        "text of a zone",
        "'2026-03-01T12:00:00.5+02:00'",
        "1 second",
        "datetime.datetime(2026, 3, 1, 9, 59, 59, 500000, tzinfo=datetime.timezone.utc)",
    ),
]


def test_since_has_the_type_of_the_cursor(shop: Workplace) -> None:
    for cursor, value, lookback, since in CURSORS:
        back = f", lookback: {lookback}" if lookback else ""
        declared = EVENT.replace("{field: at}", f"{{field: at{back}}}")
        if cursor.startswith("text"):
            declared += "  columns: [{name: at, data_type: timestamptz}]\n"
        shop.define(declared)
        write(
            shop, f"def events(since):\n    called(since)\n    yield {{'id': 1, 'at': {value}}}\n"
        )
        shop.load()
        assert shop.load()["rows_unchanged"] == 1
        assert calls(shop) == ["None", since]
        forget_everything(shop)
        (shop.folder / "readers" / "calls").unlink()


def test_a_row_that_is_dated_ahead_does_not_hide_those_to_come(shop: Workplace) -> None:
    write(
        shop,
        """
def events(since):
    called(since)
    yield {"id": 1, "at": BEGIN.replace(year=2999), "name": "ahead"}
    yield {"id": 2, "at": dt.datetime.now(dt.timezone.utc), "name": "now"}
""",
    )
    shop.load()
    shop.load()
    (since,) = shop.query(
        shop.analytics,
        "select watermark_value::timestamptz <= now() from analytics_raw._exporter_state",
    )
    assert since == (True,)
    assert "2999" not in calls(shop)[1]


def test_without_a_cursor_everything_comes_each_time(shop: Workplace) -> None:
    shop.define(EVENT.replace("          cursor: {field: at}\n", ""))
    write(
        shop, "def events(since):\n    called(since)\n    yield from (event(n) for n in range(3))\n"
    )
    shop.load()
    second = shop.load()
    assert (second["rows_read"], second["rows_unchanged"]) == (3, 3)
    assert calls(shop) == ["None", "None"]


def test_a_span_is_handed_to_a_function_that_takes_it(shop: Workplace) -> None:
    write(shop, "def events(since):\n    called(since)\n    yield event(9)\n")
    said = failed(shop, "Event", "--since", "2026-01-01", status=2)
    assert "nothing tells its type yet" in said
    shop.load()
    before = position(shop)
    shop.load("Event", "--since", "2020-02-01")
    said = failed(shop, "Event", "--since", "2020-01-01", "--until", "2020-02-01", status=2)
    assert "--until is handed to the function, and readers.shop:events does not take it" in said
    assert "models/sources.yml:5" in said
    write(
        shop,
        "def events(since, until=None):\n    called((since, until))\n"
        "    yield event(1, name='again')\n",
    )
    shop.load("Event", "--since", "2020-01-01", "--until", "2020-02-01")
    assert position(shop)["cursor"] == before["cursor"]
    assert rows(shop) == [(1, "again"), (9, "n9")]
    assert [one.partition("(2020")[2] for one in calls(shop)[1:]] == [
        ", 2, 1, 0, 0, tzinfo=datetime.timezone.utc)",
        ", 1, 1, 0, 0, tzinfo=datetime.timezone.utc), datetime.datetime(2020, 2, 1, 0, 0,"
        " tzinfo=datetime.timezone.utc))",
    ]
    assert "is no time" in failed(shop, "Event", "--since", "yesterday", status=2)


# -- what lands


def test_types_are_those_of_the_yaml_else_of_the_values(shop: Workplace) -> None:
    shop.define(
        EVENT + "  columns:\n    - {name: id, data_type: integer}\n"
        "    - {name: sum, data_type: 'numeric(9,2)'}\n"
        "    - {name: rare, data_type: varchar(5)}\n    - {name: tags, data_type: 'text[]'}\n"
        "    - {name: _exported_at, data_type: timestamptz}\n    - {name: name}\n"
    )
    write(
        shop,
        r"""
class Kind(enum.Enum):
    A = "a"

def events(since):
    yield event(1, sum="1.5", tags=["a", 'b"\t\\'], whole=2**40, half=1, day=dt.date(2026, 1, 2),
                kind=Kind.A, raw=b"\x00\xff", of=uuid.UUID(int=7), more={"a": [1, None, "\n"]},
                flag=True, exact=decimal.Decimal("1.10"), long=dt.timedelta(hours=25), nothing=None)
    yield event(2, name="tab\t\\N\n\\.", half=0.5)
    yield event(3, name=None)
""",
    )
    shop.load()
    assert shop.types("analytics_raw.event") == {
        "id": "integer",
        "sum": "numeric(9,2)",
        "rare": "character varying(5)",
        "tags": "text[]",
        "at": "timestamp with time zone",
        "name": "text",
        "whole": "bigint",
        "half": "double precision",
        "day": "date",
        "kind": "text",
        "raw": "bytea",
        "of": "uuid",
        "more": "jsonb",
        "flag": "boolean",
        "exact": "numeric",
        "long": "interval",
        "_exported_at": "timestamp with time zone",
    }
    assert rows(shop, "name, tags, half, encode(raw, 'hex'), more, exact::text, long::text")[0] == (
        *("n1", ["a", 'b"\t\\'], 1.0, "00ff", {"a": [1, None, "\n"]}, "1.10", "1 day 01:00:00"),
    )
    assert rows(shop) == [(1, "n1"), (2, "tab\t\\N\n\\."), (3, None)]


@pytest.mark.parametrize("declared", [EVENT, IN_ORDER])
def test_a_new_key_is_a_new_column_and_a_missing_one_is_null(
    shop: Workplace, declared: str
) -> None:
    """Also where the key comes after rows that have waited, or have landed."""
    shop.define(declared)
    write(
        shop,
        """
def events(since):
    yield from (event(n) for n in range(25))
    yield event(25, note="x\\ny")
    yield {"note": "only", "id": 26, "at": BEGIN + dt.timedelta(minutes=26)}
""",
    )
    first = shop.load()
    assert first["batches"] == (3 if declared == IN_ORDER else 1)
    assert rows(shop, "id, name, note")[-3:] == [
        *((24, "n24", None), (25, "n25", "x\ny"), (26, None, "only")),
    ]
    write(
        shop, "def events(since):\n    yield {'id': 25, 'at': BEGIN + dt.timedelta(minutes=30)}\n"
    )
    done = shop.run("exporter", "load")
    assert (done.returncode, done.stderr) == (0, ""), "a key that no row has is no change"
    assert rows(shop, "id, name, note")[25] == (25, None, None)
    assert sorted(shop.types("analytics_raw.event")) == ["_exported_at", "at", "id", "name", "note"]


def test_a_type_that_became_wider_or_another(shop: Workplace) -> None:
    write(shop, "def events(since):\n    yield event(1, sum=1, text='x')\n")
    shop.load()
    write(
        shop,
        "def events(since):\n    yield from (event(n, sum=n) for n in range(2, 50))\n"
        "    yield event(50, sum=decimal.Decimal('1.5'), text='x')\n",
    )
    assert shop.load()["rows_written"] == 49
    assert rows(shop, "sum::text")[-2:] == [("49",), ("1.5",)]
    write(shop, "def events(since):\n    yield event(3, sum=1)\n    yield event(4, text=5)\n")
    assert "column 'text' has values of type text and of type bigint" in failed(shop)
    write(shop, "def events(since):\n    yield event(3, sum=1.5)\n")
    assert "column 'sum' has values of type numeric and of type double" in failed(shop)
    assert len(rows(shop)) == 50


def test_a_value_that_the_destination_refuses_is_named(shop: Workplace) -> None:
    shop.define(EVENT + "  columns: [{name: name, data_type: varchar(3)}]\n")
    write(shop, "def events(since):\n    yield from (event(n) for n in range(95, 110))\n")
    said = failed(shop)
    assert "Event: batch 1, row id=100, column name: value too long for type character" in said
    assert (rows(shop), position(shop)["cursor"]) == ([], None)
    shop.define(EVENT + "  columns: [{name: name, data_type: nonsense}]\n")
    assert 'data_type of name: type "nonsense" does not exist' in failed(shop)


def test_of_equals_the_last_counts_wherever_it_lies(shop: Workplace) -> None:
    """From the second batch on, a short row gets into a page that long ones have left."""
    shop.define(IN_ORDER.replace("batch_rows: 10", "batch_rows: 1000"))
    write(
        shop,
        """
import random

def events(since):
    chance = random.Random(1)
    for n in range(2000):
        pad = "".join(map(str, chance.choices(range(10), k=chance.choice((100, 1000, 1900)))))
        yield {**event(0), "id": n // 5, "name": f"n{n}", "pad": pad}
""",
    )
    shop.load()
    assert rows(shop) == [(n, f"n{5 * n + 4}") for n in range(400)]


def test_one_dict_that_is_changed_again_and_again(shop: Workplace) -> None:
    write(
        shop,
        "def events(since):\n    row = {}\n    for n in range(20):\n        row.update(event(n))\n"
        "        yield row\n",
    )
    shop.load()
    assert rows(shop) == [(n, f"n{n}") for n in range(20)]


def test_of_rows_with_one_key_the_newest_counts(shop: Workplace) -> None:
    write(
        shop,
        """
def events(since):
    yield event(1)
    yield {"id": 1, "at": BEGIN + dt.timedelta(hours=2), "name": "newest"}
    yield {"id": 1, "at": BEGIN + dt.timedelta(hours=1), "name": "older"}
    yield event(2, name="first")
    yield event(2, name="last")
""",
    )
    for words in ((), (), ("--full-refresh",)):
        shop.load(*words)
        assert rows(shop) == [(1, "newest"), (2, "last")]
    shop.define(IN_ORDER)
    failed(shop)  # they are not in order
    write(
        shop,
        "def events(since):\n    yield from (event(n, name='a') for n in range(30))\n"
        "    yield from ({**event(29), 'id': n, 'name': 'b'} for n in range(30))\n",
    )
    shop.load()
    assert {name for _, name in rows(shop)} == {"b"}


# -- in order


def test_in_order_each_batch_is_committed_with_its_position(shop: Workplace) -> None:
    shop.define(IN_ORDER.replace("{field: at}", "{field: at, lookback: 0 seconds}"))
    write(
        shop,
        """
def events(since):
    called(since)
    for n in range(40):
        if since is None or event(n)["at"] > since:
            if n == 35 and len(open(pathlib.Path(__file__).with_name("calls")).readlines()) == 1:
                raise RuntimeError("the service is down")
            yield event(n)
""",
    )
    said = failed(shop)
    assert "Event: readers.shop:events (models/sources.yml:5) failed after 35 rows: " in said
    assert "readers/shop.py:20: RuntimeError: the service is down" in said
    assert len(rows(shop)) == 30
    assert shop.load()["rows_read"] == 11, "the last value may have had more rows"
    assert len(rows(shop)) == 40
    assert "0, 28, tzinfo" in calls(shop)[1]


def test_a_row_that_is_not_in_order_is_refused(shop: Workplace) -> None:
    shop.define(IN_ORDER)
    write(shop, "def events(since):\n    yield from (event(n) for n in (*range(20), 15, 21))\n")
    assert "row 21, id = 15 is older than the row before it by at" in failed(shop)
    assert len(rows(shop)) == 20


def test_all_or_nothing_without_an_order(shop: Workplace) -> None:
    shop.define(EVENT + "        batch_rows: 10\n")
    write(
        shop,
        "def events(since):\n    yield from (event(n) for n in range(3000))\n    1 / 0\n",
    )
    said = failed(shop)
    assert "after 3,000 rows: readers/shop.py:16: ZeroDivisionError: division by zero" in said
    assert position(shop)["cursor"] is None
    there = shop.query(shop.analytics, "select to_regclass('analytics_raw.event')")
    assert there == [(None,)]


def test_a_table_that_becomes_a_function_is_read_once_and_compared(shop: Workplace) -> None:
    shop.define(EVENT.replace("rows: readers.shop:events", "table: event"))
    shop.query(
        shop.core,
        "create table event (id bigint primary key, at timestamptz not null, name text);"
        " insert into event select n, '2026-01-01 UTC'::timestamptz + n * interval '1 minute',"
        " 'n' || n from generate_series(0, 4) n",
    )
    shop.load()
    shop.define(EVENT)
    write(shop, "def events(since):\n    called(since)\n    yield from map(event, range(6))\n")
    done = shop.run("exporter", "load", "--json")
    assert "readers.shop:events is another table than the one that was read" in done.stderr
    assert (json.loads(done.stdout)["rows_written"], calls(shop)) == (1, ["None"])
    shop.define(EVENT.replace("rows: readers.shop:events", "table: event"))
    assert shop.load()["rows_unchanged"] == 5


def test_two_projects_in_one_process_have_a_module_of_one_name(
    shop: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write(shop, "def events(since):\n    yield event(1)\n")
    other = tmp_path_factory.mktemp("other")
    (other / "models").mkdir()
    (other / "readers").mkdir()
    (other / "dbt_project.yml").write_text("name: other\nprofile: dbt_exporter\n")
    text = (shop.folder / "models" / "sources.yml").read_text()
    (other / "models" / "sources.yml").write_text(text.replace("name: event", "name: other"))
    text = (shop.folder / "readers" / "shop.py").read_text()
    (other / "readers" / "shop.py").write_text(text.replace("event(1)", "event(2)"))
    program = (
        "import sys; from exporter.api import load\n"
        "for folder in sys.argv[1:]:\n"
        "    print([one.error for one in load(project_dir=folder)], sys.path.count(folder))"
    )
    folders = [str(shop.folder), str(other), str(shop.folder)]
    done = shop.run("python", "-c", program, *folders)
    assert done.stdout.splitlines()[1::2] == ["[None] 0"] * 3, done
    assert rows(shop) == [(1, "n1")]
    assert shop.query(shop.analytics, "select id from analytics_raw.other") == [(2,)]


# -- what is wrong


WRONG = [
    ("event_s = 1", 2, "there is no function events"),
    ("events = 5", 2, "is a int, and no function"),
    ("def events():\n    yield {}", 2, "has to take the position alone"),
    ("def events(since):\n    pass", 2, "returned a NoneType"),
    ("async def events(since):\n    pass", 2, "returned a coroutine"),
    ("async def events(since):\n    yield {}", 2, "returned a async_generator"),
    ("def events(since):\n    return event(1)", 2, "returned a dict"),
    ("def events(since):\n    yield [1]", 1, "row 1 is a list: a row is a dict"),
    ("def events(since):\n    yield None", 1, "row 1 is a NoneType"),
    ("def events(since):\n    yield {1: 2}", 1, "a key of type int"),
    ("def events(since):\n    yield {'x' * 64: 2}", 1, "1 to 63 bytes"),
    ("def events(since):\n    yield {}", 1, "no column"),
    ("def events(since):\n    yield from ()", 1, "yielded no row"),
    ("def events(since):\n    yield {'id': 1, 'at': None}", 1, "row 1, id = 1 has no at"),
    ("def events(since):\n    yield {'at': BEGIN}", 1, "'id' is NULL, and part of the key"),
    ("def events(since):\n    yield {'id': 1, 'at': 'x'}", 1, "data_type is timestamptz"),
    ("def events(since):\n    yield event(1, x=object())", 1, "'x' has a object"),
    ("def events(since):\n    yield event(1, x=1)\n    yield event(2, x='')", 1, "make them one"),
    ("def events(since):\n    yield event(1, _exported_at=1)", 1, "_exported_at"),
    ("def events(since):\n    yield event(1, name='a\\0')", 1, "NUL"),
    ("def events(since):\n    yield event(1, name='\\ud800')", 1, "surrogate): row 1, id = 1"),
    (
        "def events(since):\n    yield event(1, x=10**5000)",
        1,
        "row 1, id = 1 or one of the 0 after",
    ),
    ("def events(since):\n    yield event(1, j={'x': float('nan')})", 1, "NaN"),
    ("import nothing_there", 1, "No module named 'nothing_there'"),
    ("def events(since:\n", 1, "readers/shop.py:14: SyntaxError"),
    ("raise SystemExit(5)", 1, "SystemExit: 5"),
    (
        "def events(since):\n    token = os.environ['SHOP_TOKEN']\n"
        "    raise ValueError(token + ' //me:pw@host ?api_key=x')",
        1,
        "ValueError: *** //***@host ?api_key=***",
    ),
]


def test_what_is_wrong_is_said_in_a_line(shop: Workplace) -> None:
    for text, status, said in WRONG:
        write(shop, text + "\n")
        found = failed(shop, status=status, SHOP_TOKEN="a-secret")
        assert said in found, found
        assert "models/sources.yml:5" in found, found
    assert position(shop)["cursor"] is None


DECLARED = [
    ("readers.shop:events", "readers.none:events", "there is no module readers.none"),
    ("readers.shop:events", "reader.shop:events", "there is no module reader"),
    ("readers.shop:events", "readers/shop.py", "must name a module and a function"),
    ("        conflict_columns: [id]\n", "", "only a key tells"),
    ("conflict_columns: [id]", "mode: append", "is required with source.rows"),
    ("conflict_columns: [id]", "{0}\n        mode: append", "must be upsert"),
    ("conflict_columns: [id]", "{0}\n        deletes: mark", "must be ignore"),
    ("rows:", "table: x\n          rows:", "source.table has no place with source.rows"),
    ("rows:", "sweep: 1 day\n          rows:", "source.sweep has no place with"),
    ("field: at", "field: at, id_field: id", "id_field has no place"),
    ("cursor: {field: at}", "in_order: true", "source.in_order needs source.cursor"),
    ("rows: readers.shop:events", "table: x\n          in_order: true", "goes with source.rows"),
    ("field: at", "field: at, lookback: 5", "lookback does not fit"),
]


def test_a_wrong_definition_is_refused(shop: Workplace) -> None:
    write(shop, "def events(since):\n    yield event(1)\n")
    for old, new, said in DECLARED:
        shop.define(EVENT.replace(old, new.replace("{0}", old)))
        found = failed(shop, status=2)
        assert said in found, found
        assert "models/sources.yml:5" in found, found


def test_other_commands_neither_import_it_nor_fail(shop: Workplace) -> None:
    write(shop, "called('import')\ndef events(since):\n    yield event(1)\n")
    (shop.folder / "profiles.yml").write_text(
        "dbt_exporter:\n  target: t\n  outputs:\n"
        "    t: {type: postgres, host: h, user: u, dbname: d}\n"
    )

    def run(*words: str) -> str:
        done = shop.run("exporter", *words)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), (words, done)
        return done.stdout + done.stderr

    for _ in range(2):
        assert "Event source: rows of readers.shop:events" in run("check")
        assert "readers.shop:events(" in run("load", "--dry-run")
        assert "readers.shop:events(" in run("load", "--dry-run", "--json")
        run("status")
        run("state", "show")
        run("check", "--grants")
        run("new", "--list")
        assert "left out, since a function yields its rows" in run("verify")
        for words in (
            ("verify", "Event"),
            ("load", "Event", "--sweep"),
            ("load", "Event", "--reconcile"),
            ("state", "adopt", "Event"),
            ("state", "set", "Event", "2026-01-01"),
            ("db", "new", "event", "--from", "Event"),
        ):
            done = shop.run("exporter", *words)
            assert (done.returncode, "models/sources.yml:5" in done.stderr) == (2, True), words
            assert "Traceback" not in done.stderr
        shop.run("exporter", "state", "reset", "Event")
        assert calls(shop) in ([], ["'import'"])
        if not calls(shop):
            shop.load()
