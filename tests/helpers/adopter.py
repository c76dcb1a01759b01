"""A dbt project of ten models that knows nothing of the exporter, and its core database.

`python tests/helpers/adopter.py` takes the installed exporter into it, as a person would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg

from exporter.demo.embedded import Server, running_server

TABLES = ("customer", "product", "orders", "order_line")
CORE = """
create table customer (
    id int primary key, email text, country text, updated_at timestamptz not null default now()
);
create table product (
    id int primary key, name text, price numeric(10, 2),
    updated_at timestamptz not null default now()
);
create table orders (
    id int primary key, customer_id int, status text, updated_at timestamptz not null default now()
);
create table order_line (
    order_id int, line int, product_id int, quantity int,
    updated_at timestamptz not null default now(), primary key (order_id, line)
);
insert into customer
    select n, 'c' || n || '@' || n % 3 || '.example.org', (array['fr', 'de'])[1 + n % 2]
    from generate_series(1, 50) as n;
insert into product select n, 'product ' || n, n from generate_series(1, 20) as n;
insert into orders select n, 1 + n % 50, 'open' from generate_series(1, 200) as n;
insert into order_line select n, line, 1 + (n + line) % 20, line
    from generate_series(1, 200) as n, generate_series(1, 3) as line;
"""
CHANGE = """
update orders set status = 'paid', updated_at = clock_timestamp() where id <= 10;
insert into customer values (51, 'new@9.example.org', 'fr');
"""
_UPSERT = (
    "{{ config(materialized='incremental', incremental_strategy='upsert', unique_key='id') }}\n"
)
_FILES = {
    "dbt_project.yml": "name: adopter\nprofile: adopter\nmodels: {adopter: {+schema: shop}}\n",
    ".gitignore": "target/\nlogs/\n",
    "seeds/countries.csv": "code,name\nfr,France\nde,Germany\n",
    "models/country_codes.sql": "select code from {{ ref('countries') }}",
    "models/country_names.sql": (
        "{{ config(materialized='table') }} select * from {{ ref('countries') }}"
    ),
    "models/country_pairs.sql": (
        "{{ config(materialized='ephemeral') }} select code, name from {{ ref('country_names') }}"
    ),
    "models/customers.sql": (
        _UPSERT + "select id, email, country, _exported_at from {{ ref('stg_customer') }}\n"
        "{% if is_incremental() %} where {{ new_rows() }} {% endif %}"
    ),
    "models/customer_hosts.py": (
        "def host(row):\n"
        "    return {'id': row['id'], 'host': row['email'].split('@')[1],"
        " '_exported_at': row['_exported_at']}\n"
        "\n\ndef model(dbt, session):\n"
        "    dbt.config(materialized='incremental', incremental_strategy='upsert',"
        " unique_key='id')\n"
        "    return dbt.new_rows(dbt.ref('customers')).map(host)\n"
    ),
    "models/products.py": (
        "def model(dbt, session):\n    dbt.config(materialized='table')\n"
        "    rows = dbt.ref('stg_product')\n"
        "    return rows.map(lambda row: {**row, 'cents': int(row['price'] * 100)})\n"
    ),
    "models/order_state.sql": (
        _UPSERT + "select id, customer_id, status, _exported_at from {{ ref('stg_orders') }}\n"
        "{% if is_incremental() %} where {{ new_rows() }} {% endif %}"
    ),
    "models/order_totals.sql": (
        "{{ config(materialized='incremental', incremental_strategy='merge', unique_key='id') }}\n"
        "select l.order_id as id, sum(l.quantity * p.price) as total\n"
        "from {{ ref('stg_order_line') }} as l join {{ ref('products') }} as p"
        " on p.id = l.product_id group by 1"
    ),
    "models/revenue.sql": (
        "select c.name, sum(t.total) as total from {{ ref('order_totals') }} as t\n"
        "join {{ ref('order_state') }} as s on s.id = t.id\n"
        "join {{ ref('customers') }} as u on u.id = s.customer_id\n"
        "join {{ ref('country_pairs') }} as c on c.code = u.country group by 1"
    ),
    "models/runs.sql": "select * from {{ source('analytics_raw', '_exporter_runs') }}",
    "models/models.yml": (
        "version: 2\nsources:\n  - name: analytics_raw\n    schema: analytics_raw\n"
        "    tables: [{name: _exporter_runs}]\n"
        "models:\n"
        "  - {name: customers, columns: [{name: id, data_tests: [unique, not_null]}]}\n"
        "  - {name: order_totals, columns: [{name: id, data_tests: [unique]}]}\n"
        "  - {name: runs, data_tests: [loads_end_well]}\n"
    ),
}
MODELS = {Path(name).stem for name in _FILES if name.startswith("models/") and ".yml" not in name}
assert len(MODELS) == 10


def write(folder: Path) -> None:
    """Write the project into an empty folder, and commit it."""
    for name, text in _FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "-q", ".")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "ours")


def git(folder: Path, *words: str) -> str:
    """Run git in the project; return what it prints."""
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "safe.directory=*")
    return subprocess.run(
        ["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


LINE = "exporter init --yes && exporter new --all --yes && exporter load && dbt build"


def added_by(said: str) -> set[str]:
    """Return the files that `exporter init` says it has added."""
    lines = said.splitlines()
    return {line.removeprefix("added ") for line in lines if line.startswith("added ")}


def _take_in(server: Server, folder: Path, home: Path) -> None:
    for name in ("core", "analytics"):
        with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
            connection.execute(f"create database {name}".encode())
    environment = {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "DATABASE_URL_CORE": server.url("core"),
        "DATABASE_URL_ANALYTICS": server.url("analytics"),
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
    }

    def run(line: str) -> str:
        done = subprocess.run(
            ["/bin/sh", "-c", line], cwd=folder, env=environment, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{line}: exit status {done.returncode}\n{done.stdout}")
        return done.stdout

    write(folder)
    said = ""
    for statements in (CORE, CHANGE):
        with psycopg.connect(server.url("core")) as connection:
            connection.execute(statements.encode())
        said += run(LINE)
    nodes = run("dbt ls --quiet").split()
    assert len(nodes) > len(MODELS)
    assert all(name.removeprefix("source:").startswith("adopter.") for name in nodes), nodes
    assert git(folder, "diff") == ""
    status = git(folder, "status", "--short", "--untracked-files=all").splitlines()
    new = {f"models/staging/stg_{table}.{kind}" for table in TABLES for kind in ("sql", "yml")}
    assert {line.removeprefix("?? ") for line in status} == added_by(said) | new, status
    print(json.dumps({"line": LINE, "nodes": len(nodes), "check": run("exporter init --check")}))
    print(run("dbt --version").splitlines()[1].strip())


if __name__ == "__main__":
    with running_server() as own, tempfile.TemporaryDirectory() as place:
        os.mkdir(f"{place}/home")
        os.mkdir(f"{place}/project")
        _take_in(own, Path(place, "project"), Path(place, "home"))
