"""Every type of PostgreSQL over a thousand values each, by the binary and by the text path."""

from __future__ import annotations

import pytest

from tests.conftest import Workplace, compare

ROWS = 1_000
TEXT = "md5((random() * i)::text)"
WHOLE = "(random() * 2e4 - 1e4)::int"
MOMENT = "timestamp '1900-01-01' + random() * interval '300 years'"
POINT = "point(random() * 1e3, random() * -1e3)"

# type: the edge cases, and an expression for the others (i is the row's number)
SCALARS: dict[str, tuple[list[str], str]] = {
    "boolean": (["t", "f"], "random() > 0.5"),
    '"char"': (["", "a", "\\377"], "chr(33 + i % 90)"),
    "name": (["x" * 63, ""], f"({TEXT})"),
    "smallint": (["-32768", "32767"], WHOLE),
    "integer": (["-2147483648", "2147483647"], WHOLE),
    "bigint": (["-9223372036854775808", "9223372036854775807"], "(random() * 9e18)::bigint"),
    "real": (["NaN", "Infinity", "-Infinity", "-0", "1e-45", "3.4028235e38"], "random() * 1e9"),
    "double precision": (
        ["NaN", "Infinity", "-Infinity", "-0", "5e-324", "1.7976931348623157e308"],
        "random() * 1e300",
    ),
    "numeric": (
        ["NaN", "0", "-0.000", "1e-30", "1" + "0" * 100, "0." + "0" * 200 + "1", "1.10", "-1e1000"],
        "(random() * 1e9)::numeric * random()::numeric",
    ),
    "numeric(12,3)": (["NaN", "-999999999.999", "0.001"], "random() * 1e8"),
    "money": (["-92233720368547758.08", "92233720368547758.07"], f"{WHOLE}::money"),
    "text": (
        [
            "",
            "\\",
            "\\N",
            "\\.",
            "tab\tline\ncr\r",
            "é😀",
            "NULL",
            '"quoted"',
            "'",
            "{,}",
            "\x01\x7f",
        ],
        f"repeat({TEXT}, 1 + i % 20)",
    ),
    "character varying(40)": (["", " x ", "é" * 40], TEXT),
    "character(7)": (["", "a", "abcdefg"], f"left({TEXT}, i % 8)"),
    "bytea": (["", "\\x00", "\\xff5c0a0d09"], f"decode({TEXT}, 'hex')"),
    "date": (
        ["infinity", "-infinity", "4713-01-01 BC", "5874897-12-31", "0001-01-01"],
        f"({MOMENT})",
    ),
    "time without time zone": (["00:00", "24:00:00", "23:59:59.999999"], f"({MOMENT})::time"),
    "time(3) with time zone": (
        ["00:00+15:59", "24:00:00-15:59:59", "01:02:03.004+05:30"],
        f"(({MOMENT})::time || '-03:30')::timetz",
    ),
    "timestamp without time zone": (
        ["infinity", "-infinity", "4713-01-01 00:00:00 BC", "294276-12-31 23:59:59.999999"],
        MOMENT,
    ),
    "timestamp(3) with time zone": (
        ["infinity", "-infinity", "4714-11-25 00:00:00+00 BC", "294276-12-31 23:59:59.999+00"],
        MOMENT,
    ),
    "interval": (
        ["0", "-178000000 years", "178000000 years", "1 mon -1 day 00:00:00.000001", "-00:00:01.5"],
        "random() * interval '9 years 8 months 7 days 6 hours'",
    ),
    "uuid": (["00000000-0000-0000-0000-000000000000"], f"{TEXT}::uuid"),
    "json": (
        ["null", "1e400", '{"a": 1, "a": 2 ,"b":[ ]}', '"\\u0000 \\ud83d\\ude00"', " [1.10] "],
        f"json_build_object('k', {TEXT}, 'n', random())",
    ),
    "jsonb": (
        ["null", "1e400", '{"b": [1.10, null], "a": "\\\\ \\n \\u00e9"}', "12345678901234567890.5"],
        f"jsonb_build_object('k', {TEXT}, 'n', random())",
    ),
    "jsonpath": (["$", 'strict $."a"[*] ? (@ > 1)'], "('$.a[' || i || ']')::jsonpath"),
    "xml": (["", "<a/>", "text &amp; <b c='1'/>"], f"('<a>' || {TEXT} || '</a>')::xml"),
    "bit(5)": (["00000", "11111"], "(i % 32)::bit(5)"),
    "bit varying": (["", "1", "0" * 99], "(i)::bit(20)::varbit"),
    "inet": (
        ["0.0.0.0", "10.1.2.3/8", "::1/128", "2001:db8::ff00:42:8329/64"],
        "'10.0.0.0'::inet + i",
    ),
    "cidr": (["0.0.0.0/0", "2001:db8::/32"], "set_masklen('10.0.0.0'::cidr, 8 + i % 24)"),
    "macaddr": (["00:00:00:00:00:00"], f"left({TEXT}, 12)::macaddr"),
    "macaddr8": (["ff:ff:ff:ff:ff:ff:ff:ff"], f"left({TEXT}, 16)::macaddr8"),
    "point": (["(NaN,Infinity)", "(-0,1e-300)"], POINT),
    "line": (["{1,-1,0}"], "('{1,' || random() || ',3}')::line"),
    "lseg": (["[(0,0),(1,1)]"], f"lseg({POINT}, {POINT})"),
    "box": (["(1,1),(0,0)"], f"box({POINT}, {POINT})"),
    "path": (
        ["[(0,0),(1,1)]", "((0,0),(1,1))"],
        f"('[' || {POINT} || ',' || {POINT} || ']')::path",
    ),
    "polygon": (["((0,0),(1,1),(1,0))"], f"polygon(box({POINT}, {POINT}))"),
    "circle": (["<(0,0),0>"], f"circle({POINT}, random())"),
    "int4range": (["empty", "(,)", "[1,1]"], f"int4range({WHOLE}, 20000)"),
    "int8range": (["empty", "[5,)"], f"int8range({WHOLE}, null, '()')"),
    "numrange": (["empty", "(1.10,2.50]"], f"numrange({WHOLE}, 20000.50, '(]')"),
    "tsrange": (["[-infinity,infinity]", "empty"], f"tsrange({MOMENT}, null)"),
    "tstzrange": (["(,2026-01-01 00:00:00.000001+02]"], f"tstzrange({MOMENT}, 'infinity')"),
    "daterange": (["empty", "[2026-01-01,2026-01-02]"], f"daterange(({MOMENT})::date, null)"),
    "tsvector": (["", "'a b':1A 'it''s':2"], f"to_tsvector('simple', {TEXT} || ' the cat')"),
    "tsquery": (["", "'a b' & !'c':*A <2> 'd'"], f"plainto_tsquery('simple', {TEXT} || ' cat')"),
    "oid": (["0", "4294967295"], "i::oid"),
    "oidvector": (["", "1 4294967295"], "(i || ' 7')::oidvector"),
    "int2vector": (["", "-1 2"], "(i || ' 7')::int2vector"),
    "xid": (["0", "4294967295"], "i::text::xid"),
    "xid8": (["18446744073709551615"], "i::text::xid8"),
    "cid": (["4294967295"], "i::text::cid"),
    "tid": (["(4294967295,65535)"], "('(' || i || ',1)')::tid"),
    "pg_lsn": (["0/0", "FFFFFFFF/FFFFFFFF"], "('1/' || to_hex(i))::pg_lsn"),
    "pg_snapshot": (["1:1:"], "(i || ':' || i + 9 || ':' || i + 1)::pg_snapshot"),
    "regtype": (
        ["integer", "timestamp with time zone"],
        "(array['text', 'int4'])[1 + i % 2]::regtype",
    ),
    "regclass": (["pg_class"], "'pg_type'::regclass"),
    "regproc": (["now"], "'now'::regproc"),
    "regrole": (["pg_monitor"], "'pg_signal_backend'::regrole"),
    "regconfig": (["simple"], "'english'::regconfig"),
    "refcursor": (["", "c"], f"{TEXT}::refcursor"),
    "mood": (["so, so", 'very "ok"'], "(array['sad', 'so, so'])[1 + i % 2]::mood"),
    "positive": (["1"], "i::positive"),
    "words": (['{"a,b",NULL}'], "array[i::text, null]::words"),
    "pair": (['(1,"a ""b"", c")', "(,)"], f"row(i, {TEXT})::pair"),
    "moods": (["{}"], "array['sad', null]::mood[]"),
    "floatrange": (["[1.5,2.5)"], "floatrange(random(), 9)"),
}
MULTIRANGES = {
    "int4multirange": (["{}", "{[1,2),[5,)}"], f"int4multirange(int4range({WHOLE}, 20000))"),
    "tstzmultirange": (["{}"], f"tstzmultirange(tstzrange({MOMENT}, null))"),
}
NAMES = ["Order", 'weird"name', "user", "ü", "x" * 63, "a b", "_exporter", "%s", "{}"]
PREPARE = """
create type mood as enum ('sad', 'so, so', 'very "ok"');
create domain positive as integer check (value > 0);
create domain words as text[];
create type pair as (a int, b text);
create domain moods as mood[];
create type floatrange as range (subtype = float8);
"""


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _make(place: Workplace) -> None:
    version = place.query(place.core, "select current_setting('server_version_num')::int")[0][0]
    types = {**SCALARS, **(MULTIRANGES if version >= 140000 else {})}
    place.query(place.core, PREPARE)
    columns, values = [], []
    for number, (kind, (edges, expression)) in enumerate(types.items()):
        literals = ", ".join("'" + edge.replace("'", "''") + "'" for edge in edges)
        columns.append(f"c{number} {kind}")
        values.append(
            f"case when i <= {len(edges)} then (array[{literals}])[i]::{kind}"
            f" when i % 50 = 0 then null else ({expression})::{kind} end"
        )
        if kind not in ("words", "moods", "oidvector", "int2vector"):  # arrays already
            columns.append(f"a{number} {kind}[]")
            values.append(f"array[[({expression})::{kind}, null], [null, ({expression})::{kind}]]")
    columns += [f"{_quoted(name)} text" for name in NAMES]
    values += [TEXT] * len(NAMES)
    place.query(
        place.core,
        f"create table typed (id int primary key, gone int, {', '.join(columns)},"
        " doubled int generated always as (id * 2) stored,"
        " counted bigint generated by default as identity, at timestamptz not null default now());"
        " alter table typed drop gone",
    )
    names = [
        column.rpartition(" ")[0] if column.startswith('"') else column.split()[0]
        for column in columns
    ]
    place.query(
        place.core,
        f"insert into typed (id, {', '.join(names)})"
        f" select i, {', '.join(values)} from generate_series(1, {ROWS}) as i",
    )
    place.query(place.core, "create view typed_view as select * from typed")


def _same(place: Workplace, column: str) -> bool:
    digest = f"select md5(string_agg(coalesce({column}, 'null'), '|' order by id)) from "
    here = place.query(place.core, digest + "typed")
    return here == place.query(place.analytics, digest + "analytics_raw.typed")


_TEXT_ONLY = [list(SCALARS).index(kind) for kind in ("tsquery", "oidvector", "int2vector")]
NOT_BINARY = [f"c{number}" for number in _TEXT_ONLY] + [f"a{_TEXT_ONLY[0]}"]


@pytest.mark.parametrize(
    ("relation", "exclude"),
    [("typed", NOT_BINARY), ("typed", []), ("typed_view", [])],
    ids=["binary", "text, in blocks", "text, of a view"],
)
def test_every_type_lands_as_it_is(place: Workplace, relation: str, exclude: list[str]) -> None:
    """A first load is binary unless a column forbids it; then every row comes again, in text."""
    _make(place)
    place.define(
        f"""
- name: typed
  config:
    meta:
      exporter:
        key: Typed
        source:
          table: {relation}
          exclude: {exclude or "null"}
          cursor: {{field: at, id_field: id}}
        conflict_columns: [id]
"""
    )
    landed = place.query(
        place.core,
        "select attname from pg_attribute where attrelid = 'typed'::regclass and attnum > 0"
        " and not attisdropped",
    )
    names = ", ".join(f"{_quoted(name)}::text" for (name,) in landed if name not in exclude)
    assert place.load()["rows_written"] == ROWS
    assert not [name for name in names.split(", ") if not _same(place, name)]
    compare(place, "typed", "analytics_raw.typed", names)
    # what points into a catalog, or is of a type that the destination lacks, is text
    for column in ("pair", "mood", "floatrange", "regclass", "refcursor"):
        number = list(SCALARS).index(column)
        kinds = f"select pg_typeof(c{number})::text, pg_typeof(a{number})::text"
        found = place.query(place.analytics, kinds + " from analytics_raw.typed limit 1")
        assert found == [("text", "text[]")]
    assert place.load("--full-refresh")["rows_written"] == 0
    change = "update typed set c0 = not c0, at = clock_timestamp() where c0 is not null"
    place.query(place.core, change)
    place.load()
    compare(place, "typed", "analytics_raw.typed", names)


SHAPE = """
- name: shape
  config:
    meta:
      exporter:
        key: Shape
        source: {{table: {}, cursor: {{field: id}}}}
        conflict_columns: [id]
"""
SHAPES = {
    "500 columns": "create table shape (id int primary key, {});"
    " insert into shape (id, c7, c499) select i, i, 'x' from generate_series(1, 3000) i".format(
        ", ".join(f"c{number} text" for number in range(1, 500))
    ),
    "the key alone": "create table shape (id int primary key);"
    " insert into shape select generate_series(1, 3000)",
    "empty": "create table shape (id int primary key, v text)",
    "partitioned": "create table shape (id int, v text, primary key (id)) partition by range (id);"
    " create table low partition of shape for values from (0) to (1000);"
    " create table high partition of shape for values from (1000) to (9000);"
    " insert into shape select i, 'v' from generate_series(1, 3000) i",
    "materialized": "create materialized view shape as"
    " select i as id, 'v'::text as v from generate_series(1, 3000) i",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_tables_of_any_shape_land(place: Workplace, shape: str) -> None:
    place.query(place.core, SHAPES[shape])
    place.define(SHAPE.format("shape"))
    for _ in range(2):
        place.load()
        rows = [
            place.query(url, f"select to_jsonb(s) - '_exported_at' from {table} s order by id")
            for url, table in ((place.core, "shape"), (place.analytics, "analytics_raw.shape"))
        ]
        assert rows[0] == rows[1]
        if shape not in ("empty", "materialized"):
            place.query(place.core, "insert into shape (id) select 1 + max(id) from shape")


def test_source_in_latin1(place: Workplace, servers: tuple[str, str]) -> None:
    name = place.core.rpartition("/")[2].partition("?")[0]
    place.query(
        servers[0],
        f"create database {name}_latin1 encoding 'LATIN1' lc_collate 'C' lc_ctype 'C'"
        " template template0",
    )
    place.core = place.core.replace(name, f"{name}_latin1")
    utf8 = f"{place.core}{'&' if '?' in place.core else '?'}client_encoding=utf8"
    try:
        place.query(
            utf8,
            'create table shape (id int primary key, v text, "é" text);'
            " insert into shape values (1, 'été', 'ÿ'), (2, null, '\\')",
        )
        place.define(SHAPE.format("shape"))
        place.load()
        place.query(utf8, "insert into shape values (3, 'ñ', 'ü')")
        place.load()
        landed = 'select id, v, "é" from {} order by id'
        rows = place.query(utf8, landed.format("shape"))
        assert place.query(place.analytics, landed.format("analytics_raw.shape")) == rows
        assert rows[0] == (1, "été", "ÿ")
    finally:
        place.query(servers[0], f"drop database {name}_latin1 with (force)")
