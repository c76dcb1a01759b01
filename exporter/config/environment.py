"""The environment: ``.env`` files, and the variables that name the databases."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

from exporter.errors import DefinitionError, SettingError


def load_environment(root: Path, name: str | None) -> None:
    """Read ``.env.NAME``, else ``.env``; what the environment holds already wins."""
    file = root / (f".env.{name}" if name else ".env")
    if not file.is_file():
        if name:
            raise SettingError(f"{file} does not exist", hint="leave --env out, or create the file")
        return
    from dotenv import load_dotenv  # noqa: PLC0415  only where there is a file

    load_dotenv(file)


def require(root: Path, *variables: str) -> None:
    """Check that the variables name databases; the destination may be the dbt profile's.

    Raises SettingError.
    """
    if "DATABASE_URL_ANALYTICS" in variables and not os.environ.get("DATABASE_URL_ANALYTICS"):
        from exporter.config import profile  # noqa: PLC0415  only where the variable is not set

        with contextlib.suppress(DefinitionError):  # a profile that itself asks for the variable
            found = profile.conninfo(root)
            if found:
                os.environ["DATABASE_URL_ANALYTICS"] = found
    for variable in variables:
        url(variable)


def url(variable: str) -> str:
    """Return the URL in an environment variable, checked. Raises SettingError."""
    value = os.environ.get(variable)
    if not value:
        raise SettingError(
            f"{variable} is not set",
            hint=f"export {variable}=postgresql://user:password@host:5432/database",
        )
    try:
        conninfo_to_dict(value)
    except psycopg.ProgrammingError:  # its message quotes the URL, password included
        raise SettingError(
            f"{variable} is not a PostgreSQL URL",
            hint="postgresql://user:password@host:5432/database, with @ : / % percent-encoded",
        ) from None
    return value
