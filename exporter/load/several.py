"""Several loads at once: in threads of this process, or on a Dask cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import psycopg

from exporter.config import Definition, source_variables
from exporter.errors import DatabaseError
from exporter.load import way
from exporter.load.threads import Team
from exporter.source.lookup import blocks_of
from exporter.state import Result
from exporter.terminal import Console
from exporter.wire import connect


def side_by_side(
    definitions: list[Definition],
    load: Callable[..., Result],
    console: Console,
    jobs: int | None,
    max_connections: int | None,
    scheduler: str | None,
) -> Iterator[Result]:
    """Load so many definitions at once, the largest first; yield results as they come.

    ``load`` has yet to get a definition, a console, sessions and a crew. ``max_connections`` bounds
    the sessions on each database, ``scheduler`` is the address of a Dask cluster that is to do it.
    """
    blocks = {definition.key: 0 for definition in definitions}
    if len(definitions) > 1 or scheduler:  # each load tells by itself what is wrong with the source
        for variable in source_variables(definitions):
            tables = {it.key: it.source for it in definitions if it.source.variable == variable}
            with contextlib.suppress(DatabaseError, psycopg.Error), connect(variable) as source:
                blocks.update(blocks_of(source, tables))
    chosen = sorted(definitions, key=lambda one: blocks[one.key], reverse=True)
    if scheduler:
        from exporter.load.cluster import Cluster, shared_keys  # noqa: PLC0415  imports Dask

        shared = shared_keys(chosen, blocks)
        yield from Cluster(scheduler, console, jobs, max_connections).load_all(chosen, load, shared)
        return
    jobs, most = jobs or 1, way.at_work(max_connections)
    alone = most is not None and most == max_connections
    yield from Team(min(jobs, most or jobs), alone=alone).run(
        chosen, lambda definition, sessions, crew: load(definition, console, sessions, crew=crew)
    )
