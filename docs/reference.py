"""A hook of mkdocs that generates the reference's tables from the code.

In a page, ``<!-- reference: NAME -->`` is replaced by the table of that name, and
``<!-- files: PATH, PATH -->`` by the text of these files.
"""

from __future__ import annotations

import inspect
import posixpath
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from exporter import errors
from exporter.commands import shared as cli
from exporter.config.keys import KEYS, Key

ROOT = Path(__file__).resolve().parent.parent


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in tables and files; turn links to files outside of the site into plain names."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        outside = posixpath.normpath(posixpath.join(folder, found[2])).startswith("..")
        return f"`{found[1]}`" if outside else found[0]

    def shown(found: re.Match[str]) -> str:
        return "".join(_file(ROOT / "docs" / folder / name) for name in found[1].split(", "))

    markdown = re.sub(r"<!-- files: (.+) -->", shown, markdown)
    markdown = re.sub(r"<!-- reference: (\w+) -->", lambda found: TABLES[found[1]](), markdown)
    return re.sub(r"\[([^]\n]+)\]\((\.\./[^)\n]+)\)", link, markdown)


def definition() -> str:
    """Return the table of a definition's keys."""
    return _table(
        ("Key", "Default", "Meaning"),
        ((f"`{name}`", _default(key), key.meaning) for name, key in KEYS.items()),
    )


def _default(key: Key) -> str:
    return key.otherwise if key.default is None else f"`{key.default}`"


def environment() -> str:
    """Return the table of environment variables."""
    return _table(
        ("Variable", "Meaning"), ((f"`{name}`", text) for name, text in cli.ENVIRONMENT.items())
    )


def exit_statuses() -> str:
    """Return the table of exit statuses."""
    return _table(("Status", "Meaning"), errors.EXIT_STATUSES.items())


def error_classes() -> str:
    """Return the table of errors, subclasses indented below their class."""

    def rows(kind: type[errors.ExporterError], depth: int) -> Iterable[tuple[str, ...]]:
        indent = "&nbsp;" * 4 * depth
        yield f"{indent}`{kind.__name__}`", str(kind.exit_status), inspect.getdoc(kind) or ""
        for one in kind.__subclasses__():
            yield from rows(one, depth + 1)

    return _table(("Error", "Exit status", "Says"), rows(errors.ExporterError, 0))


def macros() -> str:
    """Return the public macros, which have their file's name; the others in a file are helpers."""
    text = ""
    for file in sorted((ROOT / "macros").glob("*.yml")):
        for macro in yaml.safe_load(file.read_text(encoding="utf-8"))["macros"]:
            if macro["name"] == file.stem:
                text += f"### `{macro['name']}`\n\n{macro['description']}\n\n"
                rows = [(f"`{i['name']}`", i["description"]) for i in macro.get("arguments", [])]
                text += _table(("Argument", "Meaning"), rows) + "\n" if rows else ""
    return text


def _file(path: Path) -> str:
    """Return a heading with the file's name, and its text as a block of code."""
    language = {".yml": "yaml", ".service": "ini", ".timer": "ini", ".py": "python"}
    text = path.read_text(encoding="utf-8")
    return f"## {path.name}\n\n```{language.get(path.suffix, 'sh')}\n{text}```\n\n"


def _table(head: tuple[str, ...], rows: Iterable[Iterable[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        "| " + " | ".join(" ".join(str(one).replace("|", "\\|").split()) for one in line) + " |\n"
        for line in lines
    )


TABLES: dict[str, Callable[[], str]] = {
    one.__name__: one for one in (definition, environment, exit_statuses, error_classes, macros)
}
