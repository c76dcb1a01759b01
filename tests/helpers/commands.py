"""Whether a command that a page or a file names is one that there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from dbt.cli.main import cli as dbt

from exporter.commands.shared import main
from tests.conftest import ROOT

_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def check_command(command: str) -> None:
    """Let our programs, and dbt, parse their parts of a shell command. Raises click.UsageError."""
    for part in re.split(r" && | \| |; ", re.sub(r"(^|\s)#.*", "", command)):
        words = shlex.split(part)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        program = Path(words.pop(0)).name if words else ""
        if program == "make":
            assert {word for word in words if "=" not in word} <= _TARGETS, part
        elif program in ("exporter", "dbt"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DBT_PROFILES_DIR", str(ROOT))  # dbt asks for one that exists
                _parse(main if program == "exporter" else dbt, words)


def _parse(command: click.Command, words: list[str], parent: click.Context | None = None) -> None:
    if not words and isinstance(command, click.Group):
        return
    if not isinstance(command, click.Group):
        command.make_context(command.name, words, parent=parent)
        return
    context = click.Context(command, parent, info_name=command.name)
    below = command.get_command(context, words[0])
    if below is None:
        raise click.UsageError(f"no command {words[0]} in {command.name}")
    _parse(below, words[1:], context)
