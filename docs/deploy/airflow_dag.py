"""Airflow: land what is new, then build and test the models; as commands, or from Python.

The project has a virtual environment of its own, with dbt-exporter in it: Airflow and dbt want
different versions of the same libraries.
"""

import os

from airflow.decorators import dag, task
from pendulum import datetime

ROOT = os.environ.get("PROJECT_DIR", "/srv/analytics")
PROGRAMS = f"{ROOT}/.venv/bin"
NIGHTLY = {
    "schedule": "15 4 * * *",
    "start_date": datetime(2026, 1, 1),
    "catchup": False,
    "max_active_runs": 1,
    "default_args": {"retries": 1},
}


@task.bash(cwd=ROOT)
def build():
    """Build the models and test them."""
    return f"{PROGRAMS}/dbt build"


@dag("analytics", **NIGHTLY)
def as_commands():
    """The two commands."""

    @task.bash(cwd=ROOT)
    def land():
        return f"{PROGRAMS}/exporter load"

    land() >> build()


@dag("analytics_python", **NIGHTLY)
def from_python():
    """The Python function, in the project's environment; its counts are the task's result."""

    @task.external_python(python=f"{PROGRAMS}/python", expect_airflow=False)
    def land(root):
        from exporter.api import load

        results = load(project_dir=root)
        errors = [str(result.error) for result in results if result.error]
        if errors:
            raise RuntimeError("\n".join(errors))
        return {result.key: result.totals.as_dict() for result in results}

    land(ROOT) >> build()


as_commands()
from_python()
