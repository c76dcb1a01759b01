"""Where the databases are: ``.env`` files, environment variables, else the dbt profile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from exporter.config import project
from exporter.config.definition import Definition
from exporter.errors import DefinitionError, SettingError

# The profile's name of a setting → libpq's.
_NAMES = {
    **{name: name for name in ("host", "port", "user", "password", "dbname")},
    **{name: name for name in ("sslmode", "sslrootcert", "sslcert", "sslkey")},
    "pass": "password",
    "database": "dbname",
}


def load_environment(root: Path, name: str | None) -> None:
    """Read ``.env.NAME``, else ``.env``; a variable that is set already keeps its value.

    Raises SettingError.
    """
    file = root / (f".env.{name}" if name else ".env")
    if not file.is_file():
        if name:
            raise SettingError(f"{file} does not exist", hint="leave --env out, or create the file")
        return
    from dotenv import load_dotenv  # noqa: PLC0415  only where there is a file

    load_dotenv(file)


def require(root: Path, *variables: str) -> None:
    """Check that the variables hold URLs; the destination's may come from the dbt profile.

    Raises SettingError.
    """
    if "DATABASE_URL_ANALYTICS" in variables and not os.environ.get("DATABASE_URL_ANALYTICS"):
        with contextlib.suppress(DefinitionError):  # a profile that itself reads the variable
            found = _profile_url(root)
            if found:
                os.environ["DATABASE_URL_ANALYTICS"] = found
    for variable in variables:
        url(variable)


def require_sources(definitions: Iterable[Definition]) -> None:
    """Check that the variables of the definitions' databases hold URLs. Raises SettingError."""
    checked: set[str] = set()
    for definition in definitions:
        variable = definition.source.variable
        try:
            if variable and variable not in checked:
                url(variable)
        except SettingError as error:
            if definition.source.database == "CORE":
                raise
            message = f"{error.message}: {definition.where} reads from it"
            raise SettingError(message, hint=error.hint) from None
        checked.add(variable)


def url(variable: str) -> str:
    """Return the URL in an environment variable, checked. Raises SettingError."""
    value = os.environ.get(variable)
    if not value:
        raise SettingError(
            f"{variable} is not set",
            hint=f"export {variable}=postgresql://user:password@host:5432/database",
        )
    hint = "postgresql://user:password@host:5432/database, with @ : / % percent-encoded"
    try:
        parts = conninfo_to_dict(value)
    except psycopg.ProgrammingError:  # its message quotes the URL, password included
        raise SettingError(f"{variable} is not a PostgreSQL URL", hint=hint) from None
    # A host may be a socket's folder that begins with @, where it is a parameter of its own.
    names = ("port", "dbname") if "host=" in value.partition("?")[2] else ("host", "port", "dbname")
    if "://" in value and any("@" in str(parts.get(name) or "") for name in names):
        # libpq would take the end of the password for a host, and tell of it in its message.
        raise SettingError(f"{variable}: an @ of its password is not percent-encoded", hint=hint)
    return value


def profiles_folder(root: Path) -> Path:
    """Return the folder in which dbt looks for ``profiles.yml`` first."""
    return Path(os.environ.get("DBT_PROFILES_DIR") or root)


def profiles_file(root: Path) -> Path | None:
    """Return the ``profiles.yml`` that dbt finds; None where there is none."""
    folders = [profiles_folder(root), root, Path.home() / ".dbt"]
    return next((f / "profiles.yml" for f in folders if (f / "profiles.yml").is_file()), None)


def profile_name(config: dict[str, Any]) -> str | None:
    """Return the name of the profile; ``config`` is ``dbt_project.yml``."""
    name = os.environ.get("DBT_PROFILE") or config.get("profile")
    return str(name) if name else None


def postgres_output(file: Path, name: str) -> dict[str, Any]:
    """Return the profile's output for the target. Raises SettingError where there is none."""
    profile = project.read(file).get(name)
    if not isinstance(profile, dict):
        raise SettingError(f"{file} has no profile {name}", hint="DATABASE_URL_ANALYTICS would do")
    target = os.environ.get("DBT_TARGET") or project.render(
        profile.get("target", "default"), {}, str(file)
    )
    output = (profile.get("outputs") or {}).get(target)
    if not isinstance(output, dict) or output.get("type") != "postgres":
        raise SettingError(f"{file}: {name} has no postgres output {target}")
    return output


def _profile_url(root: Path) -> str | None:
    """Return the connection string of the profile's target, None without a profiles.yml.

    Looks where dbt does. Raises SettingError where the profile or its target is missing,
    DefinitionError for an environment variable that it names and that is not set.
    """
    file = profiles_file(root)
    if file is None:
        return None
    output = postgres_output(file, str(profile_name(project.read(root / "dbt_project.yml"))))
    chosen = {_NAMES[key]: value for key, value in output.items() if key in _NAMES}
    values = {key: project.render(value, {}, str(file)) for key, value in chosen.items()}
    return make_conninfo("", **{key: value for key, value in values.items() if value != ""})
