"""What is declared: the dbt project's YAML, its profile, and the environment.

Files and variables come in; a ``Definition`` for each table and the databases' URLs go out.
"""

from exporter.config.definition import (
    OWN,
    Cursor,
    Definition,
    Destination,
    Function,
    SourceTable,
    source_variables,
)

__all__ = [
    "OWN",
    "Cursor",
    "Definition",
    "Destination",
    "Function",
    "SourceTable",
    "source_variables",
]
