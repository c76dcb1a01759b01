"""The destination from the dbt profile, where ``DATABASE_URL_ANALYTICS`` is not set."""

from __future__ import annotations

import os
from pathlib import Path

from psycopg.conninfo import make_conninfo

from exporter.config import project
from exporter.errors import SettingError

_NAMES = {
    "host": "host",
    "port": "port",
    "user": "user",
    "password": "password",
    "pass": "password",
    "dbname": "dbname",
    "database": "dbname",
    "sslmode": "sslmode",
    "sslrootcert": "sslrootcert",
    "sslcert": "sslcert",
    "sslkey": "sslkey",
}


def conninfo(root: Path) -> str | None:
    """Return the connection string of the profile's target, None without a profiles.yml.

    Looks where dbt does. Raises SettingError for a profile that leads nowhere, DefinitionError
    for an environment variable that it asks for and that is not set.
    """
    folders = [Path(os.environ.get("DBT_PROFILES_DIR") or root), root, Path.home() / ".dbt"]
    file = next((f / "profiles.yml" for f in folders if (f / "profiles.yml").is_file()), None)
    if file is None:
        return None
    name = os.environ.get("DBT_PROFILE") or project.read(root / "dbt_project.yml").get("profile")
    profile = project.read(file).get(str(name))
    if not isinstance(profile, dict):
        raise SettingError(f"{file} has no profile {name}", hint="DATABASE_URL_ANALYTICS would do")
    target = os.environ.get("DBT_TARGET") or project.render(
        profile.get("target", "default"), {}, str(file)
    )
    output = (profile.get("outputs") or {}).get(target)
    if not isinstance(output, dict) or output.get("type") != "postgres":
        raise SettingError(f"{file}: {name} has no postgres output {target}")
    chosen = {_NAMES[key]: value for key, value in output.items() if key in _NAMES}
    values = {key: project.render(value, {}, str(file)) for key, value in chosen.items()}
    return make_conninfo("", **{key: value for key, value in values.items() if value != ""})
