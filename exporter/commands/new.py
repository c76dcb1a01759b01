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

from exporter.commands import shared as cli
from exporter.errors import UsageError, nearest
from exporter.terminal import text

if TYPE_CHECKING:
    from exporter.config import Definition
    from exporter.scaffold.every import Outcome
    from exporter.scaffold.plan import Plan, Present
    from exporter.wire import Connection


_SHOWN = 12  # answers that an error names


@click.command(
    "new",
    epilog=cli.examples(
        "exporter new --list",
        "exporter new Customer",
        "exporter new sales.Order --cursor changed_at --yes",
        "exporter new --all --schema public --exclude 'tmp_*'",
        "exporter new --database BILLING Invoice",
    ),
)
@click.argument("table", metavar="[TABLE]", required=False)
@click.option("--list", "as_list", is_flag=True, help="Show the tables that have no definition.")
@click.option("--all", "every", is_flag=True, help="Declare every table that has no definition.")
@click.option(
    "--schema", "schemas", metavar="SCHEMA", multiple=True, help="With --all: of this schema alone."
)
@click.option(
    "--exclude",
    metavar="PATTERN",
    multiple=True,
    help="With --all: not such tables, 'sales.tmp_*'.",
)
@click.option("--cursor", metavar="COLUMN", help="The column that grows with every change.")
@click.option(
    "--id-field", metavar="COLUMN", help="The column that orders rows with the same cursor."
)
@click.option("--conflict-columns", metavar="A,B", help="The columns that tell rows apart.")
@click.option("--append", is_flag=True, help="Land an append-only log: no column tells rows apart.")
@click.option(
    "--key", metavar="KEY", help="What `exporter load` is given; default: the table's name."
)
@click.option(
    "--name", metavar="NAME", help="The raw table; default: the table's name in snake_case."
)
@click.option(
    "--database",
    metavar="NAME",
    default="CORE",
    help="The database of DATABASE_URL_NAME; default: CORE.",
)
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: take the likely answer, or fail.")
@cli.as_json
@cli.shared
def command(
    call: cli.Call,
    table: str | None,
    as_list: bool,
    every: bool,
    database: str,
    **given: Any,
) -> None:
    """Write the definition and the staging model of a TABLE of the core database, or of
    another one.

    TABLE may be `customer` or `sales.Order`; case, plural and schema may differ where only one
    table fits. No file is ever overwritten. With --all, every table with a key gets a definition
    as a mirror, every other one as a log; the exit status is 1 where a table had to be left out
    that --exclude does not name.
    """
    from exporter.config import project
    from exporter.scaffold import plan as scaffold
    from exporter.wire import connect

    as_json, yes = given.pop("as_json"), given.pop("yes")
    _refuse_contradictions(table, as_list, every, given, as_json)
    schemas, exclude = given.pop("schemas"), given.pop("exclude")
    before = cli.ANALYTICS in os.environ
    variable = f"DATABASE_URL_{database}"
    root = call.root(variable)
    in_file = not before and cli.ANALYTICS in os.environ
    declared = project.declared(root)
    with connect(variable) as source:
        source.execute("set default_transaction_read_only = on")
        if as_list:
            its = [it for it in declared if it.source.database == database]
            _list(call, source, its, as_json)
        elif table is None:
            has = scaffold.present(root, declared, database)
            _every(call, root, source, declared, has, schemas, exclude, in_file)
        else:
            has = scaffold.present(root, declared, database)
            plan = _decide(source, has, table, given, yes)
            _write(call, root, source, plan)
            cli.out(_next_command(call, root, in_file, plan))


def _refuse_contradictions(
    table: str | None, as_list: bool, every: bool, given: dict[str, Any], as_json: bool
) -> None:
    if (table is not None) + as_list + every != 1 or (as_json and not as_list):
        raise UsageError("exporter new takes a TABLE, --list or --all", hint="exporter new --list")
    of_all = ("schemas", "exclude")
    for name, value in given.items():
        if value and (name in of_all) != every:
            flag = "--" + name.replace("_", "-").replace("schemas", "schema")
            raise UsageError(f"{flag} {'is for' if name in of_all else 'is not for'} --all")


def _decide(
    source: Connection,
    has: Present,
    table: str,
    wished: dict[str, Any],
    yes: bool,
) -> Plan:
    from exporter.scaffold import plan, survey

    columns = (wished.pop("conflict_columns") or "").split(",")
    conflict = tuple(filter(None, map(str.strip, columns)))
    wishes = plan.Wishes(conflict_columns=conflict, **wished)
    relation = survey.described(source, survey.find(survey.relations(source), table))
    ask = _prompt if not yes and sys.stdin.isatty() and sys.stdout.isatty() else _refuse
    return plan.decide(source, relation, has, wishes, ask)


def _write(call: cli.Call, root: Path, source: Connection, plan: Plan) -> None:
    """Write the plan's files, and report its limits and what `exporter check` finds."""
    from exporter.config import choice, project
    from exporter.monitoring import check
    from exporter.scaffold import declaration

    for file in declaration.write(root, source, plan):
        cli.out(str(project.shown(file)))
    for limit in plan.limits:
        call.console.say(limit, "warning", key=plan.key)
    definition = choice.one(project.declared(root), plan.key)
    for finding in check.of_source(source, None, definition):
        if finding.status != "ok":
            text = "\n  → ".join([f"{finding.check}: {finding.message}", *finding.fix])
            call.console.say(text, "warning", key=plan.key)


def _next_command(call: cli.Call, root: Path, in_file: bool, plan: Plan | None = None) -> str:
    """Return the command to run next, for one table or for all.

    dbt reads no ``.env``: where the destination's URL comes from that file, dotenv reads it.
    """
    from exporter.config import project

    name = call.environment
    load = f"exporter load {shlex.quote(plan.key)}" if plan else "exporter load"
    load += f" --env {shlex.quote(name)}" if name else ""
    dbt = f"dbt run -s {plan.model}" if plan else "dbt build"
    if in_file:
        file = f"-f {shlex.quote(f'.env.{name}')} " if name else ""
        dbt = f"dotenv {file}run -- {dbt}"
    where = f"cd {shlex.quote(str(project.shown(root)))} && " if root != Path.cwd() else ""
    return f"{where}{load} && {dbt}"


def _prompt(question: str, answers: Sequence[str], flag: str) -> str:
    def chosen(typed: str) -> str:
        for name in typed.split(","):
            if name.strip() not in answers:
                raise click.BadParameter(f"no {name.strip()}; {nearest(name.strip(), answers)}")
        return typed

    for line in text.wrapped(f"{', '.join(answers)} ({flag} gives it, too)", text.width()):
        click.echo(line, err=True)
    return str(click.prompt(question, value_proc=chosen, prompt_suffix=" ", err=True))


def _refuse(question: str, answers: Sequence[str], flag: str) -> str:
    more = " …" if len(answers) > _SHOWN else ""
    raise UsageError(f"{question} {', '.join(answers[:_SHOWN])}{more}", hint=f"{flag} gives it")


def _list(call: cli.Call, source: Connection, declared: list[Definition], as_json: bool) -> None:
    from exporter.scaffold import survey

    known = {(definition.source.schema, definition.source.table) for definition in declared}
    rows = []
    for found in survey.relations(source):
        if (found.schema, found.name) in known:
            continue
        relation = survey.described(source, found)
        cursors = survey.cursors(relation)
        cursor = cursors.names[0] if cursors.sure else None
        if relation.can_be_scanned:
            cursor = survey.hint(source, relation)
        size = survey.estimate(source, relation)
        if as_json:
            record = {
                "schema": relation.schema,
                "table": relation.name,
                "rows": size,
                "cursor": cursor,
                "candidates": list(cursors.names),
                "conflict_columns": list(relation.key),
            }
            cli.out(json.dumps(record))
        cursor = cursor or ("-" if relation.can_be_scanned else "?")
        count = "-" if size is None else text.number(size)
        rows.append((str(relation), count, cursor, ", ".join(relation.key)))
    if not rows:
        call.console.say("every table has a definition")
    elif not as_json:
        head = ("TABLE", "ROWS", "CURSOR", "PRIMARY KEY")
        cli.out(*text.table(head, rows, right=("ROWS",), width=text.width()))


def _every(
    call: cli.Call,
    root: Path,
    source: Connection,
    declared: list[Definition],
    has: Present,
    schemas: tuple[str, ...],
    exclude: tuple[str, ...],
    in_file: bool,
) -> None:
    """Declare every table; report what was written, and what was left. Exits."""
    from exporter.scaffold import every, survey

    wanted = every.chosen(survey.relations(source), declared, schemas, exclude)
    new = [one for one in wanted if (one.schema, one.name) not in has.tables]
    if len(new) < len(wanted):
        call.console.say(f"declared already, and left as they are: {len(wanted) - len(new)}")
    outcomes = list(every.write(root, source, new, has, _refuse))
    written = [one.plan for one in outcomes if one.plan]
    rows = [(str(one.relation), one.plan.model, one.reads) for one in outcomes if one.plan]
    if rows:
        cli.out(*text.table(("TABLE", "MODEL", "READ"), rows, width=text.width()))
    failed = _tell(call, outcomes)
    if written:
        cli.out(_next_command(call, root, in_file))
    elif not failed:
        call.console.say("every table has a definition")
    sys.exit(1 if failed else 0)


def _tell(call: cli.Call, outcomes: list[Outcome]) -> bool:
    """Report what to look at, the tables of one note in one line; return whether one was left."""
    told: dict[tuple[str, str], list[str]] = {}
    for one in outcomes:
        level, what = "warning", "" if one.plan else "left out: "
        if not one.plan and one.is_table:
            level = "error"
        for note in one.notes:
            told.setdefault((level, what + note), []).append(str(one.relation))
    for (level, note), tables in told.items():
        call.console.say(f"{', '.join(tables)}: {note}", level)
    return any(level == "error" for level, _ in told)
