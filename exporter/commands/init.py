"""``exporter init``: a dbt project is given what it needs, or begun."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.commands import shared as cli
from exporter.errors import ExporterError, ProjectError, UsageError

if TYPE_CHECKING:
    from exporter.scaffold.adoption import Change


@click.command(
    "init", epilog=cli.examples("exporter init", "exporter init --yes", "exporter init --check")
)
@click.option("--check", is_flag=True, help="Write nothing: exit status 1 if a file is not so.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: change existing files, too.")
@cli.shared
def command(call: cli.Call, check: bool, yes: bool) -> None:
    """Add the macros, .env.example and a profile to a dbt project; run it again after an upgrade.

    Where a file exists and would change, the change is shown, and you are asked. In a folder
    without a dbt project, it begins one.
    """
    from exporter.config import environment, project
    from exporter.scaffold import adoption

    begun: list[Change] = []
    try:
        root = project.find(call.project_dir)
    except ProjectError:
        if check:
            raise
        root = call.project_dir.resolve()
        config, begun = adoption.new_project(root)
    else:
        config = project.read(root / "dbt_project.yml")
    environment.load_environment(root, call.environment)
    changes = [*begun, *adoption.changes(root, config, profile=not check)]
    if check:
        _report(changes)
    existing = [change for change in changes if change.before is not None]
    if existing and not (yes or (sys.stdin.isatty() and sys.stdout.isatty())):
        _show(existing)
        raise UsageError(
            f"exporter init would change {', '.join(_names(existing))}; nothing was written",
            hint="exporter init --yes writes it",
        )
    left = [change for change in changes if not _made(change, yes)]
    if left:
        raise ExporterError(
            f"left as it was: {', '.join(_names(left))}", hint="exporter init asks again"
        )
    cli.out(*_next(root, changes))


def _report(changes: list[Change]) -> None:
    """Print what is not up to date, and end."""
    from exporter.scaffold import adoption

    if not changes:
        cli.out(f"up to date with dbt-exporter {adoption.version()}")
        sys.exit(0)
    _show([change for change in changes if change.before is not None])
    cli.out(*(f"missing: {name}" for name in _names([c for c in changes if c.before is None])))
    raise ExporterError(
        f"not up to date with dbt-exporter {adoption.version()}", hint="exporter init"
    )


def _made(change: Change, yes: bool) -> bool:
    """Make a change, a file's only if it may be changed; whether it was made."""
    name = _names([change])[0]
    if change.before is not None:
        _show([change])
        if not yes and not click.confirm(f"Change {name}?", err=True):
            return False
    change.make()
    cli.out(
        f"{'added' if change.before is None else 'changed' if change.after else 'removed'} {name}"
    )
    return True


def _show(changes: list[Change]) -> None:
    for change in changes:
        name = _names([change])[0]
        before, after = (change.before or "").splitlines(), (change.after or "").splitlines()
        lines = difflib.unified_diff(before, after, name, name, lineterm="")
        cli.out(*lines)


def _names(changes: list[Change]) -> list[str]:
    from exporter.config import project

    return [str(project.shown(change.file)) for change in changes]


def _next(root: Path, changes: list[Change]) -> list[str]:
    """Return what to run next."""
    from exporter.config import project
    from exporter.scaffold import adoption

    if not changes:
        return [f"up to date with dbt-exporter {adoption.version()}"]
    lines = [] if root == Path.cwd() else [f"cd {shlex.quote(str(project.shown(root)))}"]
    if not os.environ.get(cli.CORE):
        copy = "" if (root / ".env").exists() else "cp .env.example .env  "
        lines.append(f"{copy}# name the databases in .env")
    return [*lines, "exporter new --all"]
