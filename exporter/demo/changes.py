"""``exporter demo --changes``: change capture of two tables that belong together."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import psycopg

from exporter.demo.demo import command_line, create_databases, dbt_environment, keep_up
from exporter.demo.embedded import running_server
from exporter.errors import ExporterError

_ACCOUNTS = 1000
_SETTINGS = {"max_connections": "50", "wal_level": "logical"}
_SOURCES = """\
version: 2
sources:
  - name: analytics_raw
    tables:
      - name: account
        config: {meta: {exporter: {source: {table: account, read: changes}}}}
      - name: entry
        config: {meta: {exporter: {source: {table: entry, read: changes}}}}
"""
_TABLES = """
create table account (id int primary key, owner text not null, balance bigint not null);
create table entry (
    id bigint primary key,
    account int not null references account on update cascade on delete cascade,
    amount bigint not null
)
"""
_ROWS = """
with made as (
    insert into account select n, 'owner ' || n, 0 from generate_series(1, %(accounts)s) n
    returning id
)
insert into entry
select n, 1 + n %% (select count(*) from made), (n * 7919::bigint) %% 2001 - 1000
from generate_series(1, %(entries)s) n;
"""
_BALANCES = "update account a set balance = s.sum from (select account, sum(amount)"
_BALANCES += " from entry group by account) s where s.account = a.id and balance <> s.sum"
# What a cursor sees least of: keys that change, rows that go, and two tables that must agree.
_CHANGES = {
    "10 accounts get another id, and their entries with them": (
        "update account set id = id + 1000000 where id between 101 and 110"
    ),
    "10 accounts are deleted, with their entries": (
        "delete from account where id between 201 and 210"
    ),
    "the entries of 10 accounts are corrected": (
        "update entry set amount = amount + 5 where account between 301 and 310"
    ),
    "1,000 entries move money from one account to another": (
        "insert into entry select 100000000 + n, 401 + n / 2 %% 100, case n %% 2 when 0 then -7"
        " else 7 end from generate_series(1, 1000) n"
    ),
}


def run(root: Path, rows: int, keep: bool) -> None:
    """Run the demo with that many rows of entries; ``keep`` leaves the server up until Ctrl-C.

    Raises ExporterError when a command fails, or raw is not what the source is.
    """
    with _project(root) as (folder, core, analytics):
        click.echo(
            f"\nAn embedded PostgreSQL with two databases; core gets {_ACCOUNTS:,} accounts and"
            f" {rows:,} entries.\nThe balance of an account is the sum of its entries."
            " models/sources.yml says:\n"
        )
        click.echo("".join(f"  {line}\n" for line in _SOURCES.splitlines()), nl=False)
        with psycopg.connect(core) as connection:
            connection.execute(_TABLES.encode())
            connection.execute(_ROWS.encode(), {"accounts": _ACCOUNTS, "entries": rows})
            connection.execute(_BALANCES.encode())
        _load(folder, core, analytics)
        click.echo("\nAt the source, in one transaction:")
        with psycopg.connect(core) as connection:
            for what, statement in _CHANGES.items():
                connection.execute(statement.replace("%%", "%").encode())
                click.echo(f"  - {what}")
            connection.execute(_BALANCES.encode())
        click.echo("and the balances follow. Once more:")
        _load(folder, core, analytics)
        command_line(folder, "exporter", "slots", "show")
        if keep:
            keep_up(core, analytics)
        click.echo("\nA slot keeps WAL until it is read. The demo is over:")
        command_line(folder, "exporter", "slots", "drop", _slot(core))


@contextlib.contextmanager
def _project(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Run a server with two databases; yield a new dbt project, and the URLs."""
    with (
        running_server(_SETTINGS) as server,
        dbt_environment(root),
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)
        (folder / "models").mkdir()
        (folder / "dbt_project.yml").write_text("name: bank\nprofile: dbt_exporter\n")
        (folder / "models" / "sources.yml").write_text(_SOURCES)
        core, analytics = create_databases(server)
        os.environ.update(DATABASE_URL_CORE=core, DATABASE_URL_ANALYTICS=analytics)
        os.environ.update(DBT_PROJECT_DIR=name)
        yield folder, core, analytics


def _load(folder: Path, core: str, analytics: str) -> None:
    """Load, and compare. Raises ExporterError."""
    command_line(folder, "exporter", "load")
    for table, columns in (("account", "id, owner, balance"), ("entry", "id, account, amount")):
        whole = f"select count(*), md5(string_agg(t::text, ',' order by id)) from (select {columns}"  # noqa: S608  our own names
        source, raw = (
            _one(core, f"{whole} from {table}) t"),
            _one(analytics, f"{whole} from analytics_raw.{table}) t"),
        )
        same = "the same" if source == raw else "NOT THE SAME"
        counts = [f"{one[0]:>9,}" for one in (source, raw)]
        click.echo(f"  {table:<8}{counts[0]} rows at the source,{counts[1]} in raw: {same}")
        if source != raw:
            raise ExporterError(f"raw has not what the source has in {table}")
    of_accounts, of_entries = _one(
        analytics,
        "select (select sum(balance) from analytics_raw.account)::text,"
        " (select sum(amount) from analytics_raw.entry)::text",
    )
    click.echo(f"  in raw, balances sum to {of_accounts}, and entries to {of_entries}")
    if of_accounts != of_entries:
        raise ExporterError("the two tables are not as of one moment")


def _one(url: str, query: str) -> tuple[Any, ...]:
    with psycopg.connect(url) as connection:
        return tuple(connection.execute(query.encode()).fetchall()[0])


def _slot(core: str) -> str:
    return str(_one(core, "select slot_name from pg_replication_slots")[0])
