"""The environment: ``.env`` files, and the variables that name the databases."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
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
    hint = "postgresql://user:password@host:5432/database, with @ : / % percent-encoded"
    try:
        parts = conninfo_to_dict(value)
    except psycopg.ProgrammingError:  # its message quotes the URL, password included
        raise SettingError(f"{variable} is not a PostgreSQL URL", hint=hint) from None
    if "://" in value and _has_stray_at(parts, "host=" in value.partition("?")[2]):
        raise SettingError(
            f"{variable}: it cannot be told where its password ends: @ stands in it as it is",
            hint=hint,
        )
    return value


def _has_stray_at(parts: Mapping[str, object], host_is_asked: bool) -> bool:
    """Whether an @ of the password has made its tail a host, a port or a database.

    libpq would try them, and tell of them in its messages. ``host_is_asked``: the host is a
    parameter of its own, and may be a socket that begins with @.
    """
    names = ("port", "dbname") if host_is_asked else ("host", "port", "dbname")
    return any("@" in str(parts.get(name) or "") for name in names)
