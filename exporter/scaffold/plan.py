"""Decides how a table is landed, from what its catalog tells and a person wishes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exporter.config import Definition, project
from exporter.config.keys import snake_case
from exporter.errors import UsageError, nearest
from exporter.raw.migrations import TABLE as MIGRATIONS
from exporter.scaffold import survey
from exporter.scaffold.survey import Relation
from exporter.state import SCHEMA
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


class Present(NamedTuple):
    """What the project has already: nothing of it is declared again, or overwritten."""

    tables: dict[tuple[str, str], Definition]  # of the source, by schema and name
    keys: set[str]
    names: set[str]  # of raw tables
    files: dict[str, Path]  # in the folders of models, by name without extensions
    database: str = "CORE"

    def add(self, plan: Plan) -> None:
        """Take note of what is going to be written."""
        self.keys.add(plan.key)
        self.names.add(plan.name)


class Plan(NamedTuple):
    """How a table is to be landed. ``limits`` are sentences about what it does not cover."""

    relation: Relation
    key: str
    name: str
    cursor: str | None  # None: it is scanned
    id_field: str | None
    conflict_columns: tuple[str, ...]  # none: a log
    nulls: str
    limits: tuple[str, ...]
    database: str = "CORE"

    @property
    def model(self) -> str:
        """The staging model's name."""
        return model_of(self.name)

    @property
    def definition(self) -> dict[str, Any]:
        """What the YAML says to the exporter."""
        relation = self.relation
        source: dict[str, Any] = {} if self.database == "CORE" else {"database": self.database}
        source |= {"schema": relation.schema, "table": relation.name}
        if self.cursor:
            source["cursor"] = {"field": self.cursor}
            if self.id_field:
                source["cursor"]["id_field"] = self.id_field
            if self.nulls != "error":
                source["cursor"]["nulls"] = self.nulls
        if self.conflict_columns:
            rest: dict[str, Any] = {"conflict_columns": list(self.conflict_columns)}
        else:
            rest = {"mode": "append"}
        return {"key": self.key, "source": source, **rest}


def model_of(name: str) -> str:
    """Return the name of a raw table's staging model."""
    return f"stg_{name}"


def present(root: Path, declared: list[Definition], database: str = "CORE") -> Present:
    """Return what a project has: definitions of a database's tables, and files of models."""
    folders = project.model_paths(root, project.read(root / "dbt_project.yml"))
    files = (file for folder in folders for file in folder.rglob("*.*"))
    return Present(
        tables={
            (it.source.schema, it.source.table): it
            for it in declared
            if it.source.database == database
        },
        keys={it.key for it in declared},
        names=_TAKEN | {it.destination.table for it in declared if it.destination.schema == SCHEMA},
        files={
            file.name.partition(".")[0].lower(): file.relative_to(root)
            for file in files
            if file.suffix in (".sql", ".py", ".yml", ".yaml")
        },
        database=database,
    )


def decide(source: Connection, relation: Relation, has: Present, wishes: Wishes, ask: Ask) -> Plan:
    """Decide how a table is landed; ask for what its catalog does not tell. Raises UsageError."""
    known = has.tables.get((relation.schema, relation.name))
    if known:
        raise UsageError(
            f"{relation} is declared already, in {known.where}",
            hint=f"exporter load {known.key}",
        )
    _refuse_jinja(relation)
    cursor = _cursor(source, relation, wishes, ask)
    changes = cursor is None or survey.grows_with_changes(relation, cursor)
    conflict = _conflict_columns(relation, wishes, cursor, changes, ask)
    nulls = "error"
    if cursor and survey.has_nulls(source, relation, cursor):
        nulls = "load" if conflict else "skip"
    key, name = _names(relation, has, wishes)
    limits = [*_limits(key, cursor, changes, conflict, nulls)]
    if not conflict and not wishes.append:
        limits += _nullable_keys(relation)
    id_field = _id_field(relation, wishes, cursor, conflict)
    return Plan(relation, key, name, cursor, id_field, conflict, nulls, tuple(limits), has.database)


def _refuse_jinja(relation: Relation) -> None:
    for name in (relation.schema, relation.name, *(column.name for column in relation.columns)):
        if re.search(r"\{[{%#]", name):
            raise UsageError(f"{relation}: dbt would run the name {name} as Jinja")


def _cursor(source: Connection, relation: Relation, wishes: Wishes, ask: Ask) -> str | None:
    """Return the column that is to be the cursor; None for a table that needs none."""
    chosen = _known(relation, wishes.cursor, "--cursor")
    if chosen is not None:
        usable = [c.name for c in relation.columns if survey.may_be_cursor(c)]
        if chosen not in usable:
            raise UsageError(
                f"--cursor {chosen}: a cursor is a timestamp, a date or an integer",
                hint="such columns: " + (", ".join(usable) or "none"),
            )
        return chosen
    if relation.can_be_scanned:
        return None if wishes.append else survey.hint(source, relation)
    found = survey.cursors(relation)
    if found.sure:
        return found.names[0]
    if not found.names:
        raise UsageError(
            f"{relation} has no timestamp, date or integer that could tell new rows from old ones",
            hint="give it a column that is set with every change, updated_at, say",
        )
    question = f"{relation}: which column grows with every change of a row?"
    answer = ask(question, found.names, "--cursor COLUMN")
    return _known(relation, answer, "--cursor") or answer


def _conflict_columns(
    relation: Relation, wishes: Wishes, cursor: str | None, changes: bool, ask: Ask
) -> tuple[str, ...]:
    if wishes.append:
        return ()
    for name in wishes.conflict_columns:
        _known(relation, name, "--conflict-columns")
    if wishes.conflict_columns or relation.key or not changes:
        return wishes.conflict_columns or relation.key
    if cursor is None and relation.kind != "m" and not relation.inherited:
        return ()
    names = [column.name for column in relation.columns]
    question = f"{relation}: which columns tell its rows apart?"
    answer = ask(question, names, "--conflict-columns A,B, or --append for a log of versions,")
    return tuple(name.strip() for name in answer.split(","))


def _id_field(
    relation: Relation, wishes: Wishes, cursor: str | None, conflict: tuple[str, ...]
) -> str | None:
    """Return the column that orders rows that share a cursor value, where one is needed."""
    chosen = _known(relation, wishes.id_field, "--id-field")
    if cursor is None and chosen:
        raise UsageError("--id-field orders rows by a cursor", hint="--cursor COLUMN names one")
    alone = any(index.unique and index.columns == (cursor,) for index in relation.indexes)
    if cursor is None or chosen or alone or len(conflict) != 1 or conflict == (cursor,):
        return chosen
    return conflict[0]


def _known(relation: Relation, name: str | None, flag: str) -> str | None:
    names = [column.name for column in relation.columns]
    if name is not None and name not in names:
        raise UsageError(f"{flag}: {relation} has no column {name}", hint=nearest(name, names))
    return name


def _names(relation: Relation, has: Present, wishes: Wishes) -> tuple[str, str]:
    """Return the definition's key and the raw table's name; neither is taken."""
    key = relation.name if relation.name not in has.keys else f"{relation.schema}.{relation.name}"
    name = snake_case(relation.name)
    if name in has.names or not name:
        name = snake_case(f"{relation.schema} {relation.name}")
    key, name = wishes.key or key, wishes.name or name
    for flag, chosen, taken in (("--key", key, has.keys), ("--name", name, has.names)):
        if chosen in taken:
            raise UsageError(f"{chosen} is taken", hint=f"{flag} gives {relation} another one")
    if not re.fullmatch(r"\w+", name):
        raise UsageError(f"--name {name} is no name for a model", hint="letters, digits and _")
    if len(model_of(name).encode()) > project.LONGEST:
        raise UsageError(
            f"{model_of(name)} is longer than the {project.LONGEST} bytes that PostgreSQL keeps",
            hint=f"--name gives {relation} a shorter one",
        )
    if model_of(name).lower() in has.files:
        raise UsageError(
            f"{has.files[model_of(name).lower()]} is there already, and is left alone",
            hint=f"--name gives {relation} another name",
        )
    return key, name


def _nullable_keys(relation: Relation) -> list[str]:
    """Return why unique columns of a table without a key are none."""
    found = [", ".join(index.columns) for index in relation.indexes if index.unique]
    return [
        f"({columns}) may be null, and so tells no rows apart: with NOT NULL it would be a key"
        for columns in found
    ]


def _limits(
    key: str, cursor: str | None, changes: bool, conflict: tuple[str, ...], nulls: str
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
