"""``exporter load``: the main job."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from exporter.commands import shared as cli
from exporter.errors import ExporterError, SettingError, StoppedError, UsageError, exit_status

if TYPE_CHECKING:
    from exporter.config import Definition
    from exporter.load.dry_run import Rehearsal
    from exporter.load.transfer import After
    from exporter.source import Wanted
    from exporter.state import Result
    from exporter.terminal import Console


@click.command(
    "load",
    epilog=cli.examples(
        "exporter load",
        "exporter load StatEvent Customer",
        "exporter load 'crm_*' tag:nightly",
        "exporter load --full-refresh StatEvent",
        "exporter load StatEvent --since 2026-01-01 --until 2026-02-01",
        "exporter load -j 4 -q --metrics-file /var/lib/node_exporter/load.prom",
        "exporter load StatEvent --dry-run",
    ),
)
@click.argument("keys", nargs=-1, metavar="[KEY]...", type=cli.KEY)
@click.option(
    "--full-refresh", is_flag=True, help="Read everything, and remove what is gone at the source."
)
@click.option("--since", metavar="VALUE", help="Land again rows whose cursor is VALUE or later …")
@click.option("--until", metavar="VALUE", help="… and earlier than VALUE. The position stays.")
@click.option(
    "--sweep",
    is_flag=True,
    help="Look for what the cursor has passed over in the whole table now.",
)
@click.option(
    "--reconcile",
    is_flag=True,
    help="After it, apply exporter.deletes to the rows that are gone at the source.",
)
@cli.max_deletes
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1),
    metavar="N",
    help="Load N at once: definitions, the largest first, and ranges of a large first load.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    metavar="N",
    help="Open at most N sessions on each database; from 3 on, one looks for who waits.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Load on a Dask cluster: its scheduler's address, such as tcp://host:8786.",
)
@click.option(
    "--metrics-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the last load of each definition to FILE, in OpenMetrics' text.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be read and written, with the SQL; do nothing else.",
)
@cli.as_json
@cli.shared
def command(
    call: cli.Call,
    keys: tuple[str, ...],
    full_refresh: bool,
    since: str | None,
    until: str | None,
    sweep: bool,
    reconcile: bool,
    max_deletes: float | None,
    jobs: int | None,
    max_connections: int | None,
    scheduler: str | None,
    metrics_file: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Land what is new at the source. Without a KEY, all definitions."""
    from exporter.load.one import load
    from exporter.monitoring.notify import Run
    from exporter.source import NEW, Span, Wanted

    flags = "--reconcile or --full-refresh"
    limit = cli.most_deletes(max_deletes, flags, on=reconcile or full_refresh)
    span = Span(since, until) if since is not None or until is not None else None
    wanted = Wanted(full_refresh, span, limit, sweep) if full_refresh or span or sweep else NEW
    if full_refresh and (span or sweep):
        raise UsageError("--full-refresh reads everything: leave out --since, --until and --sweep")
    if span and sweep:
        raise UsageError("--sweep looks at the whole table: leave out --since and --until")
    if span and not keys:
        raise UsageError(
            "--since and --until need a KEY",
            hint="exporter load KEY --since VALUE --until VALUE",
        )
    if scheduler and max_connections == 1:
        raise UsageError(
            "--scheduler needs two sessions on each database, one of them for the lock"
        )
    if dry_run:
        if reconcile:
            raise UsageError("--dry-run shows what is loaded: leave out --reconcile")
        chosen = _chosen(call, keys, wanted)
        slotted = _slotted(call, chosen, keys, wanted, reconcile=False)
        sys.exit(_dry_run(call, chosen, slotted, wanted, as_json))
    with cli.interruptible(), Run(call.console, call.environment, metrics_file) as run:
        chosen = _chosen(call, keys, wanted)
        slotted = _slotted(call, chosen, keys, wanted, reconcile=reconcile)
        if metrics_file:
            from exporter.monitoring.slots import sources_of

            run.sources = sources_of(call.definitions((), source=False))
        chosen = [one for one in chosen if one.source.read != "changes"]
        after = _reconciliation(chosen, keys, limit) if reconcile else None
        load_one = functools.partial(
            load,
            wanted=wanted,
            after=after,
            command="load --reconcile" if reconcile else "load",
        )
        run.started()
        results_of = functools.partial(
            _results,
            console=call.console,
            jobs=jobs,
            max_connections=max_connections,
            scheduler=scheduler,
        )
        followed = (
            _followed(slotted, call.console, load, results_of, limit) if slotted.groups else ()
        )
        others = results_of(chosen, load_one)
        for results in (followed, others):
            if any(isinstance(one.error, StoppedError) for one in run.results):
                break
            for result in results:
                call.console.ended(result, as_json=as_json)
                run.results.append(result)
    sys.exit(exit_status([result.error.exit_status for result in run.results if result.error]))


def _chosen(call: cli.Call, keys: tuple[str, ...], wanted: Wanted) -> list[Definition]:
    chosen = call.definitions(keys)
    for definition in chosen:
        if wanted.span and definition.destination.mode == "append":
            raise UsageError(
                f"{definition.where}: {definition.key} is append-only: a backfill would land its"
                " rows twice",
                hint="give it conflict_columns, or run with --full-refresh",
            )
        if wanted.sweep and keys:
            again = f"exporter load {definition.key} --full-refresh reads everything again"
            cli.refuse_function(definition, "--sweep", again)
    return with_batch_size(chosen)


def with_batch_size(chosen: list[Definition]) -> list[Definition]:
    """Return the definitions, with BATCH_SIZE in place of their own. Raises SettingError."""
    rows = _batch_size()
    return [definition._replace(batch_rows=rows) for definition in chosen] if rows else chosen


class _Slotted(NamedTuple):
    """The definitions that share a slot, of each source; and which are to be copied anew."""

    groups: list[list[Definition]]
    refresh: frozenset[str]


def _slotted(
    call: cli.Call,
    chosen: list[Definition],
    keys: tuple[str, ...],
    wanted: Wanted,
    *,
    reconcile: bool,
) -> _Slotted:
    """Return what is read by its changes: with one of it, all that is in its slot.

    Raises UsageError for what such a load cannot do.
    """
    named = [one for one in chosen if one.source.read == "changes"]
    if not named:
        return _Slotted([], frozenset())
    variables = dict.fromkeys(one.source.variable for one in named)
    flags = {"--since and --until": wanted.span, "--sweep": wanted.sweep, "--reconcile": reconcile}
    for flag in [flag for flag, given in flags.items() if given and keys]:
        raise UsageError(
            f"{named[0].where}: {flag} has nothing to do for {named[0].key}, which is read by its"
            " changes",
            hint=f"exporter load {named[0].key}",
        )
    declared = with_batch_size(call.definitions((), source=False))
    everything = [it for it in declared if it.source.read == "changes"]
    groups = [[it for it in everything if it.source.variable == name] for name in variables]
    refresh = frozenset(one.key for one in named) if wanted.full_refresh else frozenset()
    keys_named = {one.key for one in named}
    others = [it.key for group in groups for it in group if it.key not in keys_named]
    if others:
        call.console.say(f"{', '.join(others)}: in the same slot, loaded as well", "debug")
    return _Slotted(groups, refresh)


def _followed(
    slotted: _Slotted,
    console: Console,
    load: Callable[..., Result],
    results_of: Callable[..., Iterator[Result]],
    limit: float,
) -> Iterator[Result]:
    from exporter.load import MOST_DELETES
    from exporter.load.slot import follow
    from exporter.source import Wanted

    def copy(definitions: list[Definition], refresh: bool) -> Iterator[Result]:
        # One that nobody has asked for is bounded, too: the source may be empty by accident.
        wanted = Wanted(refresh, max_deletes=limit if refresh else MOST_DELETES)
        return results_of(definitions, functools.partial(load, wanted=wanted))

    for group in slotted.groups:
        results = follow(group, console, copy, refresh=slotted.refresh)
        yield from results
        if any(isinstance(one.error, StoppedError) for one in results):
            return


def _dry_run(
    call: cli.Call, chosen: list[Definition], slotted: _Slotted, wanted: Wanted, as_json: bool
) -> int:
    from exporter.load.dry_run import rehearse

    statuses = []

    def show(rehearsed: Callable[[], list[Rehearsal]]) -> None:
        try:
            found = rehearsed()
        except ExporterError as error:
            call.console.error(error)
            statuses.append(error.exit_status)
            return
        for one in found:
            cli.out(*([json.dumps(one.as_dict())] if as_json else one.lines()))

    def of_slot(group: list[Definition]) -> list[Rehearsal]:
        from exporter.load import slot_dry_run

        slot, found = slot_dry_run.rehearse(group, call.console, slotted.refresh)
        cli.out(*([] if as_json else slot.lines()))
        return found

    def of_one(definition: Definition) -> list[Rehearsal]:
        return [rehearse(definition, call.console, wanted)]

    for group in slotted.groups:
        show(functools.partial(of_slot, group))
    for definition in chosen:
        if definition.source.read != "changes":
            show(functools.partial(of_one, definition))
    return exit_status(statuses)


def _reconciliation(chosen: list[Definition], keys: tuple[str, ...], limit: float) -> After:
    from exporter.load.deletes import reconcile

    ignoring = [it for it in chosen if it.destination.deletes == "ignore"]
    # Of those that a pattern or a tag has brought, the others are reconciled.
    refused = ignoring if ignoring == chosen else [it for it in ignoring if it.key in keys]
    if refused:
        raise UsageError(
            f"{refused[0].where}: --reconcile has nothing to do for {refused[0].key}:"
            " exporter.deletes is ignore",
            hint="set it to mark or remove",
        )
    return reconcile(limit)


def _results(
    chosen: list[Definition],
    load: Callable[..., Result],
    console: Console,
    jobs: int | None,
    max_connections: int | None,
    scheduler: str | None,
) -> Iterator[Result]:
    if scheduler or ((jobs or 1) > 1 and max_connections != 1):
        from exporter.load.several import side_by_side

        yield from side_by_side(chosen, load, console, jobs, max_connections, scheduler)
        return
    from exporter.wire import Sessions

    with Sessions(alone=max_connections == 1) as sessions:
        for definition in chosen:
            yield (result := load(definition, console, sessions))
            if isinstance(result.error, StoppedError):
                break


def _batch_size() -> int | None:
    text = os.environ.get("BATCH_SIZE")
    if not text:
        return None
    if not text.isdigit() or int(text) < 1:
        raise SettingError(f"BATCH_SIZE={text} is not a whole number above 0")
    return int(text)
