"""dbt docs as the front page: everything described, the lineage from core's table to its users."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.conftest import ROOT, Workplace, fill, product_in
from tests.helpers.browser import browser, served

CORE = "source.dbt_exporter._core.StatEvent"
RAW = "source.dbt_exporter.analytics_raw.stat_event"
STAGING = "model.dbt_exporter.stg_stat_event"
MODEL = "model.dbt_exporter.stat_event"
EXPOSURE = "exposure.dbt_exporter.mission_statistics"
LINEAGE = ((CORE, RAW), (RAW, STAGING), (STAGING, MODEL), (MODEL, EXPOSURE))


@pytest.fixture(scope="module")
def documented(
    servers: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workplace]:
    """The project, loaded and built, with its docs."""
    for place in product_in(servers, tmp_path_factory.mktemp("documented")):
        place.query(place.core, "comment on table \"StatEvent\" is 'What visitors do.'")
        fill(place.core, 1, 100)
        place.load("StatEvent")
        place.dbt("build")
        assert "dbt docs generate" in place.run("exporter", "docs").stderr  # not there yet
        place.dbt("docs", "generate")
        _complete(place)
        yield place


def _complete(place: Workplace) -> None:
    done = place.run("exporter", "docs")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "core.StatEvent ▸ analytics_raw.stat_event\n"


def _artifact(place: Workplace, name: str) -> dict[str, Any]:
    return dict(json.loads((place.folder / "target" / name).read_text()))


def test_everything_is_described(documented: Workplace) -> None:
    manifest = _artifact(documented, "manifest.json")
    catalog = _artifact(documented, "catalog.json")
    kinds = ("nodes", "sources", "exposures", "macros", "unit_tests")
    everything = {name: one for kind in kinds for name, one in manifest[kind].items()}
    assert {RAW, MODEL} <= {*catalog["sources"], *catalog["nodes"]}
    seen = set()
    for name, one in everything.items():
        if one["package_name"] != "dbt_exporter" or one.get("test_metadata"):
            continue
        seen.add(one["resource_type"])
        assert one["description"], name
        columns = one.get("columns", {})
        arguments = {argument["name"]: argument for argument in one.get("arguments", [])}
        for part, about in [*columns.items(), *arguments.items()]:
            assert about["description"], (name, part)
        made = catalog["nodes"].get(name) or catalog["sources"].get(name)
        if made:
            assert sorted(made["columns"]) == sorted(columns), name
        if one["resource_type"] == "macro":
            signature = re.search(
                rf"(?:macro|test) {one['name'].removeprefix('test_')}\(([^)]*)\)",
                one["macro_sql"],
            )
            assert sorted(re.findall(r"(\w+)(?:=[^,]+)?", signature[1] if signature else "")) == (
                sorted(arguments)
            ), name
    assert seen == {"model", "seed", "source", "exposure", "macro", "unit_test", "test"}


def test_lineage_runs_from_the_core_table_to_the_exposure(documented: Workplace) -> None:
    before = (documented.folder / "target" / "manifest.json").read_text()
    manifest = json.loads(before)
    for parent, child in LINEAGE:
        assert parent in manifest["parent_map"][child]
        assert child in manifest["child_map"][parent]
    core = manifest["sources"][CORE]
    assert core["description"].startswith("What visitors do.")
    assert "exporter load StatEvent" in core["description"]
    assert core["database"] == documented.core.rpartition("/")[2].partition("?")[0]
    assert core["columns"]["type"]["data_type"] == 'public."StatEventType"'
    assert "_exported_at" not in core["columns"]
    _complete(documented)
    assert (documented.folder / "target" / "manifest.json").read_text() == before


def test_the_page_of_stat_event(documented: Workplace) -> None:
    columns = _artifact(documented, "manifest.json")["nodes"][MODEL]["columns"]
    with browser() as chrome, served(documented.folder / "target") as address:

        def shown(page: str, expected: str) -> str:
            chrome.get(f"{address}/#!/{page}")
            wait.until(lambda _: expected in _text())
            return _text()

        def _text() -> str:
            return chrome.find_element(By.TAG_NAME, "body").text

        wait = WebDriverWait(chrome, 60)
        page = shown(f"model/{MODEL}", "One row per event, with its type's label.")
        for name, column in columns.items():
            assert re.search(rf"^{name}$", page, re.M)
            assert column["description"] in page
        for button in (".launcher-btn a", "[ng-click='showExpanded()']"):
            chrome.find_element(By.CSS_SELECTOR, button).click()
        wait.until(lambda _: {*LINEAGE} <= {*map(tuple, chrome.execute_script(_GRAPH))})
        page = shown(f"source/{CORE}", "What visitors do.")
        assert "core.StatEvent" in page
        assert 'public."StatEventType"' in page
        assert '"cursor":{"field":"updated_at"' in shown(f"source/{RAW}", "analytics_raw")


@pytest.mark.long
def test_make_docs_on_a_server_of_its_own() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DATABASE_URL", "DBT_", "PYTHONWARNINGS"))
    }
    program = [sys.executable, str(ROOT / "docs" / "serve.py")]
    serving = subprocess.Popen(
        [*program, "--port", str(port), "--no-browser"], env=environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                with urlopen(f"http://localhost:{port}/manifest.json") as answer:
                    manifest = json.load(answer)
                break
            except URLError:
                assert serving.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
        for parent, child in LINEAGE:
            assert parent in manifest["parent_map"][child]
    finally:
        os.killpg(serving.pid, signal.SIGINT)
        status = serving.wait(60)
    assert status == 0


# The lineage is drawn on a canvas: its visible edges are asked of the drawing.
_GRAPH = """
const drawing = document.querySelector('.__________cytoscape_container')?._cyreg?.cy;
return drawing?.edges(':visible').map(e => [e.source().id(), e.target().id()]) ?? [];
"""
