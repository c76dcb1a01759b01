"""The destination's schema in migrations: dbmate does the work, on `db/migrations/`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote, urlencode

from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from exporter.config import Definition
from exporter.config.environment import url
from exporter.errors import ExporterError, UsageError
from exporter.raw.table import creation
from exporter.source import find_table, keyed
from exporter.source.versions import own_columns
from exporter.state import SCHEMA
from exporter.wire import connect

FOLDER = "db/migrations"
TABLE = f"{SCHEMA}.schema_migrations"


def run(root: Path, *words: str) -> None:
    """Run one of dbmate's commands on the project's migrations and the destination.

    Its output is the caller's. Raises UsageError where dbmate is not installed, ExporterError
    where it fails; why, it has printed.
    """
    command = [
        _dbmate(),
        *("--env", "DATABASE_URL_ANALYTICS", "--env-file", os.devnull),  # `.env` was read already
        *("--migrations-dir", str(root / FOLDER), "--migrations-table", TABLE),
        "--no-dump-schema",
        *words,
    ]
    # libpq's default, which dbmate's driver does not share: it would insist on TLS
    environment = {"PGSSLMODE": "prefer", **os.environ}
    environment["DATABASE_URL_ANALYTICS"] = _url()
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        raise ExporterError(f"dbmate {words[0]} ended with exit status {status}")


def new(root: Path, name: str, definition: Definition) -> Path:
    """Write the migration that makes the raw table of a definition; return the file."""
    if definition.source.rows:
        raise UsageError(
            f"{definition.where}: only a load finds out the columns of {definition.source.rows}",
            hint=f"exporter load {definition.key} makes the table",
        )
    if not re.fullmatch(r"\w+", name):
        raise UsageError(f"{name} is not a name for a migration", hint="letters, digits and _")
    with (
        connect(definition.source.variable) as source,
        connect("DATABASE_URL_ANALYTICS") as destination,
    ):
        table = find_table(source, definition.source, destination)
        target = keyed(definition, table).destination
        columns = (*table.landed, *(own_columns("0/0", "now") if target.is_history else ()))
        create = creation(target, columns, key=True).as_string(destination)
    name_in_raw = target.name.as_string(None)
    schema = sql.Identifier(target.schema).as_string(None)
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    while True:  # dbmate knows a migration by its second alone
        version = time.strftime("%Y%m%d%H%M%S", time.gmtime())
        if not list(folder.glob(f"{version}_*")):
            break
        time.sleep(0.1)
    file = folder / f"{version}_{name}.sql"
    with file.open("x") as opened:  # never over another one
        opened.write(
            f"-- migrate:up\ncreate schema if not exists {schema};\n\n{create};\n\n"
            f"-- migrate:down\ndrop table {name_in_raw};\n"
        )
    return file


def _dbmate() -> str:
    beside = Path(sys.executable).parent  # of an environment that is not activated
    found = shutil.which("dbmate", path=os.pathsep.join([str(beside), os.environ.get("PATH", "")]))
    if found is None:
        raise UsageError(
            "dbmate is not installed", hint="pip install 'dbt-exporter[migrations]' brings it"
        )
    return found


def _url() -> str:
    """The destination as a URL, which dbmate wants, also where it is a dbt profile's."""
    parts = conninfo_to_dict(url("DATABASE_URL_ANALYTICS"))
    user, password, database = (str(parts.pop(n, "")) for n in ("user", "password", "dbname"))
    credentials = quote(user, "") + (f":{quote(password, '')}" if password else "")
    return f"postgresql://{credentials}@/{quote(database, '')}?{urlencode(parts)}"
