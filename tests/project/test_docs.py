"""The site builds without a warning, and its reference leaves out nothing that the code has."""

from __future__ import annotations

import ast
import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from exporter import errors
from exporter.commands import shared as cli
from exporter.config import project
from exporter.config.keys import KEYS
from tests.conftest import ROOT, Workplace
from tests.helpers.commands import check_command


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def _text(site: Path, page: str) -> str:
    """What a page shows, its code marked with backquotes."""
    content = (site / page).read_text()
    article = content[content.index("<article") : content.index("</article>")]
    article = re.sub(r"</?code>", "`", article.replace("<code></code>", ""))
    return html.unescape(re.sub(r"<[^>]+>", "", article))


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for file in site.rglob("*.html"):
        for address in re.findall(r'(?:src|rel="stylesheet" href)="([^"]*)"', file.read_text()):
            assert not re.match(r"(https?:)?//", address), file


def _commands(
    command: click.Command, words: tuple[str, ...] = ("exporter",)
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below
            yield from _commands(below, (*words, name))


def test_every_command_and_option_says_what_it_does(site: Path) -> None:
    page = _text(site, "reference/commands.html")
    titles = re.split(r"^(exporter[a-z ]*)¶$", page, flags=re.M)
    told = dict(zip(titles[1::2], titles[2::2], strict=True))
    commands = dict(_commands(cli.main))
    assert sorted(told) == sorted(" ".join(words) for words in commands)
    for words, command in commands.items():
        assert command.help, words
        for option in (one for one in command.params if isinstance(one, click.Option)):
            assert option.help, (words, option.name)
            for name in option.opts:
                assert name in told[" ".join(words)]


def test_every_key_of_a_definition_is_there(site: Path) -> None:
    page = _text(site, "reference/definition.html")
    for name, key in KEYS.items():
        assert f"`{name}`" in page
        assert key.meaning.replace("`", "") in page.replace("`", "")


def test_every_error_and_exit_status_is_there(site: Path) -> None:
    page = _text(site, "reference/errors.html")
    kinds = [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, errors.ExporterError)
    ]
    for kind in kinds:
        assert f"`{kind.__name__}`" in page
        assert kind.exit_status in errors.EXIT_STATUSES
        assert kind.__name__ in (errors.__doc__ or "")
    for status, meaning in errors.EXIT_STATUSES.items():
        assert re.search(rf"^{status}\n{re.escape(meaning)}$", page, re.M)


def test_every_environment_variable_is_there(site: Path) -> None:
    page = _text(site, "reference/environment.html")
    read = {name for file in _code() for name in _variables(file)}
    assert {cli.CORE, "BATCH_SIZE", "EXPORTER_PG_BIN", "DBT_TARGET"} <= read
    for name in read:
        assert name in cli.ENVIRONMENT
        assert f"`{name}`" in page


def _code() -> list[Path]:
    files = (ROOT / "exporter").rglob("*.py")
    return [file for file in files if file.name != "__init__.py"]  # their texts are names of code


def _variables(file: Path) -> list[str]:
    """The texts in a file's code that look like a variable's name."""
    nodes = ast.walk(ast.parse(file.read_text()))
    texts = [str(one.value) for one in nodes if isinstance(one, ast.Constant)]
    names = [one for one in texts if re.fullmatch(r"[A-Z]+(_[A-Z0-9]+)+", one)]
    return [one for one in names if one != "JSON_NULL"]  # a parser's token


def test_every_option_of_upsert_and_every_macro_is_there(site: Path) -> None:
    page = _text(site, "reference/dbt.html")
    source = "".join(file.read_text() for file in (ROOT / "macros").glob("*.sql"))
    options = set(re.findall(r"meta\.get\('(upsert_\w+)'", source))
    assert len(options) >= 3
    for name in options:
        assert f"`{name}`" in page
    for file in (ROOT / "macros").glob("*.sql"):
        if f"macro {file.stem}(" in file.read_text():
            assert f"`{file.stem}`" in page


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.S | re.M)
    return ["\n".join(line.removeprefix(a) for line in b.splitlines()) for a, b in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_pages_are_there(page: Path) -> None:
    lines = [line for block in _blocks(page, "sh") for line in block.splitlines()]
    for block in _blocks(page, "console"):
        lines += re.findall(r"^\$ (.*)$", block, re.M)
    spoken = re.findall(r"(?<![`\w])`((?:exporter|dbt) [a-z].*?)`", page.read_text(), re.S)
    lines += [" ".join(one.split()) for one in spoken if "…" not in one and "|" not in one]
    ours = re.compile(r"(^|&& )(\w+=\S+ )*(make|exporter|dbt)( |$)")
    for line in filter(ours.search, lines):
        check_command(line)


def test_what_is_migrated_is_one_definition(place: Workplace) -> None:
    (text,) = _blocks(ROOT / "docs" / "migrating.md", "yaml")
    place.define(text)
    (one,) = project.definitions(place.folder)
    assert (one.key, one.source.table, one.source.cursor.field, one.source.cursor.id_field) == (
        ("StatEvent", "StatEvent", "updated_at", "id")
    )
    assert (one.destination.conflict_columns, one.batch_rows) == (("id",), 10_000)


def test_the_trigger_moves_the_cursor(place: Workplace) -> None:
    place.query(place.core, 'create table "Customer" (id int, updated_at timestamptz)')
    (trigger,) = _blocks(ROOT / "docs" / "guarantees.md", "sql")
    place.query(place.core, trigger)
    place.query(place.core, "insert into \"Customer\" values (1, '2001-01-01')")
    moved = "select updated_at > now() - interval '1 minute' from \"Customer\""
    assert place.query(place.core, moved) == [(True,)]
