"""Loads from Python: results, what is raised, and an environment that is left as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from exporter.api import Result, load
from exporter.errors import DatabaseError, LockedError, SettingError, UsageError
from tests.conftest import ROOT, Workplace

TWO = [
    f"- {{name: {name}, tags: [nightly], config: {{meta: {{exporter: {{key: {name.upper()},"
    f" source: {{table: {name}}}}}}}}}}}"
    for name in ("a", "b")
]


@pytest.fixture
def place(product: Workplace, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    (product.folder / "models" / "staging" / "_sources.yml").unlink()
    product.define(*TWO)
    product.query(
        product.core, "create table a as select 1 as id; alter table a add primary key (id)"
    )
    product.query(product.core, "create table b (id bigint primary key)")
    for name in ("DATABASE_URL_CORE", "DATABASE_URL_ANALYTICS", "BATCH_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (product.folder / ".env").write_text(
        f"DATABASE_URL_CORE='{product.core}'\nDATABASE_URL_ANALYTICS='{product.analytics}'\n"
    )
    return product


def test_results_are_returned(place: Workplace) -> None:
    before = dict(os.environ)
    results = load(["A", "tag:nightly"], project_dir=place.folder)
    assert [(type(it), it.key, it.status, it.totals.rows_written) for it in results] == [
        (Result, "A", "ok", 1),
        (Result, "B", "ok", 0),
    ]
    assert dict(os.environ) == before
    assert [it.totals.rows_read for it in load(project_dir=str(place.folder))] == [0, 0]
    place.query(place.core, "delete from a")
    (again,) = load(["A"], project_dir=place.folder, full_refresh=True)
    assert isinstance(again.error, Exception)  # nothing of it is left: more than may be deleted
    assert place.query(place.analytics, "select id from analytics_raw.a") == [(1,)]


def test_what_a_result_carries_is_not_raised(place: Workplace) -> None:
    place.query(place.core, "drop table a")
    place.query(place.core, "insert into b values (7)")
    failed, landed = load(project_dir=place.folder)
    assert (failed.status, "no table" in str(failed.error)) == ("failed", True)
    assert (landed.status, landed.totals.rows_written) == ("ok", 1)
    file = place.folder / ".env"
    down = "DATABASE_URL_CORE=postgresql://nobody@127.0.0.1:1/none\n"
    file.write_text(down + file.read_text().splitlines()[1] + "\n")
    assert [type(it.error) for it in load(project_dir=place.folder)] == [DatabaseError] * 2


def test_what_is_wrong_beforehand_is_raised(place: Workplace) -> None:
    with pytest.raises(UsageError, match="no definition has the key C"):
        load(["A", "C"], project_dir=place.folder)
    with pytest.raises(TypeError, match="list of keys"):
        load("A", project_dir=place.folder)
    (place.folder / ".env").unlink()
    with pytest.raises(SettingError, match="is not set"):
        load(project_dir=place.folder)


def test_calls_in_threads_wait_for_one_another(place: Workplace) -> None:
    found: list[list[Result]] = []
    threads = [
        threading.Thread(target=lambda: found.append(load(project_dir=place.folder)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [it.status for results in found for it in results] == ["ok"] * 6
    assert LockedError.outcome == "locked"


@pytest.mark.long
def test_it_is_typed(tmp_path: Path) -> None:
    file = tmp_path / "typed.py"
    file.write_text(
        "from exporter.api import Result, load\n\n"
        "results: list[Result] = load(['A'], project_dir='.', full_refresh=False)\n"
        "written: int = results[0].totals.rows_written\n"
    )
    words = ("-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(file))
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
