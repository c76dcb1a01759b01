"""``exporter db``: the destination's schema in migrations."""

from __future__ import annotations

import click

from exporter.commands.shared import ANALYTICS, CORE, KEY, Call, Group, examples, shared


@click.group("db", cls=Group)
def command() -> None:
    """The destination's schema in migrations, by dbmate, on db/migrations/."""


@command.command(
    epilog=examples(
        "exporter db new create_customer --from Customer",
        "exporter db new add_an_index",
    ),
)
@click.argument("name", metavar="NAME")
@click.option(
    "--from", "key", metavar="KEY", type=KEY, help="Make the raw table of this definition."
)
@shared
def new(call: Call, name: str, key: str | None) -> None:
    """Write a migration: an empty one, or that of a raw table."""
    if key is None:
        _dbmate(call, "new", name)
        return
    from exporter.raw import migrations

    definition = call.definitions((key,), CORE, ANALYTICS)[0]
    click.echo(migrations.new(call.root(), name, definition))


@command.command(epilog=examples("exporter db migrate", "exporter db migrate --env production"))
@shared
def migrate(call: Call) -> None:
    """Apply the migrations that are pending."""
    _dbmate(call, "migrate")


@command.command(epilog=examples("exporter db rollback"))
@shared
def rollback(call: Call) -> None:
    """Take back the last migration."""
    _dbmate(call, "rollback")


@command.command(epilog=examples("exporter db status"))
@shared
def status(call: Call) -> None:
    """List the migrations, applied and pending."""
    _dbmate(call, "status")


def _dbmate(call: Call, *words: str) -> None:
    from exporter.raw import migrations

    migrations.run(call.root(ANALYTICS), *words)
