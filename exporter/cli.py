"""The command line: parse, call, print, and map errors to exit statuses."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.errors import ExporterError, SettingError, UsageError

if TYPE_CHECKING:
    from exporter.definition import Definition


class _Group(click.Group):
    """Prints every ExporterError as its message, with its exit status."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ExporterError as error:
            click.echo(f"exporter: {error}", err=True)
            ctx.exit(error.exit_status)


@click.group(cls=_Group)
@click.version_option(package_name="dbt-exporter")
def main() -> None:
    """PostgreSQL to PostgreSQL, incrementally, for teams that standardize on dbt."""


_project_dir = click.option(
    "--project-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    help="A folder in the dbt project.",
)
_environment = click.option(
    "--env", "environment", metavar="NAME", help="Read .env.NAME instead of .env."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object a definition.")


def _chosen(
    project_dir: Path, environment: str | None, keys: tuple[str, ...], *variables: str
) -> list[Definition]:
    """Return the definitions that the call names, after a look at the databases' URLs."""
    from exporter import connection, project  # noqa: PLC0415

    root = project.find(project_dir)
    connection.load_environment(root, environment)
    chosen = project.choose(project.definitions(root), keys)
    connection.use_profile(root)
    for variable in variables:
        connection.url(variable)
    return chosen


@main.command()
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@_project_dir
@_environment
@click.option(
    "--full-refresh", is_flag=True, help="Read everything, and remove what is gone at the source."
)
@click.option("--since", metavar="VALUE", help="Land again rows whose cursor is VALUE or later …")
@click.option("--until", metavar="VALUE", help="… and earlier than VALUE. The position stays.")
@_json
def load(
    keys: tuple[str, ...],
    project_dir: Path,
    environment: str | None,
    full_refresh: bool,
    since: str | None,
    until: str | None,
    as_json: bool,
) -> None:
    """Land what is new at the source. Without a KEY, all definitions."""
    from exporter.load import load as run  # noqa: PLC0415
    from exporter.window import Span  # noqa: PLC0415

    span = Span(since, until) if since is not None or until is not None else None
    if span and full_refresh:
        raise UsageError("--full-refresh reads everything: leave out --since and --until")
    if span and not keys:
        raise UsageError(
            "--since and --until need a KEY", hint="exporter load KEY --since VALUE --until VALUE"
        )
    chosen = _chosen(project_dir, environment, keys, "DATABASE_URL_CORE", "DATABASE_URL_ANALYTICS")
    for definition in chosen:
        if span and definition.mode == "append":
            raise UsageError(
                f"{definition.where}: {definition.key} is append-only: a backfill would land its"
                " rows twice",
                hint="give it conflict_columns, or run with --full-refresh",
            )
    rows = _batch_size()
    statuses = []
    for definition in chosen:
        result = run(
            replace(definition, batch_rows=rows) if rows else definition,
            lambda line: click.echo(f"exporter: {line}", err=True),
            full_refresh=full_refresh,
            span=span,
        )
        if as_json:
            click.echo(result.as_json())
        if result.error:
            click.echo(f"exporter: {result.error}", err=True)
            statuses.append(result.error.exit_status)
        else:
            click.echo(str(result), err=as_json)
    if statuses:
        sys.exit(statuses[0] if len(set(statuses)) == 1 else 1)


@main.group()
def state() -> None:
    """Show, forget or set the stored position of a definition."""


@state.command()
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@_project_dir
@_environment
@_json
def show(keys: tuple[str, ...], project_dir: Path, environment: str | None, as_json: bool) -> None:
    """Print the stored positions. Without a KEY, of all definitions."""
    from exporter import positions  # noqa: PLC0415

    chosen = _chosen(project_dir, environment, keys, "DATABASE_URL_ANALYTICS")
    for one in positions.show(chosen):
        click.echo(json.dumps(one) if as_json else positions.line(one))


@state.command()
@click.argument("key", metavar="KEY")
@_project_dir
@_environment
@_json
def reset(key: str, project_dir: Path, environment: str | None, as_json: bool) -> None:
    """Forget the position: the next load reads everything, and rewrites only what differs."""
    from exporter import positions  # noqa: PLC0415

    chosen = _chosen(project_dir, environment, (key,), "DATABASE_URL_ANALYTICS")
    one = positions.reset(chosen[0])
    click.echo(json.dumps(one) if as_json else positions.line(one))


@state.command("set")
@click.argument("key", metavar="KEY")
@click.argument("value", metavar="VALUE")
@click.argument("id", metavar="[ID]", required=False)
@_project_dir
@_environment
@_json
def set_position(
    key: str,
    value: str,
    id: str | None,
    project_dir: Path,
    environment: str | None,
    as_json: bool,
) -> None:
    """Go on behind VALUE (and ID), as if that row of the source were the last one landed."""
    from exporter import positions  # noqa: PLC0415

    chosen = _chosen(
        project_dir, environment, (key,), "DATABASE_URL_CORE", "DATABASE_URL_ANALYTICS"
    )
    one = positions.set_to(chosen[0], value, id)
    click.echo(json.dumps(one) if as_json else positions.line(one))


@main.group()
def db() -> None:
    """The destination's schema in migrations, by dbmate, on db/migrations/."""


def _migrate(project_dir: Path, environment: str | None, *words: str) -> None:
    from exporter import connection, migrations, project  # noqa: PLC0415

    root = project.find(project_dir)
    connection.load_environment(root, environment)
    connection.use_profile(root)
    migrations.run(root, *words)


@db.command("new")
@click.argument("name", metavar="NAME")
@click.option("--from", "key", metavar="KEY", help="Make the raw table of this definition.")
@_project_dir
@_environment
def new_migration(name: str, key: str | None, project_dir: Path, environment: str | None) -> None:
    """Write a migration: an empty one, or that of a raw table."""
    if key is None:
        _migrate(project_dir, environment, "new", name)
        return
    from exporter import migrations, project  # noqa: PLC0415

    chosen = _chosen(
        project_dir, environment, (key,), "DATABASE_URL_CORE", "DATABASE_URL_ANALYTICS"
    )
    click.echo(migrations.new(project.find(project_dir), name, chosen[0]))


@db.command()
@_project_dir
@_environment
def migrate(project_dir: Path, environment: str | None) -> None:
    """Apply the migrations that are pending."""
    _migrate(project_dir, environment, "migrate")


@db.command()
@_project_dir
@_environment
def rollback(project_dir: Path, environment: str | None) -> None:
    """Take back the last migration."""
    _migrate(project_dir, environment, "rollback")


@db.command()
@_project_dir
@_environment
def status(project_dir: Path, environment: str | None) -> None:
    """List the migrations, applied and pending."""
    _migrate(project_dir, environment, "status")


@main.command()
@click.option("--rows", type=click.IntRange(min=100), default=100_000, show_default=True)
@click.option("--keep", is_flag=True, help="Leave the server up until Ctrl-C, and print its URLs.")
def demo(rows: int, keep: bool) -> None:
    """Run the main job on an embedded PostgreSQL server."""
    import exporter.demo as demonstration  # noqa: PLC0415

    demonstration.run(rows, keep)


def _batch_size() -> int | None:
    text = os.environ.get("BATCH_SIZE")
    if not text:
        return None
    if not text.isdigit() or int(text) < 1:
        raise SettingError(f"BATCH_SIZE={text} is not a whole number above 0")
    return int(text)
