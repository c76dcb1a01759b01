"""A new definition: decides how a table is landed, and writes its YAML and staging model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from exporter.config import Definition, project
from exporter.config.keys import snake_case
from exporter.errors import UsageError, nearest
from exporter.raw import STAMP
from exporter.raw.migrations import TABLE as MIGRATIONS
from exporter.scaffold import survey
from exporter.scaffold.survey import Relation
from exporter.source import Column
from exporter.state import SCHEMA
from exporter.terminal import text
from exporter.wire import Connection

# Tables that are in SCHEMA already.
_TAKEN = {"_exporter_state", "_exporter_runs", MIGRATIONS.partition(".")[2]}

# Asks a question; gets its text, the possible answers, and the option that would have answered it.
Ask = Callable[[str, Sequence[str], str], str]


class Wishes(NamedTuple):
    """What the options of the command line decide."""

    key: str | None = None
    name: str | None = None
    cursor: str | None = None
    id_field: str | None = None
    conflict_columns: tuple[str, ...] = ()
    append: bool = False


class Plan(NamedTuple):
    """How a table is to be landed. ``limits`` are sentences about what it does not cover."""

    relation: Relation
    key: str
    name: str
    cursor: str
    id_field: str | None
    conflict_columns: tuple[str, ...]
    nulls: str
    limits: tuple[str, ...]

    @property
    def model(self) -> str:
        """The staging model's name."""
        return f"stg_{self.name}"


def decide(
    source: Connection, relation: Relation, declared: list[Definition], wishes: Wishes, ask: Ask
) -> Plan:
    """Decide how a table is landed; ask for what its catalog does not tell. Raises UsageError."""
    for definition in declared:
        read = definition.source
        if (read.schema, read.table) == (relation.schema, relation.name):
            raise UsageError(
                f"{relation} is declared already, in {definition.where}",
                hint=f"exporter load {definition.key}",
            )
    cursor = _cursor(relation, wishes, ask)
    changes = survey.grows_with_changes(relation, cursor)
    conflict = _conflict_columns(relation, wishes, changes, ask)
    nulls = "error"
    if survey.has_nulls(source, relation, cursor):
        nulls = "load" if conflict else "skip"
    alone = any(index.unique and index.columns == (cursor,) for index in relation.indexes)
    id_field = _known(relation, wishes.id_field, "--id-field")
    if id_field is None and len(conflict) == 1 and not alone and conflict != (cursor,):
        id_field = conflict[0]
    key, name = _names(relation, declared, wishes)
    limits = tuple(_limits(key, cursor, changes, conflict, nulls))
    return Plan(relation, key, name, cursor, id_field, conflict, nulls, limits)


def _cursor(relation: Relation, wishes: Wishes, ask: Ask) -> str:
    found = survey.cursors(relation)
    chosen = _known(relation, wishes.cursor, "--cursor")
    if chosen is not None:
        usable = [c.name for c in relation.columns if survey.may_be_cursor(c)]
        if chosen not in usable:
            raise UsageError(
                f"--cursor {chosen}: a cursor is a timestamp, a date or an integer",
                hint="such columns: " + (", ".join(usable) or "none"),
            )
        return chosen
    if found.sure:
        return found.names[0]
    if not found.names:
        raise UsageError(
            f"{relation} has no timestamp, date or integer that could tell new rows from old ones",
            hint="give it a column that the database sets with every change, updated_at, say",
        )
    question = f"{relation}: which column grows with every change of a row?"
    answer = ask(question, found.names, "--cursor COLUMN")
    return _known(relation, answer, "--cursor") or answer


def _conflict_columns(
    relation: Relation, wishes: Wishes, changes: bool, ask: Ask
) -> tuple[str, ...]:
    if wishes.append:
        return ()
    for name in wishes.conflict_columns:
        _known(relation, name, "--conflict-columns")
    if wishes.conflict_columns or relation.key or not changes:
        return wishes.conflict_columns or relation.key
    names = [column.name for column in relation.columns]
    question = f"{relation}: which columns tell its rows apart?"
    answer = ask(question, names, "--conflict-columns A,B, or --append for a log of versions,")
    return tuple(name.strip() for name in answer.split(","))


def _known(relation: Relation, name: str | None, flag: str) -> str | None:
    names = [column.name for column in relation.columns]
    if name is not None and name not in names:
        raise UsageError(f"{flag}: {relation} has no column {name}", hint=nearest(name, names))
    return name


def _names(relation: Relation, declared: list[Definition], wishes: Wishes) -> tuple[str, str]:
    """Return the definition's key and the raw table's name; neither is taken."""
    keys = {definition.key for definition in declared}
    destinations = [definition.destination for definition in declared]
    tables = _TAKEN | {raw.table for raw in destinations if raw.schema == SCHEMA}
    key = relation.name if relation.name not in keys else f"{relation.schema}.{relation.name}"
    name = snake_case(relation.name)
    if name in tables or not name:
        name = snake_case(f"{relation.schema} {relation.name}")
    key, name = wishes.key or key, wishes.name or name
    for flag, chosen, taken in (("--key", key, keys), ("--name", name, tables)):
        if chosen in taken:
            raise UsageError(f"{chosen} is taken", hint=f"{flag} gives {relation} another one")
    if not re.fullmatch(r"\w+", name):
        raise UsageError(f"--name {name} is no name for a model", hint="letters, digits and _")
    return key, name


def _limits(
    key: str, cursor: str, changes: bool, conflict: tuple[str, ...], nulls: str
) -> list[str]:
    found = []
    if not changes and conflict:
        found.append(
            f"{cursor} tells new rows alone: a row that is changed later stays in raw as it was,"
            f" until exporter load {key} --full-refresh"
        )
    if not changes and not conflict:
        found.append("an append-only log: a row lands once, and stays as it was then")
    if changes and not conflict:
        found.append("an append-only log: every version of a row lands as a row of its own")
    if nulls != "error":
        found.append(
            f"rows without {cursor} are {'left out' if nulls == 'skip' else 'landed, too'}"
        )
    return found


# -- the files


def write(root: Path, source: Connection, plan: Plan) -> list[Path]:
    """Write the YAML and the staging model; return them. Raises UsageError, having written none."""
    folders = project.model_paths(root, project.read(root / "dbt_project.yml"))
    for file in (file for folder in folders for file in folder.rglob(f"{plan.model}.*")):
        if file.suffix in (".sql", ".py", ".yml", ".yaml"):
            raise UsageError(
                f"{file.relative_to(root)} is there already, and is left alone",
                hint="--name gives the table another name",
            )
    quoted = _quoted(source, plan)
    staging = folders[0] / "staging"
    contents = {
        staging / f"{plan.model}.yml": declaration(plan, quoted),
        staging / f"{plan.model}.sql": staging_model(plan, quoted),
    }
    for file, content in contents.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as opened:  # never over another one
            opened.write(content)
    return list(contents)


def declaration(plan: Plan, quoted: dict[str, str]) -> str:
    """Return the YAML: the source's table with its definition, and the staging model's columns.

    dbt merges the tables of one source from many files. ``quoted`` gives the columns' names as SQL
    writes them.
    """
    relation = plan.relation
    cursor: dict[str, Any] = {"field": plan.cursor}
    if plan.id_field:
        cursor["id_field"] = plan.id_field
    if plan.nulls != "error":
        cursor["nulls"] = plan.nulls
    exporter: dict[str, Any] = {
        "key": plan.key,
        "source": {"schema": relation.schema, "table": relation.name, "cursor": cursor},
    }
    if plan.conflict_columns:
        exporter["conflict_columns"] = list(plan.conflict_columns)
    about = _comment(relation.comment) or f"`{relation}` of the core database."
    entries = [_column(plan, column, column.name, quoted) for column in relation.columns]
    table = {
        "name": plan.name,
        "description": about,
        "config": {"meta": {"exporter": exporter}},
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
    head = [f"Written by `exporter new`, from what the core database tells of {relation}."]
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
        sentences.append(f"References {fact.references}.")
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
