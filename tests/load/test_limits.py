"""What a load may cost, whatever the table: memory, and WAL for rows that did not change."""

from __future__ import annotations

import sys

import pytest

from benchmarks.measure import Cost, cost_of
from tests.conftest import ROOT, Workplace, compare, fill

MB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def _load(place: Workplace, *words: str) -> Cost:
    return cost_of(
        [
            sys.executable,
            "-m",
            "exporter",
            "load",
            "StatEvent",
            "--project-dir",
            str(place.folder),
            *words,
        ],
        {**place.environment, "PYTHONPATH": str(ROOT)},
        place.analytics,
    )


@linux
@pytest.mark.parametrize("rows", [100_000, pytest.param(2_000_000, marks=pytest.mark.long)])
def test_memory_does_not_grow_with_the_table(product: Workplace, rows: int) -> None:
    fill(product.core, 1, rows)
    assert _load(product).memory <= 64 * MB
    product.run("exporter", "state", "reset", "StatEvent")
    assert _load(product).memory <= 64 * MB, "by staging"
    assert _load(product, "--full-refresh").memory <= 64 * MB


@linux
@pytest.mark.long
def test_memory_with_rows_of_50_mb(product: Workplace) -> None:
    fill(product.core, 1, 100)
    product.query(
        product.core,
        'update "StatEvent" set custom_attributes = to_jsonb(repeat(md5(id), 50 * 32768))'
        " where id > 'evt_000000000096'",
    )
    assert _load(product).memory <= (64 + 2 * 50) * MB
    product.query(product.analytics, "update analytics_raw.stat_event set tag = 'other'")
    product.run("exporter", "state", "reset", "StatEvent")
    assert _load(product).memory <= (64 + 2 * 50) * MB, "by staging"
    compare(product, 'public."StatEvent"', "analytics_raw.stat_event", "id, custom_attributes")


@linux
@pytest.mark.parametrize("size", [20, pytest.param(340, marks=pytest.mark.long)])
@pytest.mark.parametrize("path", ["binary", "text"])
def test_memory_with_three_rows(product: Workplace, size: int, path: str) -> None:
    """In full, a table of a gigabyte."""
    fill(product.core, 1, 3)
    if path == "text":
        product.query(product.core, 'alter table "StatEvent" add forces_it tsquery')
    product.query(
        product.core,
        f'update "StatEvent" set referer = repeat(md5(id), {size} * 32768), updated_at = now()',
    )
    assert _load(product).memory <= (64 + 2 * size) * MB
    compare(product, 'public."StatEvent"', "analytics_raw.stat_event", "id, md5(referer)")


@pytest.mark.parametrize("rows", [100_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_unchanged_rows_write_no_wal(product: Workplace, rows: int) -> None:
    fill(product.core, 1, rows)
    product.load("StatEvent")
    product.query(product.analytics, "vacuum analytics_raw.stat_event")
    product.query(product.core, 'vacuum "StatEvent"')
    product.query(product.analytics, "checkpoint")
    product.run("exporter", "state", "reset", "StatEvent")
    assert _load(product).wal < 1 * MB
    shown = "select rows_read, rows_written from analytics_raw._exporter_runs order by id desc"
    assert product.query(product.analytics, shown + " limit 1") == [(rows, 0)]
