"""What a dbt project needs of the product: its macros, `.env.example`, and a profile.

The macros are copied into the project. A package would need `dbt deps`, a `dispatch` in
`dbt_project.yml`, and macros of the project that call the package's: dbt takes a materialization
and a strategy from the root project alone. Macros of the root project need none of it, under every
version of dbt, and `git diff` shows what an upgrade changes in them.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from exporter.config import environment, project
from exporter.config.keys import snake_case
from exporter.demo import shipped
from exporter.errors import ProjectError, UsageError

FOLDER = "dbt_exporter"
_EXAMPLES_OWN = "generate_schema_name"  # would move the models of another project
_DEFINED = re.compile(
    r"{%-?\s*(macro|test|data_test|materialization)\s+(\w+)(?:[^%]*?adapter\s*=\s*['\"](\w+))?"
)
_COMMENT = re.compile(r"{#.*?#}", re.DOTALL)
_URLS = ("DATABASE_URL_CORE", "DATABASE_URL_ANALYTICS")
_NEW_PROJECT = """\
name: {name}
version: "1.0.0"
config-version: 2
profile: {name}

model-paths: [models]
macro-paths: [macros]
seed-paths: [seeds]
test-paths: [tests]
clean-targets: [target, dbt_packages]
"""
_IGNORED = "target/\nlogs/\ndbt_packages/\n.env\n.env.*\n!.env.example\n.user.yml\n"


class Change(NamedTuple):
    """A file that is not as it should be; ``before`` is None if it is new, ``after`` if it goes."""

    file: Path
    before: str | None
    after: str | None

    def make(self) -> None:
        """Write the file, or remove it."""
        if self.after is None:
            self.file.unlink()
        else:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(self.after, encoding="utf-8")


def version() -> str:
    """Return the installed version."""
    return importlib.metadata.version("dbt-exporter")


def changes(root: Path, config: dict[str, Any], *, profile: bool = True) -> list[Change]:
    """Return what a project lacks; ``config`` is its ``dbt_project.yml``.

    ``profile``: look for the profile, too, which is a matter of the machine, not of the project.
    Raises UsageError where the project has macros or settings that exclude ours.
    """
    name = str(config.get("name"))
    _refuse_dispatch(config, name)
    macros = [root / folder for folder in config.get("macro-paths") or ["macros"]]
    tests = [root / f / "generic" for f in config.get("test-paths") or ["tests"]]
    _refuse_same_macros(macros[0] / FOLDER, [*macros, *tests])
    found = [
        *_macros(macros[0] / FOLDER),
        *_example_of_environment(root / ".env.example"),
        *(_profile(root, config) if profile else ()),
    ]
    return [change for change in found if change.before != change.after]


def new_project(root: Path) -> tuple[dict[str, Any], list[Change]]:
    """Return the ``dbt_project.yml`` of a new project, and the files that only such a one gets.

    Raises ProjectError where a folder below holds a project.
    """
    below = sorted([*root.glob("*/dbt_project.yml"), *root.glob("*/*/dbt_project.yml")])
    if below:
        raise ProjectError(
            f"no dbt_project.yml in {root} or above it, but in {project.shown(below[0].parent)}",
            hint=f"exporter init --project-dir {project.shown(below[0].parent)}",
        )
    name = re.sub(r"\W", "_", snake_case(root.name)).strip("_") or "analytics"
    name = name if name[0].isalpha() else f"project_{name}"
    files = {"dbt_project.yml": _NEW_PROJECT.format(name=name), ".gitignore": _IGNORED}
    made = [
        Change(root / file, None, text)
        for file, text in files.items()
        if not (root / file).exists()
    ]
    return {"name": name, "profile": name}, made


def _macros(folder: Path) -> Iterator[Change]:
    wanted = {}
    for file in sorted((shipped.project() / "macros").iterdir()):
        if file.stem != _EXAMPLES_OWN and file.suffix in (".sql", ".yml"):
            wanted[file.name] = _as_own(file)
    for name, text in wanted.items():
        yield Change(folder / name, _text(folder / name), text)
    for file in sorted(folder.glob("*")):  # of an older version
        old = _text(file) if file.name not in wanted else None
        if old and "`exporter init`" in old.partition("\n")[0]:
            yield Change(file, old, None)


def _as_own(file: Path) -> str:
    """Return a macro file as one of the project's: what it calls is beside it, not in a package."""
    said = f"From dbt-exporter {version()}, by `exporter init`, which also renews it: do not edit."
    head = f"{{# {said} #}}\n" if file.suffix == ".sql" else f"# {said}\n"
    return head + file.read_text(encoding="utf-8").replace("dbt_exporter.", "")


def _example_of_environment(file: Path) -> Iterator[Change]:
    whole = (shipped.project() / ".env.example").read_text(encoding="utf-8")
    before = _text(file)
    lines = [line for line in whole.splitlines() if line.startswith(_URLS)]
    missing = [line for line in lines if line.partition("=")[0] not in (before or "")]
    yield Change(file, before, whole if before is None else _appended(before, missing))


def _profile(root: Path, config: dict[str, Any]) -> Iterator[Change]:
    """Yield the profile that takes its fields from DATABASE_URL_ANALYTICS, if there is none."""
    name = environment.profile_name(config)
    if name is None:
        raise ProjectError(
            f"{project.shown(root / 'dbt_project.yml')} names no profile",
            hint=f"add a line to it: profile: {config.get('name')}",
        )
    file = environment.profiles_file(root)
    if file is not None and name in project.read(file):
        environment.postgres_output(file, name)
        return
    whole = (shipped.project() / "profiles.yml.example").read_text(encoding="utf-8")
    comment, _, profile = whole.partition("dbt_exporter:\n")
    profile = f"{name}:\n{profile}"
    here = environment.profiles_folder(root) / "profiles.yml"
    before = _text(here)
    head = "".join(comment.splitlines(keepends=True)[1:])
    head = f"# dbt's connection to the analytics database.\n{head}"
    yield Change(here, before, _appended(before or "", [(head + profile).rstrip("\n")]))


def _appended(before: str, lines: list[str]) -> str:
    if not lines:
        return before
    gap = "" if not before or before.endswith("\n") else "\n"
    return before + gap + "\n".join(lines) + "\n"


def _refuse_dispatch(config: dict[str, Any], name: str) -> None:
    """Raise UsageError where dbt would not find the project's macros before its own."""
    for entry in config.get("dispatch") or []:
        order = list(entry.get("search_order") or [])
        if entry.get("macro_namespace") != "dbt" or order[:1] == [name]:
            continue
        if name not in order or ("dbt" in order and order.index("dbt") < order.index(name)):
            raise UsageError(
                "dbt_project.yml: the search_order of dispatch for macro_namespace dbt does not"
                f" put {name} before dbt, so dbt would pass over the macros of `upsert`",
                hint=f"search_order: {[name, *(n for n in order if n != name)]}",
            )


def _refuse_same_macros(ours: Path, folders: list[Path]) -> None:
    """Raise UsageError where the project itself defines a macro of ours."""
    shipped_ones = set()
    for file in (shipped.project() / "macros").glob("*.sql"):
        if file.stem != _EXAMPLES_OWN:
            shipped_ones |= set(_names(file))
    for folder in folders:
        for file in sorted(folder.rglob("*.sql")):
            for name in _names(file) if ours not in file.parents else ():
                if name in shipped_ones:
                    raise UsageError(
                        f"{project.shown(file)} defines {name}, and so does dbt-exporter: dbt"
                        " refuses two of one name",
                        hint="remove it if it came from dbt-exporter, else rename or merge it",
                    )


def _names(file: Path) -> Iterator[str]:
    text = _COMMENT.sub("", file.read_text(encoding="utf-8"))
    for kind, name, adapter in _DEFINED.findall(text):
        if kind == "materialization":
            yield f"materialization {name} for {adapter or 'every adapter'}"
        else:
            yield f"test {name}" if kind.endswith("test") else f"macro {name}"


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None
