"""Every type of PostgreSQL, with values of each: the list that the tests of types share."""

from __future__ import annotations

import json

import psycopg

from tests.conftest import Workplace, compare

ROWS = 1_000
TEXT = "md5((random() * i)::text)"
WHOLE = "(random() * 2e4 - 1e4)::int"
MOMENT = "timestamp '1900-01-01' + random() * interval '300 years'"
POINT = "point(random() * 1e3, random() * -1e3)"

# type: the edge cases, and an expression for the others (i is the row's number)
TYPES: dict[str, tuple[list[str], str]] = {
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
    "numeric(3,-2)": (["NaN", "-99900"], "random() * 9e4"),
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
    "character varying": (["", " "], TEXT),
    "character(7)": (["", "a", "abcdefg"], f"left({TEXT}, i % 8)"),
    "bpchar": (["", "a  "], f"left({TEXT}, i % 8)"),
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
    "interval day to second(3)": (["0", "-1 day 00:00:00.001"], "random() * interval '9 days'"),
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
    "txid_snapshot": (["1:1:"], "(i || ':' || i + 9 || ':' || i + 1)::txid_snapshot"),
    "int4multirange": (["{}", "{[1,2),[5,)}"], f"int4multirange(int4range({WHOLE}, 20000))"),
    "int8multirange": (["{}"], f"int8multirange(int8range({WHOLE}, null))"),
    "nummultirange": (["{}"], f"nummultirange(numrange({WHOLE}, 20000.50))"),
    "tsmultirange": (["{}"], f"tsmultirange(tsrange({MOMENT}, null))"),
    "tstzmultirange": (["{}"], f"tstzmultirange(tstzrange({MOMENT}, null))"),
    "datemultirange": (["{}"], f"datemultirange(daterange(({MOMENT})::date, null))"),
    "regtype": (
        ["integer", "timestamp with time zone"],
        "(array['text', 'int4'])[1 + i % 2]::regtype",
    ),
    "regclass": (["pg_class"], "'pg_type'::regclass"),
    "regproc": (["now"], "'now'::regproc"),
    "regprocedure": (["now()"], "'lower(text)'::regprocedure"),
    "regoper": (["||/"], "'||/'::regoper"),
    "regoperator": (["+(integer,integer)"], "'-(integer,integer)'::regoperator"),
    "regrole": (["pg_monitor"], "'pg_signal_backend'::regrole"),
    "regnamespace": (["pg_catalog"], "'public'::regnamespace"),
    "regcollation": (['"C"'], "'\"POSIX\"'::regcollation"),
    "regconfig": (["simple"], "'english'::regconfig"),
    "regdictionary": (["simple"], "'english_stem'::regdictionary"),
    "refcursor": (["", "c"], f"{TEXT}::refcursor"),
    "aclitem": (["=r/pg_monitor"], "'=w/pg_monitor'::aclitem"),
    "mood": (["so, so", 'very "ok"'], "(array['sad', 'so, so'])[1 + i % 2]::mood"),
    "positive": (["1"], "i::positive"),
    "words": (['{"a,b",NULL}'], "array[i::text, null]::words"),
    "pair": (['(1,"a ""b"", c")', "(,)"], f"row(i, {TEXT})::pair"),
    "moods": (["{}"], "array['sad', null]::mood[]"),
    "floatrange": (["[1.5,2.5)"], "floatrange(random(), 9)"),
    "integer[]": (["{}", "[2:3]={7,8}", "{{{1},{NULL}},{{2},{3}}}"], "array[i, null]"),
    "text[]": (["{}", '[0:1]={NULL,"a, \\"b\\""}'], f"array[{TEXT}, '']"),
    "code": (["", "é"], f"left({TEXT}, i % 5)"),
    "amount": (["NaN", "0.10"], "random() * 1e5"),
    "amounts": (["{1,NULL}"], "array[random() * 1e5]::amounts"),
    "price": (["-0.01"], "i::money"),
    "line_of": (['("(1,""a b"")",{a},sad)'], f"row(row(i, {TEXT}), array[{TEXT}], 'sad')::line_of"),
}
# not on servers before these versions
SINCE = {kind: 140000 for kind in TYPES if kind.endswith("multirange")}
SINCE["numeric(3,-2)"] = 150000
# edge cases that servers before these versions refuse
EDGES_SINCE = {"numeric": (140000, "Infinity"), "interval": (170000, "-infinity")}
# A column can have these, but no value of theirs can be written.
NO_INPUT = {
    "gtsvector",
    "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
    "pg_dependencies",
    "pg_mcv_list",
    "pg_ndistinct",
    "pg_node_tree",
}
SHAPE = """
- name: shape
  config:
    meta:
      exporter:
        key: Shape
        source: {{table: {}, cursor: {{field: id}}}}
        conflict_columns: [id]
"""
NAMES = ["Order", 'weird"name', "user", "ü", "x" * 63, "a b", "_exporter", "%s", "{}"]
PREPARE = """
create type mood as enum ('sad', 'so, so', 'very "ok"');
create domain positive as integer check (value > 0);
create domain words as text[];
create type pair as (a int, b text);
create domain moods as mood[];
create type floatrange as range (subtype = float8);
create domain longer as varchar(5);
create domain code as longer not null default '';
create domain amount as numeric(8,2);
create domain amounts as amount[];
create domain price as money;
create type line_of as (p pair, tags text[], m mood);
"""


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def column(kind: str, letter: str = "c") -> str:
    """The name of a type's column in the table that ``make`` makes; ``a``: of its array's."""
    return f"{letter}{list(TYPES).index(kind)}"


def version(place: Workplace, url: str) -> int:
    return int(place.query(url, "select current_setting('server_version_num')::int")[0][0])


def make(place: Workplace) -> dict[str, str]:
    """Make the table `typed` and a view of it at the source; return the columns' types."""
    source, destination = version(place, place.core), version(place, place.analytics)
    place.query(place.core, PREPARE)
    columns, values = {}, []
    for kind, (edges, expression) in TYPES.items():
        if source < SINCE.get(kind, 0) or (kind == "xml" and not has_xml(place, place.core)):
            continue
        since, edge = EDGES_SINCE.get(kind, (0, None))
        known = [*edges, edge] if edge and min(source, destination) >= since else edges
        literals = ", ".join("'" + text.replace("'", "''") + "'" for text in known)
        columns[column(kind)] = kind
        values.append(
            f"case when i <= {len(known)} then (array[{literals}])[i]::{kind}"
            f" when i % 50 = 0 and {kind != 'code'} then null else ({expression})::{kind} end"
        )
        if not kind.endswith(("vector", "[]")) or kind == "tsvector":  # arrays already
            columns[column(kind, "a")] = f"{kind}[]"
            one = f"({expression})::{kind}"
            null = one if kind == "code" else "null"
            word = "sad" if kind == "moods" else "1.10"
            nested = f"'{{\"{{{word},NULL}}\",NULL}}'::{kind}[]"  # a domain over an array
            plain = f"array[[{one}, {null}], [{null}, {one}]]"
            values.append(nested if kind in ("words", "moods", "amounts") else plain)
    for name in NAMES:
        columns[quoted(name)] = "text"
        values.append(TEXT)
    virtual = ", tripled int generated always as (id * 3) virtual" if source >= 180000 else ""
    declared = ", ".join(f"{name} {kind}" for name, kind in columns.items())
    place.query(
        place.core,
        f"create table typed (id int primary key, gone int, {declared},"
        f" doubled int generated always as (id * 2) stored{virtual},"
        " counted bigint generated by default as identity, at timestamptz not null default now());"
        " alter table typed drop gone;"
        f"insert into typed (id, {', '.join(columns)})"
        f" select i, {', '.join(values)} from generate_series(1, {ROWS}) as i;"
        "create view typed_view as select * from typed",
    )
    return columns


def has_xml(place: Workplace, url: str) -> bool:
    """Whether the server was built with libxml: the package's was not."""
    try:
        place.query(url, "select ''::xml")
    except psycopg.errors.FeatureNotSupported:
        return False
    return True


def declare(place: Workplace, **source: object) -> None:
    """Declare the table `typed`, which is read so."""
    place.define(
        f"""
- name: typed
  config:
    meta:
      exporter:
        key: Typed
        source: {json.dumps(source)}
        conflict_columns: [id]
"""
    )


def landed_alike(place: Workplace, relation: str, exclude: list[str]) -> None:
    """Load the relation without those columns; assert that raw has its source's text."""
    cursor = {"field": "at", "id_field": "id"}
    declare(place, table=relation, exclude=exclude or None, cursor=cursor)
    names = [
        quoted(name)
        for (name,) in place.query(
            place.core,
            "select attname from pg_attribute where attrelid = 'typed'::regclass and attnum > 0"
            " and not attisdropped",
        )
        if name not in exclude
    ]
    assert place.load()["rows_written"] == ROWS
    digests = ", ".join(
        f"md5(string_agg(coalesce({name}::text, 'null'), '|' order by id))" for name in names
    )
    here = place.query(place.core, f"select {digests} from typed")[0]
    there = place.query(place.analytics, f"select {digests} from analytics_raw.typed")[0]
    differ = [name for name, ours, theirs in zip(names, here, there, strict=True) if ours != theirs]
    assert not differ, differ
    assert place.load("--full-refresh")["rows_written"] == 0
    place.query(
        place.core,
        "update typed set c0 = not c0, at = clock_timestamp() where id % 10 = 1",
    )
    place.load()
    compare(place, "typed", "analytics_raw.typed", ", ".join(f"{name}::text" for name in names))
