"""What the shell, a mistyped word and a narrow terminal meet."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from exporter.commands.shared import main
from tests.conftest import Workplace, fill
from tests.helpers.commands import check_command
from tests.helpers.processes import on_terminal, plain, started

BIN = Path(sys.executable).parent


def _leaves(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield " ".join(words), command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        assert below
        yield from _leaves(below, (*words, name))


LEAVES = dict(_leaves(main, ("exporter",)))


@pytest.mark.parametrize("words", LEAVES)
def test_help_has_examples_that_parse(words: str) -> None:
    command = LEAVES[words]
    context = click.Context(command, info_name=words, terminal_width=80, max_content_width=80)
    help = command.get_help(context)
    assert max(len(line) for line in help.splitlines()) <= 80
    _, _, examples = help.partition("Examples:\n")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert lines
    assert any(line.startswith((words, "dbt")) for line in lines)
    for line in lines:
        check_command(line)


@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("laod", "did you mean load?"),
        ("db migrat", "did you mean migrate?"),
        ("state shwo", "did you mean show?"),
        ("load --ful-refresh", "--full-refresh"),
        ("state show --jsn", "--json"),
        ("load statevent", "did you mean StatEvent?"),
        ("load --log-format jsn", "'json'"),
    ],
)
def test_what_is_mistyped_is_answered_with_the_nearest(
    product: Workplace, typed: str, advice: str
) -> None:
    done = product.run("exporter", *typed.split())
    assert done.returncode == 2
    assert advice in done.stderr
    assert done.stdout == ""


def _completed(place: Workplace, *typed: str) -> tuple[list[str], str]:
    """What bash offers for the last word."""
    words = " ".join(f"'{word}'" for word in ("exporter", *typed))
    script = (
        'eval "$(_EXPORTER_COMPLETE=bash_source exporter)";'
        f" COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _exporter_completion exporter;"
        ' printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=place.folder,
        env={**place.environment, "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split(), done.stderr


def test_bash_completes_commands_options_and_keys(product: Workplace) -> None:
    assert _completed(product, "lo") == (["load"], "")
    assert _completed(product, "db", "mi") == (["migrate"], "")
    assert _completed(product, "load", "--full") == (["--full-refresh"], "")
    assert _completed(product, "load", "") == (["StatEvent"], "")
    assert _completed(product, "load", "StatEvent", "") == ([], "")
    assert _completed(product, "state", "reset", "Stat") == (["StatEvent"], "")
    assert _completed(product, "db", "new", "x", "--from", "S") == (["StatEvent"], "")
    product.define(
        "- {name: a, tags: [nightly], config: {meta: {exporter: {key: A, source: {table: a}}}}}"
    )
    assert _completed(product, "load", "ta") == (["tag:nightly"], "")
    assert _completed(product, "status", "tag", ":") == (["nightly"], "")
    assert _completed(product, "status", "tag", ":", "ni") == (["nightly"], "")
    assert _completed(product, "state", "reset", "ta") == ([], "")
    (product.folder / "models" / "wrong.yml").write_text("sources: [exporter")
    assert _completed(product, "load", "") == ([], "")
    (product.folder / "dbt_project.yml").unlink()
    assert _completed(product, "load", "") == ([], "")
    (product.folder / "below").mkdir()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_shells(product: Workplace, shell: str) -> None:
    done = subprocess.run(
        [BIN / "exporter"],
        env={**os.environ, "_EXPORTER_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "_exporter_completion" in done.stdout


SWEPT = [
    ("--help",),
    ("--version",),
    ("load",),
    ("load", "--dry-run"),
    ("load", "-v"),
    ("status",),
    ("status", "StatEvent"),
    ("state", "show"),
    ("check",),
    ("check", "--grants"),
    ("verify",),
    ("new", "--list"),
    ("db", "status"),
    ("state", "reset", "StatEvent"),
]
# One line a definition or statement, which a terminal folds: whole lines to find, and to paste.
SENTENCES = {
    ("load",),
    ("load", "--dry-run"),
    ("load", "-v"),
    ("check", "--grants"),
    ("state", "show"),
    ("verify",),
}


def test_every_command_in_a_pipe_and_without_colours(product: Workplace) -> None:
    fill(product.core, 1, 200)
    product.query(product.core, "create table without_a_definition (id int primary key)")
    (product.folder / "db" / "migrations").mkdir(parents=True)
    (product.folder / "db" / "migrations" / "20260101000000_x.sql").write_text("-- migrate:up\n")
    for words in SWEPT:
        done = product.run("exporter", *words)
        assert done.returncode in (0, 1), (words, done.stderr)
        assert "\x1b" not in done.stdout + done.stderr, words
        assert "Traceback" not in done.stderr, words
        assert done.stdout, words
        status, text = on_terminal(product, "exporter", *words, NO_COLOR="1")
        assert status == done.returncode, (words, text)
        assert not re.search(r"\x1b\[[0-9;]*m", text), words
        if words not in SENTENCES:
            assert max(map(len, plain(text))) <= 80, (words, text)


@pytest.mark.long
def test_ctrl_c_at_any_moment_of_every_command(product: Workplace) -> None:
    fill(product.core, 1, 200)
    product.query(product.core, "create table without_a_definition (id int primary key)")
    (product.folder / "db" / "migrations").mkdir(parents=True)
    chance = random.Random(11)
    stopped = dict.fromkeys(SWEPT, 0)
    for words in SWEPT * 12:
        with started(product, *words) as process:
            time.sleep(chance.uniform(0.02, 0.25))
            process.send_signal(signal.SIGINT)
            err = process.communicate(timeout=30)[1]
        # Before Python has its handler, a signal ends it by itself: 130 to a shell, too.
        assert process.returncode in (0, 1, 130, -signal.SIGINT), (words, err)
        if process.returncode in (130, -signal.SIGINT):
            stopped[words] += 1
            # Python's own start, of which runpy is the end, tells of it as it likes.
            assert "Traceback" not in err or "exporter/" not in err, (words, err)
            told = [line for line in err.splitlines() if "interrupted" in line]
            assert len(told) <= 1, (words, err)
    assert sum(stopped.values()) > len(SWEPT) * 3, stopped
