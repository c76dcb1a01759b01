"""``exporter new``: a definition and a staging model, from the core database's own catalog."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.shared import ANALYTICS, CORE, Call, as_json, examples, out, shared
from exporter.errors import UsageError, nearest
from exporter.terminal import text

if TYPE_CHECKING:
    from exporter.config import Definition
    from exporter.scaffold.declaration import Plan
    from exporter.wire import Connection


_SHOWN = 12  # answers that an error names


@click.command(
    "new",
    epilog=examples(
        "exporter new --list",
        "exporter new Customer",
        "exporter new sales.Order --cursor changed_at --yes",
    ),
)
@click.argument("table", metavar="[TABLE]", required=False)
@click.option("--list", "as_list", is_flag=True, help="Show the tables that have no definition.")
@click.option("--cursor", metavar="COLUMN", help="The column that grows with every change.")
@click.option("--id-field", metavar="COLUMN", help="Tells rows with the same cursor apart.")
@click.option("--conflict-columns", metavar="A,B", help="The columns that tell rows apart.")
@click.option("--append", is_flag=True, help="No column tells rows apart: an append-only log.")
@click.option("--key", metavar="KEY", help="What `exporter load` is given; the table's name.")
@click.option("--name", metavar="NAME", help="The raw table; the table's name in snake_case.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: take what is likely, or fail.")
@as_json
@shared
def command(
    call: Call, table: str | None, as_list: bool, as_json: bool, yes: bool, **wished: Any
) -> None:
    """Write the definition and the staging model of a TABLE of the core database.

    TABLE may be `customer`, `sales.Order`, or as near to it as leaves no doubt. No file is ever
    overwritten.
    """
    from exporter.config import project  # noqa: PLC0415  what --help does not need
    from exporter.wire import connect  # noqa: PLC0415

    if (table is None) != as_list or (as_json and not as_list):
        raise UsageError("exporter new takes a TABLE, or --list", hint="exporter new --list")
    before = ANALYTICS in os.environ
    root = call.root(CORE)
    in_file = not before and ANALYTICS in os.environ
    declared = project.declared(root)
    with connect(CORE) as source:
        source.execute("set default_transaction_read_only = on")
        if table is None:
            _list(call, source, declared, as_json)
        else:
            plan = _write(call, root, source, declared, table, yes, wished)
            out(_next(call, root, plan, in_file))


def _write(
    call: Call,
    root: Path,
    source: Connection,
    declared: list[Definition],
    table: str,
    yes: bool,
    wished: dict[str, Any],
) -> Plan:
    from exporter.config import project  # noqa: PLC0415
    from exporter.monitoring import check  # noqa: PLC0415
    from exporter.scaffold import declaration as new  # noqa: PLC0415
    from exporter.scaffold import survey  # noqa: PLC0415

    columns = wished.pop("conflict_columns") or ""
    wishes = new.Wishes(
        conflict_columns=tuple(filter(None, (one.strip() for one in columns.split(",")))), **wished
    )
    relation = survey.described(source, survey.find(survey.relations(source), table))
    ask = _prompt if not yes and sys.stdin.isatty() and sys.stdout.isatty() else _refuse
    plan = new.decide(source, relation, declared, wishes, ask)
    for file in new.write(root, source, plan):
        out(str(_near(file)))
    for limit in plan.limits:
        call.console.say(limit, "warning", key=plan.key)
    definition = project.choose(project.declared(root), (plan.key,))[0]
    for one in check.of_source(source, None, definition):
        if one.status != "ok":
            told = "\n  → ".join([f"{one.check}: {one.message}", *one.fix])
            call.console.say(told, "warning", key=plan.key)
    return plan


def _next(call: Call, root: Path, plan: Plan, in_file: bool) -> str:
    """Return the command to run next. dbt reads no ``.env``: where we did, dotenv does."""
    name = call.environment
    load = f"exporter load {shlex.quote(plan.key)}" + (
        f" --env {shlex.quote(name)}" if name else ""
    )
    dbt = f"dbt run -s {plan.model}"
    if in_file:
        file = f"-f {shlex.quote(f'.env.{name}')} " if name else ""
        dbt = f"dotenv {file}run -- {dbt}"
    where = f"cd {shlex.quote(str(_near(root)))} && " if root != Path.cwd() else ""
    return f"{where}{load} && {dbt}"


def _prompt(question: str, answers: Sequence[str], flag: str) -> str:
    def chosen(typed: str) -> str:
        for name in typed.split(","):
            if name.strip() not in answers:
                raise click.BadParameter(f"no {name.strip()}; {nearest(name.strip(), answers)}")
        return typed

    for line in text.wrapped(f"{', '.join(answers)} ({flag} says it, too)", text.width() or 80):
        click.echo(line, err=True)
    return str(click.prompt(question, value_proc=chosen, prompt_suffix=" ", err=True))


def _refuse(question: str, answers: Sequence[str], flag: str) -> str:
    more = " …" if len(answers) > _SHOWN else ""
    raise UsageError(f"{question} {', '.join(answers[:_SHOWN])}{more}", hint=f"{flag} says it")


def _near(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _list(call: Call, source: Connection, declared: list[Definition], as_json: bool) -> None:
    from exporter.scaffold import survey  # noqa: PLC0415

    known = {(one.source.schema, one.source.table) for one in declared}
    rows = []
    for plain in survey.undeclared(survey.relations(source), known):
        one = survey.described(source, plain)
        found, size = survey.cursors(one), survey.estimate(source, one)
        if as_json:
            told = {
                "schema": one.schema,
                "table": one.name,
                "rows": size,
                "cursor": found.names[0] if found.sure else None,
                "candidates": list(found.names),
                "conflict_columns": list(one.key),
            }
            out(json.dumps(told))
        cursor = found.names[0] if found.sure else "?" if found.names else "-"
        rows.append(
            (str(one), "-" if size is None else text.number(size), cursor, ", ".join(one.key))
        )
    if not rows:
        call.say("every table has a definition")
    elif not as_json:
        head = ("TABLE", "ROWS", "CURSOR", "PRIMARY KEY")
        for line in text.table(head, rows, right=("ROWS",), width=text.width()):
            out(line)
