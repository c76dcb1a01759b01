"""The main job: what a load moves, and what dbt makes of it."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import psycopg
import pytest

from tests.conftest import Workplace, compare, fill

EVENT = 'public."StatEvent"'
RAW = "analytics_raw.stat_event"


def test_first_load_then_increment_equals_the_source(product: Workplace) -> None:
    fill(product.core, 1, 3000)
    first = product.load("StatEvent")
    assert (first["rows_read"], first["rows_written"], first["status"]) == (3000, 3000, "ok")
    compare(product, EVENT, RAW)
    with psycopg.connect(product.core) as connection:
        connection.execute(
            'update "StatEvent" set tag = \'x\\y\t"z\', tags = null, updated_at = now()'
            " where id <= 'evt_000000000030'"
        )
    fill(product.core, 3001, 3030)
    second = product.load("StatEvent")
    assert (second["rows_read"], second["rows_written"]) == (60, 60)
    compare(product, EVENT, RAW)
    assert second["cursor"]["id"]


def test_batches_end_where_batch_size_says(product: Workplace) -> None:
    fill(product.core, 1, 100)
    product.load("StatEvent")
    fill(product.core, 101, 1100)
    assert product.load("StatEvent", BATCH_SIZE="100")["batches"] == 10
    compare(product, EVENT, RAW)


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_changes(product: Workplace, seed: int) -> None:
    chance = random.Random(seed)
    last = 0
    for _ in range(5):
        step = chance.randint(0, 400)
        if step:
            fill(product.core, last + 1, last + step)
            last += step
        with psycopg.connect(product.core) as connection:
            connection.execute(
                "update \"StatEvent\" set status = 'CANCEL', custom_attributes = null,"
                " updated_at = clock_timestamp() at time zone 'UTC'"
                " where hashtext(id || %s) %% 7 = 0",
                (str(chance.random()),),
            )
        product.load("StatEvent", BATCH_SIZE=str(chance.choice([7, 100, 50000])))
        compare(product, EVENT, RAW)


def test_model_takes_only_what_changed_and_a_second_run_writes_nothing(product: Workplace) -> None:
    fill(product.core, 1, 500)
    product.load("StatEvent")
    product.dbt("build", "--quiet")
    with psycopg.connect(product.core) as connection:
        connection.execute(
            "update \"StatEvent\" set status = 'REFUSED', updated_at = now() at time zone 'UTC'"
            " where id in ('evt_000000000001', 'evt_000000000002')"
        )
    written = []
    for _ in range(2):
        load = product.load("StatEvent")
        run = product.dbt("run", "-s", "stat_event")
        written.append((load["rows_written"], "INSERT 0 2 " in run, "INSERT 0 0 " in run))
    assert written == [(2, True, False), (0, False, True)]
    versions = "select md5(string_agg(xmin::text || ctid::text, ',' order by ctid)) from "
    before = versions + "analytics.stat_event"
    seen = product.query(product.analytics, before)
    product.load("StatEvent")
    product.dbt("run", "-s", "stat_event")
    assert product.query(product.analytics, before) == seen


def test_nothing_new_costs_little_and_imports_little(product: Workplace) -> None:
    fill(product.core, 1, 1000)
    product.load("StatEvent")

    def seconds(*words: str) -> float:
        begin = time.monotonic()
        subprocess.run([sys.executable, *words], cwd=product.folder, env=product.environment,
                       check=True, capture_output=True)  # fmt: skip
        return time.monotonic() - begin

    ratios = []
    for _ in range(7):
        base = seconds("-c", "import psycopg, click, yaml")
        ratios.append(seconds("-m", "exporter", "load", "StatEvent") / base)
    assert sorted(ratios)[3] < 2.5, ratios  # the benchmark states the ratio; this guards it
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "exporter", "load", "StatEvent"],
        cwd=product.folder, env=product.environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"dbt", "pandas", "pyarrow", "jinja2", "tenacity", "rich", "slack_sdk"}
    assert not imported & {"exporter.source.rows", "exporter.values"}


def test_rows_that_commit_late_are_not_lost(product: Workplace) -> None:
    fill(product.core, 1, 10)
    with psycopg.connect(product.core) as late:
        late.execute(
            'insert into "StatEvent" (id, type, source, updated_at)'
            " values ('late', 'click', 'api', now() at time zone 'UTC')"
        )
        fill(product.core, 11, 20)
        assert product.load("StatEvent")["rows_read"] == 20
        late.commit()
    assert product.load("StatEvent")["rows_written"] == 1
    compare(product, EVENT, RAW)


def test_second_run_is_locked_out(product: Workplace) -> None:
    fill(product.core, 1, 10)
    product.load("StatEvent")
    from exporter.state.position import number_of

    with psycopg.connect(product.analytics, application_name="the other") as other:
        other.execute("select pg_advisory_lock(%s)", (number_of(RAW),))
        done = product.run("exporter", "load", "StatEvent")
    assert done.returncode == 3
    assert "the other" in done.stderr


def test_one_url_serves_both_tools_whatever_it_holds(product: Workplace) -> None:
    fill(product.core, 1, 50)
    product.query(
        product.analytics,
        'drop role if exists "we@i:r/d%";'
        " create role \"we@i:r/d%\" login superuser password 'p@:/%'",
    )
    role = "we%40i%3Ar%2Fd%25:p%40%3A%2F%25@"
    rest = product.analytics.partition("//")[2].rpartition("@")[2]
    url = f"postgresql://{role}{rest}{'&' if '?' in rest else '?'}sslmode=prefer"
    product.analytics = url
    product.load("StatEvent")
    product.dbt("build", "--quiet")
    assert product.query(url, "select count(*) from analytics.stat_event") == [(48,)]


def test_destination_from_the_dbt_profile(product: Workplace) -> None:
    fill(product.core, 1, 50)
    done = product.run("exporter", "load", DATABASE_URL_ANALYTICS="")
    assert (done.returncode, "DATABASE_URL_ANALYTICS is not set" in done.stderr) == (2, True)
    profile = (product.folder / "profiles.yml").read_text().replace("DATABASE_URL_ANALYTICS", "OUR")
    (product.folder / "profiles.yml").write_text(profile)
    product.load("StatEvent", DATABASE_URL_ANALYTICS="", OUR=product.analytics)
    compare(product, EVENT, RAW)
