"""Every table of a core database at once: which are declared, how, and which are left, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import psycopg

from exporter.config import Definition
from exporter.config.definition import parse
from exporter.errors import DatabaseError, ExporterError, UsageError, nearest
from exporter.monitoring import check
from exporter.raw.table import refuse_own_names
from exporter.scaffold import declaration, survey
from exporter.scaffold.plan import Ask, Plan, Present, Wishes, decide
from exporter.scaffold.survey import Relation
from exporter.source import describe, reader_of
from exporter.state import SCHEMA, State
from exporter.wire import Connection, first_line

_STATE = (SCHEMA, "_exporter_state")
_PATIENCE = "2s"  # for the lock of a table that somebody is changing
_NO_TABLES = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}


class Outcome(NamedTuple):
    """What became of a table. Without a ``plan`` it was left, and the first of ``notes`` is why."""

    relation: Relation
    plan: Plan | None
    reads: str  # how a load will read it
    notes: tuple[str, ...] = ()
    is_table: bool = True  # not a view or the like, which has neither key nor rows of its own


def chosen(
    everything: Sequence[Relation],
    declared: Sequence[Definition],
    schemas: Sequence[str],
    exclude: Sequence[str],
) -> list[Relation]:
    """Return the tables and views that are asked for. Raises UsageError for a name of none.

    Where core and analytics are one database, raw tables do not count; and what dbt builds there
    looks like any other table, so that a person has to name the schemas.
    """
    if not schemas and any((it.schema, it.name) == _STATE for it in everything):
        raise UsageError(
            "raw tables lie in the core database, too: which of its tables are dbt's, nobody knows",
            hint="exporter new --all --schema public, or whatever the application's schemas are",
        )
    known = sorted({relation.schema for relation in everything})
    for schema in schemas:
        if schema not in known:
            raise UsageError(f"core has no table in a schema {schema}", hint=nearest(schema, known))
    for pattern in exclude:
        if not any(_matches(relation, pattern) for relation in everything):
            names = [f"{relation.schema}.{relation.name}" for relation in everything]
            raise UsageError(f"--exclude {pattern} fits no table", hint=nearest(pattern, names))
    landed = {SCHEMA, *(definition.destination.schema for definition in declared)}
    found = [
        relation
        for relation in everything
        if relation.schema not in landed
        and (not schemas or relation.schema in schemas)
        and not any(_matches(relation, pattern) for pattern in exclude)
    ]
    if not found:
        raise UsageError("there is no table to declare", hint="its URL may name another database")
    return found


def _matches(relation: Relation, pattern: str) -> bool:
    names = (relation.name, f"{relation.schema}.{relation.name}")
    return any(fnmatchcase(name, pattern) for name in names)


def write(
    root: Path, source: Connection, relations: Sequence[Relation], has: Present, ask: Ask
) -> Iterator[Outcome]:
    """Declare one table after the other, as far as a load of it would work; yield what became."""
    source.execute(f"set lock_timeout = '{_PATIENCE}'")
    # Of names that are alike in snake_case, the one that is written so has the first choice.
    by_name = sorted(relations, key=lambda it: it.name.lower() != it.name)
    for relation in sorted(by_name, key=lambda it: (it.schema != "public", it.schema)):
        yield _declared(root, source, relation, has, ask)


def _declared(
    root: Path, source: Connection, relation: Relation, has: Present, ask: Ask
) -> Outcome:
    try:
        outcome = _prepared(source, relation, has, ask)
        if outcome.plan:
            declaration.write(root, source, outcome.plan)
            has.add(outcome.plan)
        return outcome
    except ExporterError as error:
        reason = f"{error.message}\n  → {error.hint}" if error.hint else error.message
    except psycopg.Error as error:
        if source.closed:
            raise DatabaseError(f"{source.variable}: {first_line(error)}") from None
        reason = first_line(error)
    source.rollback()  # what the reader had begun
    return Outcome(relation, None, "", (reason.removeprefix(f"{relation}: "),))


def _prepared(source: Connection, found: Relation, has: Present, ask: Ask) -> Outcome:
    """Decide about a table; nothing is written. Raises ExporterError where it cannot be landed."""
    if found.kind in _NO_TABLES:
        hint = "exporter new TABLE asks for the cursor and the key that no catalog tells"
        reason = f"{_NO_TABLES[found.kind]}\n  → {hint}"
        return Outcome(found, None, "", (reason,), is_table=False)
    relation = survey.described(source, found)
    if not relation.columns:
        raise UsageError("it has no column")
    plan = decide(source, relation, has, Wishes(), ask)
    definition = parse(
        plan.definition, where=str(relation), source=SCHEMA, table=plan.name, schema=SCHEMA
    )
    notes = list(plan.limits)
    for finding in check.of_source(source, None, definition):
        text = "\n  → ".join([finding.message, *finding.fix])
        if finding.status == "fail":
            return Outcome(relation, None, "", (text,))
        if finding.status == "warn":
            notes.append(text)
    with reader_of(definition, source).opened(State(), None) as table:  # as a load begins
        refuse_own_names(definition.destination, table)
    reads = describe(definition, table)
    return Outcome(
        relation, plan, reads if plan.conflict_columns else f"a log, {reads}", tuple(notes)
    )
