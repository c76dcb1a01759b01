"""The incremental strategy ``upsert``: which row wins, what is refused, from another project."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import psycopg
import pytest

from tests.conftest import ROOT, Workplace
from tests.helpers.every_type import has_xml


@pytest.fixture
def models(bare: Workplace) -> Workplace:
    """A table ``stage`` to be the batch, and a model on it without the product's own ones."""
    bare.query(bare.analytics, "create table stage (id int, other int, v text, n int, j json)")
    return bare


def model(place: Workplace, config: str = "", select: str = "select * from public.stage") -> None:
    text = (
        "{{ config(materialized='incremental', incremental_strategy='upsert', schema='analytics'"
        + (
            f", {config}"
            if "unique_key" in config
            else f", unique_key='id'{config and ', '}{config}"
        )
        + ") }}\n"
        + select
    )
    (place.folder / "models" / "item.sql").write_text(text)


def stage(place: Workplace, *rows: str) -> None:
    place.query(place.analytics, "truncate stage")
    for row in rows:
        place.query(place.analytics, f"insert into stage values ({row})")


def build(place: Workplace, *words: str) -> list[tuple[object, ...]]:
    place.dbt("run", "--quiet", *words)
    return place.query(place.analytics, "select id, v, n from analytics.item order by id, other, n")


ORDERED = "meta={'upsert_order_by': ['n']}"


def test_newest_of_a_key_wins_in_every_kind_of_run(models: Workplace) -> None:
    model(models, ORDERED)
    stage(models, "1, 0, 'old', 1", "1, 0, 'new', 2", "2, 0, 'only', null")
    assert build(models) == [(1, "new", 2), (2, "only", None)]
    stage(models, "1, 0, 'newest', 4", "1, 0, 'newer', 3", "3, 0, 'a', 1", "3, 0, 'b', 2")
    assert build(models) == [(1, "newest", 4), (2, "only", None), (3, "b", 2)]
    assert build(models, "--full-refresh") == [(1, "newest", 4), (3, "b", 2)]
    assert build(models, "--full-refresh") == [(1, "newest", 4), (3, "b", 2)]
    names = models.query(
        models.analytics, "select indexname from pg_indexes where tablename = 'item'"
    )
    assert len(names) == 1
    assert str(names[0][0]).startswith("item__upsert_")


def test_unchanged_rows_are_not_written(models: Workplace) -> None:
    xml = "xml" if has_xml(models, models.analytics) else "text"  # a server without libxml
    models.query(
        models.analytics,
        "alter table stage add p point default '(1,2)', add a text[] default '{x,null}',"
        f" add x {xml} default '<a/>', add r numrange default '[1,2.50)'",
    )
    model(models, ORDERED)
    stage(models, "1, 0, 'a', 1, '{\"a\": 1}'", "2, 0, null, 1, null", "3, 0, 'c', 1, '[1]'")
    build(models)
    places = "select id, ctid::text from analytics.item order by id"
    before = models.query(models.analytics, places)
    stage(models, "1, 0, 'a', 1, '{\"a\": 1}'", "2, 0, null, 1, null", "3, 0, 'c', 1, '[2]'")
    build(models)
    after = models.query(models.analytics, places)
    assert after[:2] == before[:2]
    assert after[2] != before[2]


def test_older_version_never_overwrites(models: Workplace) -> None:
    model(models, "meta={'upsert_order_by': 'n', 'upsert_version': 'n'}")
    stage(models, "1, 0, 'newest', 5")
    build(models)
    stage(models, "1, 0, 'older', 4")
    assert build(models) == [(1, "newest", 5)]
    stage(models, "1, 0, 'same', 5")
    assert build(models) == [(1, "same", 5)]


def test_marked_rows_are_removed(models: Workplace) -> None:
    model(models, "meta={'upsert_order_by': 'n', 'upsert_delete_when': \"v = 'gone'\"}")
    stage(models, "1, 0, 'a', 1", "2, 0, 'b', 1", "3, 0, 'gone', 1")
    assert build(models) == [(1, "a", 1), (2, "b", 1)]
    stage(models, "1, 0, 'gone', 2", "2, 0, 'gone', 2", "2, 0, 'back', 3", "4, 0, 'gone', 1")
    assert build(models) == [(2, "back", 3)]


@pytest.mark.long
def test_key_of_several_columns_in_any_spelling(models: Workplace) -> None:
    model(models, "unique_key=['ID', '\"other\"'], " + ORDERED)
    stage(models, "1, 1, 'a', 1", "1, 2, 'b', 1")
    assert build(models) == [(1, "a", 1), (1, "b", 1)]
    stage(models, "1, 2, 'c', 2")
    assert build(models) == [(1, "a", 1), (1, "c", 2)]


def test_cursor_of_the_source_tells_the_newest(models: Workplace) -> None:
    (models.folder / "models" / "sources.yml").write_text(
        "version: 2\nsources: [{name: public, tables: [{name: stage, config: {meta: {exporter:"
        " {key: Stage, source: {table: Stage, cursor: {field: n}}}}}}]}]\n"
    )
    (models.folder / "models" / "between.sql").write_text(
        "{{ config(materialized='ephemeral') }} select * from {{ source('public', 'stage') }}"
    )
    model(models, select="select * from {{ ref('between') }}")
    stage(models, "1, 0, 'old', 1", "1, 0, 'new', 2")
    assert build(models) == [(1, "new", 2)]
    stage(models, "1, 0, 'newest', 4", "1, 0, 'newer', 3")
    assert build(models) == [(1, "newest", 4)]


@pytest.mark.long
def test_only_the_key_and_chosen_columns(models: Workplace) -> None:
    model(models, "merge_exclude_columns=['v'], " + ORDERED)
    stage(models, "1, 0, 'a', 1")
    build(models)
    stage(models, "1, 0, 'b', 2")
    assert build(models) == [(1, "a", 2)]
    model(models, "unique_key=['id']", "select distinct id, 0 as other, '' as v, 0 as n from stage")
    build(models, "--full-refresh")
    stage(models, "1, 0, 'b', 2", "9, 0, 'b', 2")
    assert build(models) == [(1, "", 0), (9, "", 0)]


@pytest.mark.long
def test_predicates_limit_the_updates(models: Workplace) -> None:
    model(models, "incremental_predicates=['dbt_internal_dest.id <> 2'], " + ORDERED)
    stage(models, "1, 0, 'a', 1", "2, 0, 'b', 1")
    build(models)
    stage(models, "1, 0, 'c', 2", "2, 0, 'c', 2", "3, 0, 'c', 2")
    assert build(models) == [(1, "c", 2), (2, "b", 1), (3, "c", 2)]


@pytest.mark.long
def test_what_is_refused(models: Workplace) -> None:
    model(models)
    stage(models, "1, 0, 'a', 1", "1, 0, 'b', 1", "2, 0, 'c', 1")
    assert "several rows share unique_key (id), such as id=1" in models.refused()
    stage(models, "1, 0, 'a', 1", "null, 0, 'b', 1")
    assert "1 rows have a null in unique_key (id)" in models.refused()
    stage(models, "1, 0, 'a', 1", "2, 0, 'b', 1")
    assert len(build(models)) == 2
    stage(models, "1, 0, 'a', 1", "1, 0, 'b', 1")
    assert "several rows share unique_key (id), such as id=1" in models.refused()
    stage(models, "null, 0, 'b', 1")
    assert "null in unique_key" in models.refused()
    model(models, "meta={'upsert_order_by': 'nn'}")
    assert "upsert_order_by: no column 'nn'" in models.refused()


@pytest.mark.long
def test_index_of_a_model_that_existed_before(models: Workplace) -> None:
    (models.folder / "models" / "item.sql").write_text(
        "{{ config(materialized='table', schema='analytics') }} select * from public.stage"
    )
    stage(models, *(f"{n % 5}, 0, 'a', 1" for n in range(10)))
    build(models)
    model(models, ORDERED)
    said = models.refused()
    assert "holds rows that share unique_key (id), such as id=0; id=1; id=2" in said
    assert "having count(*) > 1" in said
    models.query(models.analytics, "delete from analytics.item where ctid > '(0,5)'")
    stage(models, "1, 0, 'b', 2")
    assert (1, "b", 2) in build(models)
    unique = "select count(*) from pg_indexes where tablename='item' and indexdef like '%UNIQUE%'"
    assert models.query(models.analytics, unique) == [(1,)]


@pytest.mark.long
def test_contract_and_grants(models: Workplace) -> None:
    model(
        models,
        ORDERED
        + ", on_schema_change='append_new_columns', grants={'select': ['pg_read_all_data']}",
    )
    (models.folder / "models" / "item.yml").write_text(
        "version: 2\nmodels:\n  - name: item\n    config: {contract: {enforced: true}}\n"
        "    constraints: [{type: primary_key, columns: [id]}]\n    columns:\n"
        + "".join(
            f"      - {{name: {name}, data_type: {kind}}}\n"
            for name, kind in (
                ("id", "int"),
                ("other", "int"),
                ("v", "text"),
                ("n", "int"),
                ("j", "json"),
            )
        )
    )
    stage(models, "1, 0, 'a', 1", "1, 0, 'b', 2")
    assert build(models) == [(1, "b", 2)]
    stage(models, "1, 0, 'c', 3")
    assert build(models) == [(1, "c", 3)]
    indexes = "select count(*) from pg_indexes where tablename = 'item'"
    assert models.query(models.analytics, indexes) == [(1,)]  # the primary key counts


BUILDS = """
import sys
from dbt.cli.main import dbtRunner
for _ in range(int(sys.argv[2])):
    done = dbtRunner().invoke(["run", "--quiet", "--target-path", sys.argv[1]])
    assert done.success, [(run.message, run.status) for run in done.result or []] or done.exception
"""


@pytest.mark.parametrize("builds", [pytest.param(one, marks=pytest.mark.long) for one in (2, 50)])
def test_builds_writers_and_readers_at_once(models: Workplace, builds: int) -> None:
    """Four sessions build one model while its source changes and a reader looks every 10 ms.

    ``n`` only ever grows in the source, so a row of the model whose ``n`` gets less has lost an
    update; there is no version column that would hide it.
    """
    model(models)
    stage(models, *(f"{number}, 0, 'a', 0" for number in range(200)))
    build(models)
    ended = threading.Event()
    wrong: set[str] = set()

    def write() -> None:
        with psycopg.connect(models.analytics, autocommit=True) as connection:
            for turn in itertools.count():
                connection.execute(
                    "update stage set n = n + 1 where id %% 3 = %s", (turn % 3,), prepare=False
                )
                if turn % 20 == 0:
                    statement = "insert into stage values (%s, 0, 'new', 0)"
                    connection.execute(statement, (1000 + turn,), prepare=False)
                if ended.wait(0.005):
                    return

    def read() -> None:
        seen: dict[int, int] = {}
        with psycopg.connect(models.analytics, autocommit=True) as connection:
            while not ended.wait(0.01):
                rows = connection.execute("select id, n from analytics.item").fetchall()
                now = dict(rows)
                if len(now) < len(rows):
                    wrong.add("a key twice")
                if seen.keys() - now.keys():
                    wrong.add("a key missing")
                if any(number < seen.get(key, 0) for key, number in now.items()):
                    wrong.add("an update lost")
                seen = now

    threads = [threading.Thread(target=work) for work in (write, read)]
    for thread in threads:
        thread.start()
    try:
        sessions = [
            subprocess.Popen(
                [sys.executable, "-c", BUILDS, f"target{number}", str(builds)],
                cwd=models.folder,
                env=models.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in range(4)
        ]
        said = [session.communicate()[0] for session in sessions]
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert [session.returncode for session in sessions] == [0] * 4, "\n".join(said)
    assert not wrong
    build(models)
    columns = "id, other, v, n, j::text"
    behind = f"select {columns} from stage except all select {columns} from analytics.item"
    assert models.query(models.analytics, behind) == []


@pytest.mark.long
def test_another_project_uses_it_as_a_package(product: Workplace) -> None:
    folder = product.folder / "other"
    (folder / "models").mkdir(parents=True)
    (folder / "macros").mkdir()
    (folder / "packages.yml").write_text(f"packages:\n  - local: {ROOT}\n")
    (folder / "dbt_project.yml").write_text(
        "name: other\nprofile: dbt_exporter\n"
        "dispatch: [{macro_namespace: dbt, search_order: [other, dbt_exporter, dbt]}]\n"
    )
    (folder / "macros" / "upsert.sql").write_text(
        "{% macro get_incremental_upsert_sql(arg_dict) %}"
        "{{ return(dbt_exporter.get_incremental_upsert_sql(arg_dict)) }}{% endmacro %}"
    )
    (folder / "models" / "item.sql").write_text(
        "{{ config(materialized='incremental', incremental_strategy='upsert', unique_key='id',"
        " meta={'upsert_order_by': 'n'}) }} select * from public.stage"
    )
    product.query(product.analytics, "create table stage (id int, n int)")
    product.query(product.analytics, "insert into stage values (1, 1), (1, 2)")
    there = Workplace(folder, product.core, product.analytics)
    (folder / "profiles.yml").write_bytes((product.folder / "profiles.yml").read_bytes())
    there.dbt("deps", "--quiet")
    assert there.dbt("ls", "--quiet").split() == ["other.item"]  # and nothing of the package's
    for _ in range(2):
        there.dbt("run", "--quiet")
        rows = there.query(there.analytics, "select id, n from public.item")
        assert rows == [(1, 2)]
        there.query(there.analytics, "truncate stage")
