"""`exporter init`: what a dbt project gets, what it is asked, and that it then works."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Workplace, _workplace
from tests.helpers import adopter


@pytest.fixture
def adopted(servers: tuple[str, str], tmp_path: Path) -> Iterator[Workplace]:
    """A project of somebody else's, in git, and its databases."""
    (tmp_path / "project").mkdir()
    for place in _workplace(servers, tmp_path / "project"):
        adopter.write(place.folder)
        place.query(place.core, adopter.CORE)
        yield place


@pytest.fixture
def fresh(servers: tuple[str, str], tmp_path: Path) -> Iterator[Workplace]:
    """An empty folder and two databases."""
    (tmp_path / "my-shop").mkdir()
    yield from _workplace(servers, tmp_path / "my-shop")


def _init(place: Workplace, *words: str) -> list[str]:
    done = place.run("exporter", "init", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _refused(place: Workplace, *words: str, status: int = 2) -> str:
    done = place.run("exporter", "init", *words)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr + done.stdout


@pytest.mark.long
def test_a_project_of_ten_models_is_at_home(adopted: Workplace) -> None:
    said = _init(adopted, "--yes")
    added = adopter.added_by("\n".join(said))
    assert len(added) == len(said) - 1
    assert said[-1] == "exporter new --all"
    for table in adopter.TABLES:
        added |= {f"models/staging/stg_{table}.{kind}" for kind in ("sql", "yml")}
    for turn in range(2):
        _init(adopted, "--yes")
        done = adopted.run("exporter", "new", "--all", "--yes")
        assert done.returncode == 0, done.stderr
        assert adopted.run("exporter", "load").returncode == 0
        assert "PASS=" in adopted.dbt("build")
        if not turn:
            adopted.query(adopted.core, adopter.CHANGE)
    schema = adopted.query(
        adopted.analytics, "select schemaname from pg_tables where tablename = 'customers'"
    )
    assert schema == [("public_shop",)]  # as dbt alone has it
    paid = "select count(*) from public_shop.order_state where status = 'paid'"
    assert adopted.query(adopted.analytics, paid) == [(10,)]
    host = "select host from public_shop.customer_hosts where id = 51"
    assert adopted.query(adopted.analytics, host) == [("9.example.org",)]
    total = "select sum(total) from public_shop.revenue"
    of_core = "select sum(quantity * price) from order_line l join product p on p.id = product_id"
    assert adopted.query(adopted.analytics, total) == adopted.query(adopted.core, of_core)
    ours = adopter.MODELS | {f"stg_{table}" for table in adopter.TABLES}
    listed = adopted.dbt("ls", "--quiet", "--resource-type", "model", "--output", "name").split()
    assert set(listed) == ours
    everything = adopted.dbt("ls", "--quiet").split()
    assert all(name.removeprefix("source:").startswith("adopter.") for name in everything)
    assert adopter.git(adopted.folder, "diff") == ""
    status = adopter.git(adopted.folder, "status", "--short", "--untracked-files=all")
    assert {line.removeprefix("?? ") for line in status.splitlines()} == added
    assert _init(adopted, "--check")[-1].startswith("up to date with dbt-exporter ")


def test_an_empty_folder_becomes_a_project(fresh: Workplace) -> None:
    fresh.query(fresh.core, adopter.CORE)
    said = _init(fresh)
    assert "added dbt_project.yml" in said
    assert fresh.run("exporter", "new", "--all", "--yes").returncode == 0
    assert fresh.run("exporter", "load").returncode == 0
    assert "ERROR=0" in fresh.dbt("build")
    assert fresh.query(fresh.analytics, "select count(*) from stg_customer") == [(50,)]
    assert "up to date" in _init(fresh)[0]


def test_a_project_below_is_named(fresh: Workplace) -> None:
    (fresh.folder / "dbt").mkdir()
    (fresh.folder / "dbt" / "dbt_project.yml").write_text("name: shop\nprofile: shop\n")
    assert "exporter init --project-dir dbt" in _refused(fresh)
    assert sorted(os.listdir(fresh.folder)) == ["dbt"]
    assert "cd dbt" in _init(fresh, "--project-dir", "dbt")


def test_it_is_asked_before_a_file_changes(adopted: Workplace) -> None:
    _init(adopted)
    macro = adopted.folder / "macros" / "dbt_exporter" / "new_rows.sql"
    right = macro.read_text()
    macro.write_text(right.replace("max(", "min("))
    (macro.parent / "gone.sql").write_text("{# From dbt-exporter 0.1.0, by `exporter init` #}\n")
    (macro.parent / "theirs.sql").write_text("{% macro theirs() %}{% endmacro %}\n")
    said = _refused(adopted, "--check", status=1)
    assert "-    > (select coalesce(min(" in said
    assert "+    > (select coalesce(max(" in said
    said = _refused(adopted)
    assert "exporter init would change macros/dbt_exporter/new_rows.sql" in said
    assert "min(" in macro.read_text()
    assert _asked(adopted, b"n\nn\n") == 1
    assert "min(" in macro.read_text()
    assert (macro.parent / "gone.sql").exists()
    assert _asked(adopted, b"y\ny\n") == 0
    assert macro.read_text() == right
    assert not (macro.parent / "gone.sql").exists()
    assert (macro.parent / "theirs.sql").exists()
    macro.unlink()
    assert "missing: macros/dbt_exporter/new_rows.sql" in _refused(adopted, "--check", status=1)
    assert "added macros/dbt_exporter/new_rows.sql" in _init(adopted, "--yes")


def _asked(place: Workplace, answers: bytes) -> int:
    """Run it on a terminal, with these answers; return its exit status."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "exporter", "init"],
        cwd=place.folder,
        env={**place.environment, "PYTHONPATH": str(ROOT)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    os.write(ours, answers)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the terminal is gone with the process
        pass
    os.close(ours)
    assert b"Change macros/dbt_exporter/new_rows.sql?" in shown, shown
    return process.wait(60)


def test_a_profile_and_variables_are_added_beside_those_that_are_there(adopted: Workplace) -> None:
    profiles = adopted.folder / "profiles.yml"
    profiles.write_text("other: {target: a, outputs: {a: {type: postgres}}}")
    (adopted.folder / ".env.example").write_text("MINE=1\nDATABASE_URL_CORE=postgresql://x")
    _refused(adopted)
    said = _init(adopted, "--yes")
    assert "changed profiles.yml" in said
    assert profiles.read_text().startswith("other: {target: a, outputs: {a: {type: postgres}}}\n#")
    lines = (adopted.folder / ".env.example").read_text().splitlines()
    assert lines[:2] == ["MINE=1", "DATABASE_URL_CORE=postgresql://x"]
    assert lines[2].startswith("DATABASE_URL_ANALYTICS=")
    assert "OK connection ok" in adopted.dbt("debug", "--connection")
    assert "up to date" in _init(adopted)[0]


REFUSED = {
    "a macro of one name": (
        {"macros/mine.sql": "{%- macro new_rows() -%}{%- endmacro -%}"},
        ["macros/mine.sql defines macro new_rows"],
    ),
    "a materialization": (
        {"macros/m.sql": "{% materialization table, adapter='postgres' %}{% endmaterialization %}"},
        ["macros/m.sql defines materialization table for postgres"],
    ),
    "a test": (
        {"tests/generic/t.sql": "{% test loads_end_well(model) %}{% endtest %}"},
        ["tests/generic/t.sql defines test loads_end_well"],
    ),
    "a dispatch that passes over the project": (
        {
            "dbt_project.yml": "name: adopter\nprofile: adopter\n"
            "dispatch: [{macro_namespace: dbt, search_order: [utils, dbt]}]\n"
        },
        ["does not put adopter before dbt", "search_order: ['adopter', 'utils', 'dbt']"],
    ),
    "no profile": (
        {"dbt_project.yml": "name: adopter\n"},
        ["names no profile", "profile: adopter"],
    ),
    "another database": (
        {"profiles.yml": "adopter: {target: a, outputs: {a: {type: snowflake}}}"},
        ["no postgres output a"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_work_is_refused(adopted: Workplace, case: str) -> None:
    files, expected = REFUSED[case]
    for name, text in files.items():
        (adopted.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (adopted.folder / name).write_text(text)
    said = _refused(adopted, "--yes")
    for text in expected:
        assert text in said
    assert not (adopted.folder / "macros" / "dbt_exporter").exists()


def test_what_only_looks_alike_is_not_refused(adopted: Workplace) -> None:
    (adopted.folder / "macros").mkdir()
    (adopted.folder / "macros" / "mine.sql").write_text(
        "{# {% macro new_rows() %} #}{% macro new_rows_of_mine() %}{% endmacro %}"
        "{% materialization table, adapter='redshift' %}{% endmaterialization %}"
    )
    _init(adopted)
