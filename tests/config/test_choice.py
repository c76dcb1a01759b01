"""Choosing definitions by key, pattern and tag."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Workplace

SOURCES = """
version: 2
sources:
  - name: crm
    schema: analytics_raw
    tags: [people]
    tables:
      - name: customer
        tags: [nightly]
        config: {meta: {exporter: {key: crm_customer, source: {table: a}}}}
      - name: contact
        config:
          tags: [hourly, "{{ var('group') }}"]
          meta: {exporter: {key: crm_contact, source: {table: b}}}
  - name: shop
    schema: analytics_raw
    config: {tags: [nightly, sales]}
    tables:
      - {name: orders, config: {meta: {exporter: {key: Order, source: {table: c}}}}}
      - {name: log, config: {tags: kept, meta: {exporter: {key: "crm_*", source: {table: d}}}}}
"""


@pytest.fixture
def place(product: Workplace) -> Workplace:
    (product.folder / "models" / "sources.yml").unlink(missing_ok=True)
    folder = product.folder / "models" / "below"
    folder.mkdir()
    (folder / "other.yml").write_text(SOURCES)
    project = product.folder / "dbt_project.yml"
    project.write_text(project.read_text() + "\nvars: {group: billing}\n")
    for table in "abcd":
        product.query(
            product.core,
            f"create table {table} (id bigint primary key); insert into {table} values (1)",
        )
    return product


def _shown(place: Workplace, *words: str) -> list[str]:
    done = place.run("exporter", "state", "show", "--json", *words)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["key"] for line in done.stdout.splitlines()]


@pytest.mark.long
def test_a_tag_means_what_it_means_to_dbt(place: Workplace) -> None:
    names = {
        "crm.customer": "crm_customer",
        "crm.contact": "crm_contact",
        "shop.orders": "Order",
        "shop.log": "crm_*",
    }
    for tag in ("people", "nightly", "hourly", "billing", "sales", "kept", "n*"):
        listed = place.dbt("-q", "ls", "--resource-type", "source", "-s", f"tag:{tag}").split()
        expected = {names[".".join(one.rsplit(".", 2)[-2:])] for one in listed}
        assert expected, tag
        assert set(_shown(place, f"tag:{tag}")) == expected, tag


def test_keys_patterns_and_tags_add_up(place: Workplace) -> None:
    assert _shown(place, "crm_c*") == ["crm_customer", "crm_contact"]
    assert _shown(place, "tag:hourly", "crm_cust*", "tag:people") == ["crm_contact", "crm_customer"]
    assert _shown(place, "crm_*") == ["crm_*"]  # a key, if there is one, wins over the pattern
    assert _shown(place, "[O]rder") == ["Order"]


@pytest.mark.parametrize(
    "command", [["load"], ["check"], ["status"], ["verify"], ["state", "show"]]
)
def test_nothing_that_matches_is_an_error(place: Workplace, command: list[str]) -> None:
    for word, advice in (
        ("tag:nigtly", "did you mean nightly?"),
        ("Ordr*", "did you mean Order?"),
        ("crm_custome", "did you mean crm_customer?"),
    ):
        done = place.run("exporter", *command, "Order", word)
        assert done.returncode == 2, done.stderr
        assert advice in done.stderr
    assert place.query(place.analytics, "select to_regclass('analytics_raw._exporter_runs')") == [
        (None,)
    ]


def test_commands_that_choose(place: Workplace) -> None:
    done = place.run("exporter", "load", "--json", "tag:nightly")
    assert done.returncode == 0, done.stderr
    loaded = {json.loads(line)["key"] for line in done.stdout.splitlines()}
    assert loaded == {"crm_customer", "Order", "crm_*"}
    done = place.run("exporter", "status", "--json", "crm_c*")
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["ok", "never"]
    done = place.run("exporter", "status", "--json", "tag:kept")
    assert [json.loads(line)["freshness"] for line in done.stdout.splitlines()] == [None]
    done = place.run("exporter", "verify", "--json", "tag:sales")
    assert len(done.stdout.splitlines()) == 2
    subjects = {
        json.loads(line)["subject"]
        for line in place.run("exporter", "check", "--json", "tag:hourly").stdout.splitlines()
    }
    assert "crm_contact" in subjects
    assert "Order" not in subjects


def test_what_changes_one_position_takes_one_key(place: Workplace) -> None:
    for words in (("reset", "crm_c*"), ("adopt", "tag:nightly"), ("set", "Ord*", "1")):
        done = place.run("exporter", "state", *words)
        assert (done.returncode, "no definition has the key" in done.stderr) == (2, True)


def test_reconcile_refuses_what_was_named_only(place: Workplace) -> None:
    file: Path = place.folder / "models" / "below" / "other.yml"
    file.write_text(file.read_text().replace("{key: Order,", "{key: Order, deletes: remove,"))
    place.load("tag:sales", "--reconcile")
    done = place.run("exporter", "load", "Order", "crm_*", "--reconcile")
    assert done.returncode == 2
    assert "nothing to do for crm_*" in done.stderr
