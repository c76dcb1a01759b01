"""The command line: parse, call, print, and map errors to exit statuses."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import click

from exporter.errors import ExporterError, SettingError


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


@main.command()
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option(
    "--project-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    help="A folder in the dbt project.",
)
@click.option("--env", "environment", metavar="NAME", help="Read .env.NAME instead of .env.")
@click.option(
    "--full-refresh", is_flag=True, help="Read everything, and remove what is gone at the source."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a definition.")
def load(
    keys: tuple[str, ...],
    project_dir: Path,
    environment: str | None,
    full_refresh: bool,
    as_json: bool,
) -> None:
    """Land what is new at the source. Without a KEY, all definitions."""
    from exporter import connection, project  # noqa: PLC0415
    from exporter.load import Result  # noqa: PLC0415
    from exporter.load import load as run  # noqa: PLC0415

    root = project.find(project_dir)
    connection.load_environment(root, environment)
    chosen = project.choose(project.definitions(root), keys)
    connection.use_profile(root)
    for variable in ("DATABASE_URL_CORE", "DATABASE_URL_ANALYTICS"):
        connection.url(variable)
    rows = _batch_size()

    def finished(result: Result) -> None:
        if as_json:
            click.echo(_json(result))
        if result.error:
            click.echo(f"exporter: {result.error}", err=True)
        else:
            click.echo(_summary(result), err=as_json)

    statuses = []
    for definition in chosen:
        one = replace(definition, batch_rows=rows) if rows else definition
        result = run(
            one, lambda line: click.echo(f"exporter: {line}", err=True), full_refresh=full_refresh
        )
        finished(result)
        statuses.append(result.error.exit_status if result.error else 0)
    failed = [status for status in statuses if status]
    if failed:
        sys.exit(failed[0] if len(set(failed)) == 1 and failed[0] == 3 else 1)


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


def _json(result: object) -> str:
    from exporter.load import Result  # noqa: PLC0415

    assert isinstance(result, Result)
    totals, cursor = result.totals, result.cursor
    return json.dumps(
        {
            "key": result.key,
            "status": result.status,
            "rows_read": totals.rows_read,
            "rows_written": totals.rows_written,
            "rows_unchanged": totals.rows_unchanged,
            "batches": totals.batches,
            "bytes": totals.bytes,
            "cursor": {"value": cursor.value, "id": cursor.id} if cursor else None,
            "seconds": round(result.seconds, 3),
            "error": str(result.error) if result.error else None,
        }
    )


def _summary(result: object) -> str:
    from exporter.load import Result  # noqa: PLC0415

    assert isinstance(result, Result)
    totals, cursor = result.totals, result.cursor
    place = "nothing yet"
    if cursor:
        place = cursor.value + (f", {cursor.id}" if cursor.id else "")
    return (
        f"{result.key}: {totals.rows_read:,} rows read, {totals.rows_written:,} written,"
        f" {totals.rows_unchanged:,} unchanged in {result.seconds:.1f} s; cursor {place}"
    )
