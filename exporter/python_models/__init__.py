"""dbt Python models on PostgreSQL: the one part of the product that imports dbt.

dbt runs a Python model where its materialization says so (macros/python_models.sql) and the
adapter can: `install` gives dbt's PostgresAdapter one method more, `run_python_model`, and
changes nothing that it has. The macro `postgres__create_table_as` calls the method at the very
place where dbt would run a SQL model's query: after the pre-hooks, in dbt's transaction, on dbt's
connection. From there on dbt's own materialization does the rest.

    runner    the model's code: compile, call, explain its errors, collect what it prints
    relation  what `dbt.ref` and `dbt.source` give
    values    PostgreSQL's text to Python and back, exactly
    staging   rows of Python to a temporary table
    frames    pandas, polars, arrow and ibis, each only if a model uses it
    workers   row functions on a Dask cluster, if a model asks for it
"""

from __future__ import annotations

import sys
from typing import Any

SUPPORTED = ((1, 10), (1, 12))
"""dbt-core from the first version up to, and without, the second one."""


def install() -> None:
    """Teach dbt's PostgresAdapter to run Python models.

    Does nothing where the profile is not Postgres, and under a dbt that it was not tried with:
    the macros then refuse a Python model, and everything else of dbt works as ever.
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
