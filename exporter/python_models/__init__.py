"""dbt Python models on PostgreSQL: the only room that imports dbt.

A model's compiled code comes in; a query that gives the model's rows goes out.

dbt runs a Python model where the materialization allows it (macros/python_models.sql) and the
adapter can: `install` adds one method to dbt's PostgresAdapter, `run_python_model`, and changes
none of its own. The macro `postgres__create_table_as` calls the method where dbt would run a SQL
model's query: after the pre-hooks, in dbt's transaction, on dbt's connection. dbt's own
materialization does the rest.

    runner    the model's code: compile, call, explain its errors, collect what it prints
    relation  what `dbt.ref` and `dbt.source` return
    results   what a model returns, as a query
    values    PostgreSQL's text to Python and back, exactly
    natives   numpy's scalars and arrays as Python's values
    staging   rows of Python to a temporary table
    frames    pandas, polars, arrow and ibis, each only if a model uses it
    workers   row functions on a Dask cluster, if a model asks for it
"""

from __future__ import annotations

import sys
from typing import Any

TRIED = ((1, 10), (1, 12))
"""The first and the last version of dbt-core that the tests ran with."""


def install() -> None:
    """Teach dbt's PostgresAdapter to run Python models.

    Does nothing where the profile is not Postgres, or where dbt is older than the first version
    that was tried: the macros then refuse a Python model, and the rest of dbt works as usual. A
    version newer than the last one runs, after a warning.
    """
    module = sys.modules.get("dbt.adapters.postgres.impl")
    if module is None or _version() < TRIED[0]:
        return
    adapter = module.PostgresAdapter
    if "run_python_model" not in adapter._available_:
        adapter.run_python_model = _run_python_model
        adapter._available_ |= {"run_python_model"}


def _version() -> tuple[int, ...]:
    from dbt.version import __version__

    return tuple(int(part) for part in __version__.split(".")[:2])


_warned = False


def _run_python_model(adapter: Any, model: dict[str, Any], code: str) -> str:
    from exporter.python_models import runner  # only a run of a Python model pays for it

    global _warned  # noqa: PLW0603  once a process
    if _version() > TRIED[1] and not _warned:
        _warned = True
        runner.warn(
            f"dbt-exporter's Python models were tried with dbt-core up to {_named(TRIED[1])},"
            f" this is {_named(_version())}"
        )
    return runner.run(adapter, model, code)


def _named(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
