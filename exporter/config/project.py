"""Finds the dbt project and reads the definitions that its sources declare."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from exporter.config.choice import tags_of
from exporter.config.definition import Definition, parse
from exporter.errors import DefinitionError, ProjectError

LONGEST = 63  # bytes of an identifier
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def find(start: Path) -> Path:
    """Return the folder of the nearest ``dbt_project.yml`` upward. Raises ProjectError."""
    start = start.resolve()
    for folder in (start, *start.parents):
        if (folder / "dbt_project.yml").is_file():
            return folder
    raise ProjectError(
        f"no dbt_project.yml in {start} or above it",
        hint="run inside a dbt project, or name it with --project-dir",
    )


def definitions(root: Path) -> list[Definition]:
    """Return every definition of the project, in the order of its files.

    Raises ProjectError where there is none, DefinitionError.
    """
    found = declared(root)
    if not found:
        raise ProjectError(
            f"no table of {root} is declared for the exporter",
            hint="exporter new --list shows what there is, exporter new TABLE declares one",
        )
    return found


def declared(root: Path) -> list[Definition]:
    """Return every definition of the project; there may be none. Raises DefinitionError."""
    config = read(root / "dbt_project.yml")
    variables = config.get("vars") or {}
    found: dict[str, Definition] = {}
    for folder in model_paths(root, config):
        for file in sorted(folder.rglob("*.y*ml")):
            if "exporter" not in file.read_text(encoding="utf-8"):
                continue
            for definition in _definitions_of(root, file, variables):
                key, where = definition.key, definition.where
                if key in found:
                    raise DefinitionError(f"{where}: key {key} stands in {found[key].where} too")
                found[key] = definition
    _refuse_shared_tables(found.values())
    return list(found.values())


def _refuse_shared_tables(definitions: Iterable[Definition]) -> None:
    """Raise DefinitionError where two definitions have one raw table, or PostgreSQL cuts a name."""
    tables: dict[str, str] = {}
    for definition in definitions:
        where, target = definition.where, definition.destination
        for name in (target.schema, target.table):
            if len(name.encode()) > LONGEST:
                raise DefinitionError(
                    f"{where}: {name} is longer than the {LONGEST} bytes that PostgreSQL keeps"
                )
        if str(target) in tables:
            raise DefinitionError(f"{where}: {target} is the raw table of {tables[str(target)]}")
        tables[str(target)] = where


def model_paths(root: Path, config: dict[str, Any]) -> list[Path]:
    """Return the folders of the project's models, the first of which gets new ones."""
    return [root / folder for folder in config.get("model-paths") or ["models"]]


def read(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises DefinitionError."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "is not YAML"
        raise DefinitionError(f"{shown(file)}{line}: {problem}") from None
    return content if isinstance(content, dict) else {}


def _definitions_of(root: Path, file: Path, variables: dict[str, Any]) -> Iterator[Definition]:
    for source in read(file).get("sources") or []:
        for table in source.get("tables") or []:
            config = table.get("config") or {}
            meta = (config.get("meta") or {}).get("exporter")
            if meta is None:
                continue
            where = f"{file.relative_to(root)}:{_line(file, table['name'])}"
            yield parse(
                render(meta, variables, where),
                where=where,
                source=source["name"],
                table=render(table.get("identifier") or table["name"], variables, where),
                schema=render(source.get("schema") or "analytics_raw", variables, where),
                freshness=[
                    render(level.get("freshness", {}), variables, where)
                    for level in (source, source.get("config") or {}, table, config)
                ],
                tags=render(tags_of(source, table), variables, where),
                database=render(_of_all(source, where), variables, where),
                types=render(_types(table), variables, where),
                folder=str(root.resolve()),
            )


def _types(table: Any) -> dict[str, str]:
    """Return the columns for which dbt's YAML has a `data_type`."""
    columns = table.get("columns") or []
    return {one["name"]: str(one["data_type"]) for one in columns if one.get("data_type")}


def _of_all(source: dict[str, Any], where: str) -> Any:
    """Return the database that a dbt source names for all its tables, if it does."""
    meta = ((source.get("config") or {}).get("meta") or {}).get("exporter")
    if meta is not None and (not isinstance(meta, dict) or set(meta) - {"database"}):
        raise DefinitionError(
            f"{where}: config.meta.exporter of the source {source['name']} has database alone;"
            " what else is said is said of each table"
        )
    return meta["database"] if meta else None


def _line(file: Path, name: str) -> int:
    pattern = re.compile(rf"\s*- *name: *['\"]?{re.escape(name)}['\"]?\s*(#.*)?$")
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((number for number, line in enumerate(lines, 1) if pattern.match(line)), 1)


def render(value: Any, variables: dict[str, Any], where: str) -> Any:
    """Return a YAML value with its Jinja rendered: ``env_var``, ``var``, and a profile's filters.

    Raises DefinitionError.
    """
    if isinstance(value, dict):
        return {key: render(item, variables, where) for key, item in value.items()}
    if isinstance(value, list):
        return [render(item, variables, where) for item in value]
    if not isinstance(value, str) or "{{" not in value:
        return value
    import jinja2  # noqa: PLC0415  only where a value needs it
    from jinja2.sandbox import SandboxedEnvironment  # noqa: PLC0415

    def env_var(name: str, default: str | None = None) -> str:
        found = os.environ.get(name, default)
        if found is None:
            raise DefinitionError(f"{where}: the environment variable {name} is not set")
        return found

    def var(name: str, default: Any = None) -> Any:
        found = variables.get(name, default)
        if found is None:
            raise DefinitionError(f"{where}: dbt_project.yml has no var {name}")
        return found

    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined)
    for name in ("as_number", "as_text", "as_bool", "as_native"):
        environment.filters[name] = lambda rendered: rendered
    try:
        rendered = environment.from_string(value).render(
            env_var=env_var, var=var, modules={"re": re}
        )
    except jinja2.TemplateError as error:
        raise DefinitionError(f"{where}: {error}") from None
    return int(rendered) if rendered.isdigit() else rendered


def shown(path: Path) -> Path:
    """Return a path as a message shows it: relative where it lies below the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
