"""Python models: values, results, errors, transactions, and dbt's commands around them."""

from __future__ import annotations

import re
import subprocess
import textwrap

import pytest

from tests.conftest import Workplace, compare
from tests.helpers.every_type import has_xml

TYPES = """
create type mood as enum ('sad', 'so, so "x"');
create table typed (
    id bigint primary key, small smallint, i integer, num numeric, sized numeric(12, 3), r real,
    f double precision, b boolean, t text, v varchar(20), c char(4), d date, ts timestamp,
    tz timestamptz, ti time, tt timetz, iv interval, u uuid, bin bytea, js json, jb jsonb,
    a text[], n numeric[], m int[], tsa timestamptz[], jba jsonb[], e mood, net inet, rg numrange,
    p point, x xml, bits bit(3), mon money
);
insert into typed (id) values (1);
insert into typed values (
    2, -32768, 2147483647, 123456789012345678901234567890.000000000000001, 1.100, 1.17549e-38,
    2.2250738585072014e-308, true, E'tab\\t line\\n cr\\r \\\\N \\\\ "quote" é 😀', 'var', 'ch  ',
    '0044-03-15 BC', '2026-01-02 03:04:05.000001', '2026-01-02 03:04:05.999999+02',
    '23:59:59.999999', '01:02:03.000004+05:30', '1 year 2 months -3 days 04:05:06.000007',
    'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '\\x00ff5c0a09', '{"b": 1.1, "a": [null, "\\u00e9"]}',
    '{"big": 12345678901234567890.123456789, "t": "a\\\\b\\n", "n": null, "z": 1.5}',
    array['a', null, 'NULL', 'q"\\\\,{}', ''], array[1.10, 'NaN'], '{{1,2},{3,null}}',
    array['2026-01-02 03:04:05.5+00'::timestamptz, 'infinity'], array['{"a": [1]}'::jsonb, null],
    'so, so "x"', '10.0.0.1/8', '[1.50,2)', '(1,2.5)', '<a>b</a>', '101', 12.34
);
insert into typed (id, num, f, r, d, ts, tz, iv, ti, jb, js, m)
values (3, 'NaN', 'NaN', '-Infinity', 'infinity', '-infinity', 'infinity', '3 days 00:00:01.5',
        '24:00:00', '[]', 'null', '{}'),
       (4, '1e-30', 'Infinity', 0.1, '9999-12-31', '10000-01-01 00:00:00', '0001-01-01 00:00:00 BC',
        '-00:00:00.000001', '00:00', '"text"', '"text"', null),
       (5, 1.10, -0.0, 1, '0001-01-01', '9999-12-31 23:59:59', '2026-06-01 00:00:00-11', '0',
        '12:00', 'true', '1e400', '{5,6}');
"""


@pytest.fixture
def models(bare: Workplace) -> Workplace:
    """The product's macros without its models; models that a test writes go to `analytics`."""
    (bare.folder / "models" / "sources.yml").write_text(
        "version: 2\nsources: [{name: public, tables: [{name: typed}, {name: event}]}]\n"
    )
    return bare


def python(place: Workplace, name: str, body: str, config: str = "", head: str = "") -> None:
    """Write a model: the body of its function, after a config."""
    text = "\n" + head + "\n\ndef model(dbt, session):\n"
    text += f"    dbt.config(schema='analytics', {config})\n" + textwrap.indent(body, "    ") + "\n"
    (place.folder / "models" / f"{name}.py").write_text(text)


def test_values_are_exact_both_ways(models: Workplace) -> None:
    xml = "xml" if has_xml(models, models.analytics) else "text"  # a server without libxml
    models.query(models.analytics, TYPES.replace("x xml", f"x {xml}"))
    rows = "dbt.source('public', 'typed')"
    python(models, "rows", f"return {rows}.map(lambda row: row)")
    python(models, "relation", f"return {rows}")
    python(models, "narrowed", f"return {rows}.where('id > %s', [2]).select('id', 'num').limit(2)")
    scalar = "id, small, i, num, sized, r, f, b, t, v, c, u, bin, js, jb, a, n, e, net, rg, x, mon"
    scalars = f"{rows}.select({', '.join(repr(n.strip()) for n in scalar.split(','))})"
    for name in ("arrow", "pandas", "polars"):
        python(models, name, f"return {scalars}.{name}()")
    python(models, "reader", f"return iter({scalars}.arrow().to_batches(2))")
    python(models, "ibis", f"t = {rows}.ibis()\nreturn t.filter(t.id > 2)[['id', 'num']]")
    models.dbt("run")
    kinds = (
        "select attname, format_type(atttypid, atttypmod) from pg_attribute where attrelid ="
        " '{}'::regclass and attnum > 0 and attname not in ('v', 'c', 'bits') order by 1"
    )
    compared = "id, num, sized, r, f, b, t, v, d, ts, tz, ti, tt, iv, u, bin, js::jsonb, jb, a, n, "
    compared += "m, tsa, jba, e, net, rg, p::text, x::text, bits, mon"
    models.core = models.analytics  # the table that the models read is here, too
    for name in ("rows", "relation"):
        compare(models, "typed", f"analytics.{name}", compared)
        found = models.query(models.analytics, kinds.format(f"analytics.{name}"))
        assert found == models.query(models.analytics, kinds.format("typed"))
    without_decoded = scalar.replace("js", "js::jsonb").replace(" x,", " x::text,")
    for name in ("arrow", "pandas", "polars", "reader"):
        compare(models, "typed", f"analytics.{name}", without_decoded)
    assert len(models.query(models.analytics, "select id, num from analytics.narrowed")) == 2
    assert len(models.query(models.analytics, "select id, num from analytics.ibis")) == 3


EVENTS = """
create table event (id bigint primary key, note text, n int, _exported_at timestamptz);
insert into event select n, 'note ' || n, n, timestamptz '2026-01-01' + n * interval '1 second'
from generate_series(1, 12000) as n;
"""
ROWS = "dbt.source('public', 'event')"


def test_types_that_only_values_tell(models: Workplace) -> None:
    values = {
        "whole": "7",
        "huge": "2**70",
        "exact": "Decimal('1.10')",
        "f": "1.5",
        "yes": "True",
        "word": "'a\\tb'",
        "naive": "datetime(2026, 1, 2, 3, 4, 5, 6)",
        "aware": "datetime(2026, 1, 2, tzinfo=timezone.utc)",
        "day": "date(2026, 1, 2)",
        "clock": "time(1, 2, 3, 4)",
        "span": "timedelta(days=1, microseconds=2)",
        "mapping": "{'a': [Decimal('1.10'), None]}",
        "several": "[1, 'b']",
        "key": "UUID(int=1)",
        "bin": "b'\\x00\\xff'",
        "kind": "Kind.ONE",
    }
    head = "from datetime import *\nfrom decimal import Decimal\nfrom enum import Enum\n"
    head += "from uuid import UUID\nclass Kind(Enum):\n    ONE = 'one'\n"
    row = "{" + ", ".join(f"'{name}': {value}" for name, value in values.items()) + "}"
    body = f"full = {row}\nempty = dict.fromkeys(full)\n"
    # the types come late, and the last row widens one of them
    body += "yield from [empty] * 6000\nyield full\nyield None\nyield {'whole': Decimal('7.5')}"
    python(models, "inferred", "return rows()", head=head + "def rows():\n" + _indent(body))
    python(models, "declared", "return [{'a': 1, 'b': [1, None], 'c': 'x', 'd': None}]")
    (models.folder / "models" / "declared.yml").write_text(
        "version: 2\nmodels: [{name: declared, columns:"
        " [{name: a, data_type: smallint}, {name: b, data_type: 'numeric[]'},"
        " {name: c, data_type: jsonb}, {name: d, data_type: inet}]}]\n"
    )
    models.dbt("run")
    kinds = (
        "select format_type(atttypid, atttypmod) from pg_attribute where attrelid ="
        " 'analytics.{}'::regclass and attnum > 0 order by attnum"
    )
    found = models.query(models.analytics, kinds.format("inferred"))
    assert ",".join(kind for (kind,) in found) == (
        "numeric,numeric,numeric,double precision,boolean,text,timestamp without time zone,"
        "timestamp with time zone,date,time without time zone,interval,jsonb,jsonb,uuid,bytea,text"
    )
    found = models.query(models.analytics, "select * from analytics.inferred where key is not null")
    assert [str(value) for value in found[0][:8]] == [
        "7", str(2**70), "1.10", "1.5", "True", "a\tb",
        "2026-01-02 03:04:05.000006", "2026-01-02 00:00:00+00:00",
    ]  # fmt: skip
    assert [str(value) for value in found[0][8:]] == [
        "2026-01-02", "01:02:03.000004", "1 day, 0:00:00.000002", "{'a': [1.1, None]}",
        "[1, 'b']", "00000000-0000-0000-0000-000000000001", "b'\\x00\\xff'", "one",
    ]  # fmt: skip
    assert models.query(models.analytics, "select count(*) from analytics.inferred") == [(6002,)]
    assert [kind for (kind,) in models.query(models.analytics, kinds.format("declared"))] == [
        "smallint", "numeric[]", "jsonb", "inet",
    ]  # fmt: skip


def _indent(text: str) -> str:
    return textwrap.indent(text, "    ")


# name: the model's body, and what dbt must say of it
REFUSED = {
    "row_function": (
        f"return {ROWS}.map(lambda row: {{'id': 1 // (row['id'] - 6543)}})",
        ["models/row_function.py", "line 6", "ZeroDivisionError", "row 6543, id = 6543"],
    ),
    "generator": ("return broken()", ["line 5, in broken", "ValueError: no"]),
    "nothing": ("return None", ["model() returned nothing"]),
    "number": ("return 5", ["model() returned a int"]),
    "tuples": ("return [(1, 2)]", ["row 1 is a tuple"]),
    "all_null": ("return [{'id': 1, 'gone': None}]", ["column 'gone' is null", "data_type: text"]),
    "no_row": ("return []", ["returned no row", "data_type"]),
    "mixed": ("return [{'a': 1}, {'a': 'x'}]", ["column 'a' has values of type"]),
    "unknown": (
        "return ({'a': n, **({'b': 1} if n == 5000 else {})} for n in range(5001))",
        ["row 5001 has a column 'b'"],
    ),
    "nul": (
        "return [{'id': 8, 'a': 'x'}, {'id': 9, 'a': 'secret\\0'}]",
        ["column 'a' cannot hold the character NUL", "row 2, id = 9"],
    ),
    "json_nul": ("return [{'a': {'b': '\\0'}}]", ["the character NUL"]),
    "odd": ("return [{'a': object()}]", ["column 'a' has a object"]),
    "copied": (
        f"return {ROWS}.map(lambda r: {{**r, 'n': r['n'] * 10**(6 if r['id'] > 9000 else 0)}})",
        ["column 'n': value is out of range for type integer: row 9001"],
    ),
    "sql": (f"return {ROWS}.where('missing > 1')", ['column "missing" does not exist']),
    "library": ("import no_such_library\nreturn []", ["No module named 'no_such_library'"]),
    "levels": (
        "import pandas\nf = pandas.DataFrame({'k': [1, 1], 'v': [1, 2]})\n"
        "return f.groupby('k').agg({'v': ['min', 'max']})",
        ["several levels", "'_'.join("],
    ),
    "twice": (
        "import pandas\nreturn pandas.DataFrame([[1, 2]], columns=['a', 'a'])",
        ["more than one column 'a'"],
    ),
    "arrow_twice": (
        "import pyarrow\nreturn pyarrow.table([[1], [2]], names=['a', 'a'])",
        ["more than one column 'a'"],
    ),
    "also_index": (
        "import pandas\nreturn pandas.DataFrame({'a': [1]}).set_index('a', drop=False)",
        ["more than one column 'a', the names of its index included"],
    ),
    "nameless": (
        "import pandas\nreturn pandas.DataFrame({'a': [1, 2]}, index=['x', 'y'])",
        ["an index without a name", "rename_axis", "reset_index(drop=True)"],
    ),
    "half_named": (
        "import pandas\nindex = pandas.MultiIndex.from_tuples([(1, 2)], names=['k', None])\n"
        "return pandas.DataFrame({'a': [1]}, index=index)",
        ["an index without a name"],
    ),
    "nanoseconds": (
        "import numpy\nt = numpy.datetime64('2026-01-01T00:00:00.000000001')\n"
        "return [{'id': 1, 'at': None}, {'id': 2, 'at': t}]",
        ["column 'at' has nanoseconds", "row 2"],
    ),
    "unitless": (
        "import numpy\nreturn [{'a': numpy.timedelta64(5)}]",
        ["column 'a' has a timedelta64 that no value of Python equals", "row 1"],
    ),
    "longdouble": (
        "import numpy\nreturn [{'a': numpy.longdouble(1)}]",
        ["column 'a' has a longdouble"],
    ),
    "lacking": (f"return {ROWS}.polars()", ["polars is not installed", "pip install polars"]),
}


def test_errors_say_where(models: Workplace) -> None:
    models.query(models.analytics, EVENTS)
    broken = "def broken():\n    yield {'a': 1}\n    raise ValueError('no')"
    heads = {"lacking": "import sys; sys.modules['polars'] = None", "generator": "\n" + broken}
    for name, (body, _) in REFUSED.items():
        head = heads.get(name, "")
        python(models, name, body, "unique_key='id'" if name == "nul" else "", head)
    done = models.run("dbt", "run", "--no-use-colors")
    assert done.returncode == 1
    # `Failure in model NAME` up to dbt 1.11, `[ERROR]: in model NAME` from 1.12 on
    parts = re.split(r"(?:Failure|\[ERROR\]:) in model (\w+) ", done.stdout)
    of_model = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert of_model.keys() == REFUSED.keys()
    for name, (_, expected) in REFUSED.items():
        said = of_model[name]
        for text in expected:
            assert text in said, (name, said)
        assert "exporter/python_models" not in said, said
        assert "secret" not in said
    assert (
        models.query(models.analytics, "select * from pg_tables where schemaname='analytics'") == []
    )


def test_named_index_of_a_frame_becomes_columns(models: Workplace) -> None:
    models.query(models.analytics, EVENTS)
    grouped = f"{ROWS}.pandas().astype({{'id': 'int64'}})"
    grouped += ".assign(half=lambda f: f['id'] % 2, third=lambda f: f['id'] % 3)"
    python(models, "one_key", f"return {grouped}.groupby('half').agg(total=('n', 'sum'))")
    python(models, "keys", f"return {grouped}.groupby(['half', 'third']).agg(total=('n', 'sum'))")
    python(models, "sliced", f"return {ROWS}.pandas()[10:20:2]")
    python(models, "filtered", f"f = {ROWS}.pandas()\nreturn f[f['id'] > 11990].set_index('id')")
    none = f"f = {ROWS}.pandas()\nreturn f[f['id'] < 0]"
    python(models, "none", none)
    models.dbt("run")
    one = "select half, total from analytics.one_key order by half"
    assert models.query(models.analytics, one) == [(0, 36006000), (1, 36000000)]
    assert models.types("analytics.one_key")["half"] == "bigint"
    both = "select count(*), sum(total), min(half), max(third) from analytics.keys"
    assert models.query(models.analytics, both) == [(6, 72006000, 0, 2)]
    assert list(models.types("analytics.sliced")) == ["id", "note", "n", "_exported_at"]
    assert models.query(models.analytics, "select count(*) from analytics.sliced") == [(5,)]
    ids = "select min(id), count(*) from analytics.filtered"
    assert models.query(models.analytics, ids) == [(11991, 10)]
    assert models.query(models.analytics, "select count(*) from analytics.none") == [(0,)]


@pytest.mark.long
def test_lazy_frames_of_polars_are_collected(models: Workplace) -> None:
    models.query(models.analytics, EVENTS)
    head = "import polars"
    lazy = f"return {ROWS}.polars().lazy().filter(polars.col('id') > 11990).select('id', 'note')"
    python(models, "lazy", lazy, head=head)
    models.dbt("run")
    found = "select count(*), max(note) from analytics.lazy"
    assert models.query(models.analytics, found) == [(10, "note 12000")]
    assert models.types("analytics.lazy") == {"id": "bigint", "note": "text"}


def test_scalars_of_numpy_are_values(models: Workplace) -> None:
    models.query(models.analytics, EVENTS)
    values = {
        "whole": ("int64(7)", "7"),
        "byte": ("uint8(7)", "7"),
        "huge": ("uint64(2**64 - 1)", str(2**64 - 1)),
        "single": ("float32(0.5)", "0.5"),
        "half": ("float16(0.5)", "0.5"),
        "f": ("float64(1.5)", "1.5"),
        "yes": ("bool_(True)", "True"),
        "word": ("str_('a\\tb')", "a\tb"),
        "moment": ("datetime64('2026-01-02T03:04:05.000006000')", "2026-01-02 03:04:05.000006"),
        "day": ("datetime64('2026-01-02')", "2026-01-02"),
        "span": ("timedelta64(90, 's')", "0:01:30"),
        "gone": ("datetime64('NaT')", "None"),
        "several": ("array([1, 2])", "[1, 2]"),
        "days": ("array(['2026-01-02', 'NaT'], dtype='M8[ns]')", "['2026-01-02T00:00:00', None]"),
        "nested": ("array([[1.5], [2.5]])", "[[1.5], [2.5]]"),
        "declared": ("array([1, 2], dtype='int16')", "[1, 2]"),
        "inside": ("", "{'a': [1, 1.5, True]}"),
    }  # fmt: skip
    row = {name: f"np.{code}" for name, (code, _) in values.items() if code}
    row["inside"] = "{'a': [np.int32(1), np.float32(1.5), np.bool_(True)]}"
    text = "{" + ", ".join(f"'{name}': {code}" for name, code in row.items()) + "}"
    python(models, "scalars", f"return [dict.fromkeys({text}), {text}]", head="import numpy as np")
    widened = "return [{'id': np.int64(1)}, {'id': np.float64(1.5)}, {'id': 2}, {'id': None}]"
    python(models, "widened", widened, head="import numpy as np")
    as_read = f"return {ROWS}.limit(3).map(lambda row: {{**row, 'n': np.int64(row['n'])}})"
    python(models, "as_read", as_read, head="import numpy as np")
    (models.folder / "models" / "scalars.yml").write_text(
        "version: 2\nmodels: [{name: scalars, columns: [{name: declared, data_type: 'int[]'},"
        " {name: gone, data_type: date}]}]\n"
    )
    models.dbt("run")
    names = ", ".join(values)
    found = models.query(
        models.analytics, f"select {names} from analytics.scalars where whole is not null"
    )
    assert [str(value) for value in found[0]] == [shown for _, shown in values.values()]
    types = models.types("analytics.scalars")
    inferred = ("whole", "huge", "single", "yes", "moment", "day", "span")
    assert [types[name] for name in inferred] == [
        "bigint", "numeric", "double precision", "boolean", "timestamp without time zone", "date",
        "interval",
    ]  # fmt: skip
    assert models.types("analytics.widened") == {"id": "double precision"}
    assert models.types("analytics.as_read")["n"] == "integer"


@pytest.mark.long
def test_show_shows_the_rows(models: Workplace) -> None:
    models.query(models.analytics, EVENTS)
    python(
        models, "seen", f"return {ROWS}.map(lambda row: {{'id': row['id'], 'twice': row['n'] * 2}})"
    )
    python(models, "unseen", f"return {ROWS}.select('id + 0.5 as half')")
    shown = models.dbt("show", "-s", "seen", "--limit", "3")
    assert "| twice |" in shown
    assert "|     6 |" in shown
    assert "|     8 |" not in shown
    assert "12,000.5" in models.dbt("show", "-s", "unseen", "--limit", "-1")
    assert "11 |" in models.dbt("show", "--inline", "select 11 as eleven")
    assert models.query(models.analytics, "select from pg_tables where tablename = 'seen'") == []
    python(models, "seen", "return 5")
    done = models.run("dbt", "show", "-s", "seen", "--no-use-colors")
    assert done.returncode != 0
    assert "model() returned a int" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    "materialized", [pytest.param("table", marks=pytest.mark.long), "incremental"]
)
def test_failing_model_leaves_the_old_table(models: Workplace, materialized: str) -> None:
    models.query(models.analytics, EVENTS + "create table hooked (what text)")
    config = f"materialized='{materialized}', incremental_strategy='upsert', unique_key='id', "
    (models.folder / "models" / "kept.yml").write_text(
        "version: 2\nmodels: [{name: kept, config: {"
        "pre_hook: \"insert into public.hooked values ('before')\", "
        "post_hook: 'insert into public.hooked select count(*)::text from {{ this }}'}}]\n"
    )
    python(models, "kept", f"return {ROWS}.limit(3).map(lambda row: row)", config)
    models.dbt("run")
    hooked = models.query(models.analytics, "table hooked")
    assert hooked == [("before",), ("3",)]
    bad = f"return {ROWS}.map(lambda row: row if row['id'] < 9000 else 1 / 0)"
    python(models, "kept", bad, config)
    for words in ([], ["--full-refresh"]):
        assert "ZeroDivisionError" in models.refused(*words)
        assert models.query(models.analytics, "select count(*) from analytics.kept") == [(3,)]
        assert models.query(models.analytics, "table hooked") == hooked
        tables = "select count(*) from pg_class where relkind = 'r' and relname ~ 'kept|dbt_python'"
        assert models.query(models.analytics, tables) == [(1,)]


def test_increments_miss_nothing_and_log(models: Workplace) -> None:
    models.query(models.analytics, EVENTS)
    body = f"""
new = dbt.new_rows({ROWS})
print("incremental:", dbt.is_incremental, dbt.this.identifier)
logging.getLogger("my.model").warning("a warning of mine")
logging.info("an info of mine")
session.execute("create temp table seen as select %s as n", [5])
assert [row["n"] for row in session.sql("select * from seen where n = %(n)s", {{"n": 5}})] == [5]
return new.map(transform)
"""
    head = (
        "import logging\n\ndef transform(row):\n"
        "    return None if row['id'] % 2 else {**row, 'note': row['note'].upper()}"
    )
    config = "materialized='incremental', incremental_strategy='upsert', unique_key='id'"
    python(models, "step", body, config, head)
    said = models.dbt("run")
    assert "incremental: False step" in said
    assert "a warning of mine" in said
    assert "an info of mine" in said
    count = "select count(*), count(*) filter (where note like 'NOTE %') from analytics.step"
    assert models.query(models.analytics, count) == [(6000, 6000)]
    said = models.dbt("run")
    assert "incremental: True step" in said
    assert "INSERT 0 0" in said
    models.query(
        models.analytics,
        "insert into event values (12001, 'a', 1, '2026-02-01'), (12002, 'b', 1, '2026-02-01');"
        "update event set note = 'again', _exported_at = '2026-02-02' where id = 4",
    )
    assert "INSERT 0 2" in models.dbt("run")
    changed = "select note from analytics.step where id in (4, 12002) order by id"
    assert models.query(models.analytics, changed) == [("AGAIN",), ("B",)]


@pytest.mark.long
def test_commands_of_dbt(models: Workplace) -> None:
    models.query(models.analytics, EVENTS)
    python(models, "first", f"return {ROWS}.map(lambda row: row)", "materialized='table'")
    python(models, "second", "return dbt.ref('first').select('id').map(lambda row: 1 / 0)")
    (models.folder / "models" / "third.sql").write_text(
        "{{ config(schema='analytics') }} select * from {{ ref('second') }}"
    )
    (models.folder / "models" / "first.yml").write_text(
        "version: 2\nmodels: [{name: first, columns: [{name: id, data_tests: [unique]}]}]\n"
    )
    models.dbt("compile")
    assert "first" in models.dbt("ls")
    done = models.run("dbt", "build", "--no-use-colors", "-s", "first+")
    assert "PASS=2 WARN=0 ERROR=1 SKIP=1" in done.stdout, done.stdout
    python(models, "second", "return dbt.ref('first').select('id')")
    assert "PASS=2" in models.dbt("retry")
    assert "PASS=1" in models.dbt("test", "-s", "first")
    models.dbt("docs", "generate")
    assert (models.folder / "target" / "catalog.json").exists()


def _with_tried(models: Workplace, tried: str) -> subprocess.CompletedProcess[str]:
    program = f"import exporter.python_models as p; p.TRIED = {tried}; "
    program += "from dbt.cli.main import cli; cli(['run', '--no-use-colors'])"
    return models.run("python", "-c", program)


@pytest.mark.long
def test_without_the_plugin_python_models_are_refused(models: Workplace) -> None:
    """As under a dbt that is older, or where the package is not installed."""
    models.query(models.analytics, EVENTS)
    python(models, "alone", f"return {ROWS}")
    done = _with_tried(models, "((9, 0), (9, 1))")
    assert done.returncode == 1
    assert "pip install dbt-exporter" in done.stdout


@pytest.mark.long
def test_a_newer_dbt_than_tried_warns_once(models: Workplace) -> None:
    models.query(models.analytics, EVENTS)
    for name in ("one", "two"):
        python(models, name, f"return {ROWS}")
    assert "were tried with" not in models.dbt("run")
    done = _with_tried(models, "((1, 0), (1, 1))")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("were tried with dbt-core up to 1.1, this is 1.") == 1


@pytest.mark.long
def test_example_of_the_product(product: Workplace) -> None:
    row = (
        'insert into "StatEvent" (id, type, created_at, updated_at, source, source_id, referer,'
        " custom_attributes) values ('{}', 'click', now(), now(), 'api', 'x', {}, {})"
    )
    for id, referer, attributes in (
        ("parsed", "'https://Example.org:80/a?utm_source=a%20b&utm_campaign=%C3%A9'", "null"),
        ("broken", "'http://['", """'{"device": "mobile", "campaign": 7}'"""),
        ("left_out", "null", "null"),
    ):
        product.query(product.core, row.format(id, referer, attributes))
    product.load("StatEvent")
    product.dbt("build")
    visits = (
        "select old_id, referer_host, referer_path, utm_source, utm_campaign, device, campaign"
        " from analytics.stat_event_visit order by old_id"
    )
    parsed = ("parsed", "example.org", "/a", "a b", "é", None, None)
    broken = ("broken", None, None, None, None, "mobile", 7)
    assert product.query(product.analytics, visits) == [broken, parsed]
    product.query(
        product.core,
        "update \"StatEvent\" set referer = 'https://b.org', updated_at = now()"
        " where id = 'broken'",
    )
    product.load("StatEvent")
    assert "INSERT 0 1" in product.dbt("run", "-s", "stat_event_visit")
    changed = ("broken", "b.org", None, None, None, "mobile", 7)
    assert product.query(product.analytics, visits) == [changed, parsed]
