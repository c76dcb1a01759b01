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

SUPPORTED = ((1, 10), (1, 12))
"""The versions of dbt-core: from the first one up to the second one, which is excluded."""


def install() -> None:
    """Teach dbt's PostgresAdapter to run Python models.

    Does nothing where the profile is not Postgres, or where the version of dbt is not supported:
    the macros then refuse a Python model, and the rest of dbt works as usual.
    """
    module = sys.modules.get("dbt.adapters.postgres.impl")
    if module is None or not _supported():
        return
    adapter = module.PostgresAdapter
    if "run_python_model" not in adapter._available_:
        adapter.run_python_model = _run_python_model
        adapter._available_ |= {"run_python_model"}


def _supported() -> bool:
    from dbt.version import __version__

    first, end = SUPPORTED
    return first <= tuple(int(part) for part in __version__.split(".")[:2]) < end


def _run_python_model(adapter: Any, model: dict[str, Any], code: str) -> str:
    from exporter.python_models import runner  # only a run of a Python model pays for it

    return runner.run(adapter, model, code)
