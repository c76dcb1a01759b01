"""``exporter verify``: source against raw."""

from __future__ import annotations

import sys

import click

from exporter.commands import shared as cli
from exporter.errors import StoppedError, UsageError, exit_status


@click.command(
    "verify", epilog=cli.examples("exporter verify", "exporter verify StatEvent --repair")
)
@click.argument("keys", nargs=-1, metavar="[KEY]...", type=cli.KEY)
@click.option(
    "--repair",
    is_flag=True,
    help="Load, then land what differs, and apply exporter.deletes to what is gone at the source.",
)
@cli.max_deletes
@cli.as_json
@cli.shared
def command(
    call: cli.Call, keys: tuple[str, ...], repair: bool, max_deletes: float | None, as_json: bool
) -> None:
    """Compare raw with the source, by checksums, down to the rows. Without a KEY, all definitions.

    Ends with status 1 where rows are missing in raw, extra or different. Rows in flight do not
    count: they changed since the last load, and the next one lands them.
    """
    from exporter.verify.verify import advice, verify

    most = cli.most_deletes(max_deletes, "--repair", on=repair)
    chosen = call.definitions(keys)
    for definition in chosen:
        if repair and definition.destination.mode != "upsert":
            why = "is append-only: its rows have no key to repair them by"
            if definition.destination.is_history:
                why = "is a history: its versions are what they were, and not repaired"
            raise UsageError(
                f"{definition.where}: {definition.key} {why}",
                hint=f"exporter load {definition.key} --full-refresh",
            )
        if repair and definition.source.read == "changes":
            raise UsageError(
                f"{definition.where}: {definition.key} is read by its changes, which go by what raw"
                " had before them: it is copied as a whole, or not",
                hint=f"exporter load {definition.key} --full-refresh",
            )
    statuses = []
    for definition in [it for it in chosen if it.source.rows]:
        again = f"exporter load {definition.key} --full-refresh reads everything again"
        if keys:
            cli.refuse_function(definition, "exporter verify", again)
        call.console.say(f"{definition.key}: left out, since a function yields its rows")
        chosen.remove(definition)
    with cli.interruptible():
        for definition in chosen:
            verdict = verify(definition, call.console, repair=repair, most=most)
            call.console.ended(verdict, as_json=as_json)
            if verdict.error:
                statuses.append(verdict.error.exit_status)
            elif verdict.status == "different":
                text = advice(definition, verdict)
                call.console.say(text, "error", key=definition.key, event="different")
                statuses.append(1)
            if isinstance(verdict.error, StoppedError):
                break
    sys.exit(exit_status(statuses))
