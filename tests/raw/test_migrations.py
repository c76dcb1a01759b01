"""``exporter db`` and dbmate's own command line, on one folder and one table."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT, Workplace, compare
from tests.helpers.tables import ITEM

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
DBMATE = shutil.which("dbmate", path=PATH)
OPTIONS = ["-d", "db/migrations", "--migrations-table", "analytics_raw.schema_migrations"]


def dbmate(place: Workplace, *words: str) -> str:
    assert DBMATE is not None
    done = subprocess.run(
        [DBMATE, *OPTIONS, "--no-dump-schema", *words],
        cwd=place.folder,
        env={**os.environ, "DATABASE_URL": place.analytics, "PGSSLMODE": "prefer"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def db(place: Workplace, *words: str) -> str:
    done = place.run("exporter", "db", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_command_lines_turn_about(product: Workplace) -> None:
    file = Path(db(product, "new", "create_stat_event", "--from", "StatEvent").strip())
    assert file.parent == product.folder / "db" / "migrations"
    assert "Pending: 1" in dbmate(product, "status")
    assert "Applied: " + file.name in db(product, "migrate")
    assert "Applied: 1\nPending: 0" in dbmate(product, "status")
    product.query(
        product.core,
        'insert into "StatEvent" (id, type, created_at, updated_at, source)'
        " values ('a', 'click', now(), now(), 'api')",
    )
    product.load("StatEvent")
    compare(product, '"StatEvent"', "analytics_raw.stat_event", "id, type::text, updated_at")
    time.sleep(1.1)  # dbmate knows a migration by its second alone
    dbmate(product, "new", "index_host")
    added = next((product.folder / "db" / "migrations").glob("*_index_host.sql"))
    added.write_text(
        "-- migrate:up\ncreate index by_host on analytics_raw.stat_event (host);\n"
        "-- migrate:down\ndrop index analytics_raw.by_host;\n"
    )
    assert "Pending: 1" in db(product, "status")
    dbmate(product, "migrate")
    assert "Pending: 0" in db(product, "status")
    assert "Rolled back" in db(product, "rollback")
    assert "Rolled back" in dbmate(product, "rollback")
    gone = "select to_regclass('analytics_raw.stat_event')"
    assert product.query(product.analytics, gone) == [(None,)]


def test_shipped_migration_is_what_a_load_makes(product: Workplace) -> None:
    shutil.copytree(ROOT / "db", product.folder / "db")
    kinds = (
        "select attname, format_type(atttypid, atttypmod), attnotnull from pg_attribute where"
        " attrelid = 'analytics_raw.stat_event'::regclass and attnum > 0 order by attnum"
    )
    db(product, "migrate")
    migrated = product.query(product.analytics, kinds)
    db(product, "rollback")
    product.load("StatEvent")
    assert product.query(product.analytics, kinds) == migrated


def test_what_is_wrong_is_told(product: Workplace) -> None:
    done = product.run("exporter", "db", "new", "no/name", "--from", "StatEvent")
    assert done.returncode == 2
    assert "no/name is not a name" in done.stderr
    folder = product.folder / "db" / "migrations"
    folder.mkdir(parents=True)
    (folder / "20260101000000_broken.sql").write_text(
        "-- migrate:up\nselect 1/0;\n-- migrate:down\n"
    )
    done = product.run("exporter", "db", "migrate")
    assert done.returncode == 1
    assert "division by zero" in done.stderr
    assert "dbmate migrate ended with exit status" in done.stderr
    nowhere = "postgresql://a:secret@localhost:1/x"
    done = product.run("exporter", "db", "status", DATABASE_URL_ANALYTICS=nowhere)
    assert done.returncode == 1
    assert "secret" not in done.stdout + done.stderr


def test_absence_of_dbmate_is_told(product: Workplace, tmp_path: Path) -> None:
    program = "import sys; sys.executable = '/nowhere/python'; from exporter.__main__ import main;"
    program += " sys.argv = ['exporter', 'db', 'status']; main()"
    done = product.run("python", "-c", program, PATH=str(tmp_path))
    assert done.returncode == 2
    assert "pip install 'dbt-exporter[migrations]'" in done.stderr


def test_a_key_that_the_source_knows(place: Workplace) -> None:
    place.define(
        ITEM.replace("cursor: {field: at, id_field: id}", "").replace(
            "        conflict_columns: [id]\n", ""
        )
    )
    place.query(place.core, "create table item (id int, at timestamptz, primary key (at, id))")
    file = Path(db(place, "new", "create_item", "--from", "Item").strip())
    assert 'primary key ("at", "id")' in (place.folder / file).read_text()
