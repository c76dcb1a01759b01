"""The files of a new definition: its YAML and its staging model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from exporter.config import project
from exporter.config.keys import snake_case
from exporter.errors import UsageError
from exporter.raw import STAMP
from exporter.scaffold.plan import Plan
from exporter.source import Column
from exporter.state import SCHEMA
from exporter.terminal import text
from exporter.wire import Connection


def write(root: Path, source: Connection, plan: Plan) -> list[Path]:
    """Write the YAML and the staging model; return them. Raises UsageError, having left none."""
    folders = project.model_paths(root, project.read(root / "dbt_project.yml"))
    quoted = _quoted(source, plan)
    staging = folders[0] / "staging"
    contents = {
        staging / f"{plan.model}.sql": staging_model(plan, quoted),
        staging / f"{plan.model}.yml": declaration(plan, quoted),  # last: it declares the table
    }
    written = []
    try:
        for file, content in contents.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as opened:  # never over another one
                written.append(file)
                opened.write(content)
    except OSError as error:
        for file in written:
            file.unlink()
        raise UsageError(f"{project.shown(file)}: {error.strerror}") from None
    return written[::-1]


def declaration(plan: Plan, quoted: dict[str, str]) -> str:
    """Return the YAML: the source's table with its definition, and the staging model's columns.

    dbt merges the tables of one source from many files. ``quoted`` gives the columns' names as SQL
    writes them.
    """
    relation = plan.relation
    about = _comment(relation.comment) or f"`{relation}` of the {plan.database.lower()} database."
    entries = [_column(plan, column, column.name, quoted) for column in relation.columns]
    table = {
        "name": plan.name,
        "description": about,
        "config": {"meta": {"exporter": plan.definition}},
        "columns": [entry for entry in entries if entry["description"] or "quote" in entry],
    }
    source = {
        "name": SCHEMA,
        "schema": SCHEMA,
        "loader": "exporter",
        "config": {"loaded_at_field": STAMP},
        "tables": [table],
    }
    columns = [
        _column(plan, column, name, quoted) | _tests(plan, column)
        for column, name in _renamed(relation.columns).items()
    ]
    columns.append({"name": STAMP, "description": "When the row last changed in raw."})
    model = {"name": plan.model, "description": about, "columns": columns}
    told = f"what the {plan.database.lower()} database tells of {relation}"
    head = [f"Written by `exporter new`, from {told}."]
    head += [f"Limit: {limit}." for limit in plan.limits]
    lines = [f"# {line}" for sentence in head for line in text.wrapped(sentence, 98, "", "  ")]
    parts: list[dict[str, Any]] = [{"version": 2}, {"sources": [source]}, {"models": [model]}]
    return "\n".join(["\n".join(lines), *(_dumped(part) for part in parts)])


def _column(plan: Plan, column: Column, name: str, quoted: dict[str, str]) -> dict[str, Any]:
    """Return a column's entry, described by what the database says of it."""
    fact = (plan.relation.facts or {})[column.name]
    sentences = [_comment(fact.comment)]
    if column.name in plan.conflict_columns and not fact.comment:
        part = "Part of the primary key." if len(plan.conflict_columns) > 1 else "Primary key."
        sentences.append(part)
    if fact.references:
        sentences.append(f"References {_comment(fact.references)}.")
    if fact.labels:
        sentences.append(f"One of {_comment(', '.join(fact.labels))}.")
    entry: dict[str, Any] = {"name": name, "description": " ".join(filter(None, sentences))}
    if quoted[name] != name:
        entry["quote"] = True
    return entry


def _tests(plan: Plan, column: Column) -> dict[str, Any]:
    if column.name not in plan.conflict_columns:
        return {}
    return {"data_tests": [*(["unique"] if len(plan.conflict_columns) == 1 else []), "not_null"]}


def staging_model(plan: Plan, quoted: dict[str, str]) -> str:
    """Return the model: a view on raw, its columns named as analytics names things."""
    lines = []
    for column, name in _renamed(plan.relation.columns).items():
        before, after = quoted[column.name], quoted[name]
        lines.append(before if before == after else f"{before} as {after}")
    columns = ",\n".join(f"            {line}" for line in [*lines, STAMP])
    return (
        f"with\n    source as (select * from {{{{ source('{SCHEMA}', '{plan.name}') }}}}),\n\n"  # noqa: S608  a file, its names quoted
        f"    renamed as (\n\n        select\n{columns}\n\n        from source\n\n    )\n\n"
        "select *\nfrom renamed\n"
    )


def _renamed(columns: Sequence[Column]) -> dict[Column, str]:
    """Return each column's name in analytics; no two are alike."""
    names: dict[Column, str] = {}
    for column in columns:
        name = plain = snake_case(column.name) or "column"
        if len(name.encode()) > project.LONGEST:  # with its underscores
            name = plain = column.name
        number = 2
        while name in names.values() or name == STAMP:
            name, number = f"{plain}_{number}", number + 1
        names[column] = name
    return names


def _quoted(source: Connection, plan: Plan) -> dict[str, str]:
    """Return the columns' names as SQL writes them: in quotes where they need some."""
    renamed = _renamed(plan.relation.columns)
    names = [*(column.name for column in renamed), *renamed.values()]
    rows = source.execute("select n, quote_ident(n) from unnest(%s::text[]) n", (names,))
    return dict(rows.fetchall())


def _comment(comment: str | None) -> str:
    """Return a comment for dbt, which else would run what looks like Jinja in it."""
    comment = (comment or "").strip()
    if not re.search(r"\{[{%#]", comment):
        return comment
    return "{% raw %}" + comment.replace("endraw", "end raw") + "{% endraw %}"


class _Dumper(yaml.SafeDumper):
    """Writes lists as people do, indented below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _dumped(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
