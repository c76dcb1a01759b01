"""The source tables in dbt docs: nodes and edges that dbt itself has no way to declare.

In dbt a source has no parents (dbt-core issue 6143), and dbt cannot describe a table of another
database. So the files that ``dbt docs generate`` wrote are completed: each table that a definition
reads becomes a source of its own, with its columns, and the parent of its raw table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from exporter.config import Definition, source_variables
from exporter.errors import ProjectError
from exporter.source import catalog, versions
from exporter.wire import Connection, connect

# In our nodes' ids, before a database that is not the core: a source of the project may be called
# core, too.
_MARK = re.compile(r"\._core[.-]")
_COMMENTS = """
select coalesce(a.attname, ''), d.description
from pg_description d left join pg_attribute a on a.attrelid = d.objoid and a.attnum = d.objsubid
    and a.attnum > 0
where d.classoid = 'pg_class'::regclass and d.objoid = %s
"""


class Origin(NamedTuple):
    """A table of the source, as dbt docs will show it."""

    definition: Definition
    database: str
    is_view: bool
    types: dict[str, str]
    comments: dict[str, str]  # of the columns by name; the table's own under ""

    @property
    def source_name(self) -> str:
        """What dbt docs call the database's tables: the name in ``source.database``."""
        source = self.definition.source
        return "python" if source.rows else source.database.lower()


def complete(folder: Path, definitions: list[Definition]) -> list[str]:
    """Add the definitions' source tables to the files of ``dbt docs generate`` in a folder.

    Returns the edges, a line each. Raises ProjectError where a file is missing, SourceError where a
    table is.
    """
    files = [folder / "manifest.json", folder / "catalog.json"]
    for file in files:
        if not file.is_file():
            raise ProjectError(f"{file} is not there", hint="dbt docs generate")
    manifest, tables = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for content in (manifest, tables):  # what an earlier call added
        content["sources"] = {i: s for i, s in content["sources"].items() if not _MARK.search(i)}
    origins = []
    for variable in source_variables(definitions):
        with connect(variable) as source:
            its = [it for it in definitions if it.source.variable == variable]
            origins += [read(source, definition) for definition in its]
    origins += [
        Origin(definition, "", False, definition.source.rows.types, {})
        for definition in definitions
        if definition.source.rows
    ]
    edges = [add(manifest, tables, origin) for origin in origins]
    for file, content in zip(files, (manifest, tables), strict=True):
        file.write_text(json.dumps(content), encoding="utf-8")
    return [edge for edge in edges if edge]


def read(source: Connection, definition: Definition) -> Origin:
    """Return what the source's catalog says of a table. Raises SourceError."""
    table = catalog.find_table(source, definition.source)
    comments = source.execute(_COMMENTS, (table.oid,)).fetchall()
    types = {column.name: column.type for column in table.columns}
    return Origin(definition, source.info.dbname, table.kind in "vm", types, dict(comments))


def add(manifest: dict[str, Any], tables: dict[str, Any], origin: Origin) -> str | None:
    """Add a table and its edge to dbt's manifest and catalog; None where dbt has no raw table."""
    definition = origin.definition
    place = (definition.destination.schema, definition.destination.table)
    for raw in manifest["sources"].values():
        if (raw["schema"], raw["identifier"]) == place:
            break
    else:
        return None  # the raw table is disabled in dbt
    if definition.destination.is_history:
        _describe_own(raw)
    name = definition.source.table
    if definition.source.schema not in ("public", ""):
        name = f"{definition.source.schema}.{name}"
    node = _node(raw, name, origin)
    child, parent = raw["unique_id"], node["unique_id"]
    manifest["sources"][parent] = node
    manifest["parent_map"].setdefault(parent, [])
    manifest["parent_map"][child] = [parent]
    children = manifest["child_map"].setdefault(parent, [])
    if child not in children:
        children.append(child)
    tables["sources"][parent] = _entry(node, origin)
    return f"{origin.source_name}.{name} ▸ {raw['source_name']}.{raw['name']}"


def _describe_own(raw: dict[str, Any]) -> None:
    """Describe the columns that a history has beside the source's, unless its YAML does."""
    for name, text in versions.ABOUT.items():
        column = raw["columns"].setdefault(name, {"name": name, "meta": {}, "tags": []})
        column["description"] = column.get("description") or text


def _node(raw: dict[str, Any], name: str, origin: Origin) -> dict[str, Any]:
    """Return a source like dbt's own; a column's description is that of raw, else its comment."""
    definition = origin.definition
    described = {column: entry["description"] for column, entry in raw["columns"].items()}
    order = ", ".join(f"`{column}`" for column in definition.source.order)
    how = f"in the order of {order}" if order else "by the transactions of its rows"
    if definition.source.rows:
        how = f"from the last `{order}` on" if order else "as a whole"
    if definition.source.read == "changes":
        how = "by its changes"
    reading = (
        f"`exporter load {definition.key}` reads it {how}, and lands it in"
        f" `{definition.destination}`."
    )
    mark = "core" if origin.source_name == "core" else f"core-{origin.source_name}"
    columns: dict[str, Any] = {
        column: {
            "name": column,
            "description": described.get(column) or origin.comments.get(column) or "",
            "data_type": kind,
            "meta": {},
            "tags": [],
        }
        for column, kind in origin.types.items()
    }
    return raw | {
        "database": origin.database,
        "schema": definition.source.schema,
        "name": name,
        "identifier": definition.source.table,
        "source_name": origin.source_name,
        "source_description": "Python functions whose rows `exporter` lands."
        if definition.source.rows
        else f"The {origin.source_name} database's tables that `exporter` reads.",
        "loader": "the application",
        "fqn": [raw["package_name"], origin.source_name, name],
        "unique_id": f"source.{raw['package_name']}._{mark}.{name}",
        "relation_name": f'"{definition.source.schema}"."{definition.source.table}"',
        "description": "\n\n".join(
            filter(None, [origin.comments.get(""), raw["description"], reading])
        ),
        "columns": columns,
        "loaded_at_field": None,
        "freshness": None,
    }


def _entry(node: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """Return a table of dbt's catalog."""
    return {
        "unique_id": node["unique_id"],
        "metadata": {
            "type": "VIEW" if origin.is_view else "BASE TABLE",
            "database": node["database"],
            "schema": node["schema"],
            "name": node["identifier"],
            "comment": origin.comments.get(""),
            "owner": None,
        },
        "columns": {
            name: {
                "type": kind,
                "index": index,
                "name": name,
                "comment": origin.comments.get(name),
            }
            for index, (name, kind) in enumerate(origin.types.items(), 1)
        },
        "stats": {},
    }
