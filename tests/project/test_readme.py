"""What the README tells a reader to type and to write works as it stands there."""

from __future__ import annotations

import re

import click

from exporter.commands.shared import main
from tests.conftest import ROOT, Workplace

README = (ROOT / "README.md").read_text()


def _block(language: str) -> str:
    found = re.search(rf"^( *)```{language}\n(.*?)^ *```", README, re.S | re.M)
    assert found
    return "\n".join(line.removeprefix(found[1]) for line in found[2].splitlines())


def test_first_table_in_five_minutes(bare: Workplace) -> None:
    bare.query(
        bare.core,
        'create table "Customer" (id int primary key, email text, updated_at timestamp(3));'
        " insert into \"Customer\" values (1, 'A@example.org', now()), (2, 'B@example.org', now());"
        ' alter table "Customer" alter updated_at set not null',
    )
    (bare.folder / "models" / "staging" / "_sources.yml").write_text(_block("yaml"))
    (bare.folder / "models" / "marts" / "customer.sql").write_text(_block("sql"))
    for number in (3, 4):
        assert bare.load("Customer")["status"] == "ok"
        bare.dbt("run", "-s", "customer")
        bare.query(
            bare.core,
            f"insert into \"Customer\" values ({number}, 'C@example.org', now())",
        )
    emails = bare.query(bare.analytics, "select email from analytics.customer order by id")
    assert emails == [("a@example.org",), ("b@example.org",), ("c@example.org",)]


def test_every_command_is_named() -> None:
    for name in main.list_commands(click.Context(main)):
        assert f"| `exporter {name}" in README
