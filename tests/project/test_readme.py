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


def _commands(beginning: str) -> list[str]:
    return re.findall(rf"^ *({beginning}.*)$", README, re.M)


def test_first_table_in_five_minutes(place: Workplace) -> None:
    """In a project of the reader's own, which has nothing of ours."""
    assert _commands("exporter init") == ["exporter init"]
    assert place.run("exporter", "init").returncode == 0
    place.query(
        place.core,
        'create table "Customer" (id int primary key, email text, updated_at timestamp(3));'
        " insert into \"Customer\" values (1, 'A@example.org', now()), (2, 'B@example.org', now());"
        ' alter table "Customer" alter updated_at set not null',
    )
    (place.folder / "models" / "sources.yml").write_text(_block("yaml"))
    (place.folder / "models" / "customer.sql").write_text(_block("sql"))
    for number in (3, 4):
        assert place.load("Customer")["status"] == "ok"
        place.dbt("run", "-s", "customer")
        place.query(
            place.core,
            f"insert into \"Customer\" values ({number}, 'C@example.org', now())",
        )
    emails = place.query(place.analytics, "select email from public.customer order by id")
    assert emails == [("a@example.org",), ("b@example.org",), ("c@example.org",)]


def test_every_command_is_named() -> None:
    for name in main.list_commands(click.Context(main)):
        assert f"| `exporter {name}" in README
