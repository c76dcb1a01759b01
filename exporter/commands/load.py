"""``exporter load``: the main job."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from exporter.cli import ANALYTICS, CORE, Call, as_json, max_deletes, shared
from exporter.errors import SettingError, StoppedError, UsageError
from exporter.signals import sigterm_interrupts

if TYPE_CHECKING:
    from exporter.definition import Definition
    from exporter.load import Load


@click.command("load")
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option(
    "--full-refresh", is_flag=True, help="Read everything, and remove what is gone at the source."
)
@click.option("--since", metavar="VALUE", help="Land again rows whose cursor is VALUE or later …")
@click.option("--until", metavar="VALUE", help="… and earlier than VALUE. The position stays.")
@click.option(
    "--reconcile",
    is_flag=True,
    help="Then apply exporter.deletes to the rows that are gone at the source.",
)
@max_deletes
@as_json
@shared
def command(
    call: Call,
    keys: tuple[str, ...],
    full_refresh: bool,
    since: str | None,
    until: str | None,
    reconcile: bool,
    max_deletes: float,
    as_json: bool,
) -> None:
    """Land what is new at the source. Without a KEY, all definitions."""
    from exporter.load import load  # noqa: PLC0415  what --help does not need
    from exporter.window import Span  # noqa: PLC0415

    span = Span(since, until) if since is not None or until is not None else None
    if span and full_refresh:
        raise UsageError("--full-refresh reads everything: leave out --since and --until")
    if span and not keys:
        raise UsageError(
            "--since and --until need a KEY", hint="exporter load KEY --since VALUE --until VALUE"
        )
    chosen = call.definitions(keys, CORE, ANALYTICS)
    for definition in chosen:
        if span and definition.mode == "append":
            raise UsageError(
                f"{definition.where}: {definition.key} is append-only: a backfill would land its"
                " rows twice",
                hint="give it conflict_columns, or run with --full-refresh",
            )
    after = _reconciling(chosen, keys, max_deletes) if reconcile else None
    rows = _batch_size()
    statuses = []
    with sigterm_interrupts():
        for definition in chosen:
            result = load(
                replace(definition, batch_rows=rows) if rows else definition,
                call.console,
                full_refresh=full_refresh,
                span=span,
                after=after,
                command="load --reconcile" if reconcile else "load",
            )
            call.console.ended(result, as_json=as_json)
            if isinstance(result.error, StoppedError):
                sys.exit(result.error.exit_status)
            if result.error:
                statuses.append(result.error.exit_status)
    if statuses:
        sys.exit(statuses[0] if len(set(statuses)) == 1 else 1)


def _reconciling(
    chosen: list[Definition], keys: tuple[str, ...], most: float
) -> Callable[[Load], None]:
    from exporter.deletes import reconcile  # noqa: PLC0415  only where it is asked for

    ignoring = [one for one in chosen if one.deletes == "ignore"]
    if ignoring and (keys or ignoring == chosen):
        raise UsageError(
            f"{ignoring[0].where}: --reconcile has nothing to do for {ignoring[0].key}:"
            " exporter.deletes is ignore",
            hint="set it to mark or remove",
        )
    return reconcile(most)


def _batch_size() -> int | None:
    text = os.environ.get("BATCH_SIZE")
    if not text:
        return None
    if not text.isdigit() or int(text) < 1:
        raise SettingError(f"BATCH_SIZE={text} is not a whole number above 0")
    return int(text)
