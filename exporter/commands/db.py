"""``exporter db``: migrations of the destination's schema."""

from __future__ import annotations

import click

from exporter.commands import shared as cli


@click.group("db", cls=cli.Group)
def command() -> None:
    """Migrations of the destination's schema, in db/migrations/, run by dbmate."""


@command.command(
    epilog=cli.examples(
        "exporter db new create_customer --from Customer",
        "exporter db new add_an_index",
    ),
)
@click.argument("name", metavar="NAME")
@click.option(
    "--from", "key", metavar="KEY", type=cli.KEY, help="Create the raw table of this definition."
)
@cli.shared
def new(call: cli.Call, name: str, key: str | None) -> None:
    """Write a migration: an empty one, or one that creates a raw table."""
    if key is None:
        _dbmate(call, "new", name)
        return
    from exporter.raw import migrations

    definition = call.definition(key)
    click.echo(migrations.new(call.root(), name, definition))


@command.command(epilog=cli.examples("exporter db migrate", "exporter db migrate --env production"))
@cli.shared
def migrate(call: cli.Call) -> None:
    """Apply the migrations that are pending."""
    _dbmate(call, "migrate")


@command.command(epilog=cli.examples("exporter db rollback"))
@cli.shared
def rollback(call: cli.Call) -> None:
    """Roll back the last migration."""
    _dbmate(call, "rollback")


@command.command(epilog=cli.examples("exporter db status"))
@cli.shared
def status(call: cli.Call) -> None:
    """List the migrations, applied and pending."""
    _dbmate(call, "status")


def _dbmate(call: cli.Call, *words: str) -> None:
    from exporter.raw import migrations

    migrations.run(call.root(cli.ANALYTICS), *words)
