"""`exporter check`: what it finds, that its statements help, and that it changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

import psycopg
import pytest

from exporter.config.project import definitions
from exporter.demo.embedded import running_server
from exporter.errors import ServerError
from exporter.monitoring import check
from exporter.state import position as state
from tests.conftest import Workplace, as_role, compare
from tests.helpers.tables import ITEM

TABLE = (
    "create table item (id int primary key, at timestamptz not null);"
    "insert into item select n, now() from generate_series(1, 20) n;"
)


@pytest.fixture
def items(place: Workplace) -> Workplace:
    """Twenty items that no index on the cursor serves, not landed yet."""
    place.define(ITEM)
    place.query(place.core, TABLE)
    return place


@pytest.fixture
def limited(items: Workplace) -> Iterator[Workplace]:
    """The same through two roles that may do nothing yet; ``items.query`` stays with ours."""
    ours = items.core, items.analytics
    roles = [f"Reader {uuid.uuid4().hex[:8]}", f"loader_{uuid.uuid4().hex[:8]}"]
    for url, role in zip(ours, roles, strict=True):
        items.query(url, f"create role \"{role}\" login password 'secret'")
    items.query(ours[0], "revoke all on schema public from public")
    for url, role in zip(ours, roles, strict=True):
        database = urlsplit(url).path[1:]
        items.query(url, f"revoke all on database {database} from public")
        items.query(url, f'grant connect on database {database} to "{role}"')
    core, analytics = (as_role(url, role) for url, role in zip(ours, roles, strict=True))
    yield Workplace(items.folder, core, analytics)
    for url, role in zip(ours, roles, strict=True):
        items.query(url, f'drop owned by "{role}" cascade; drop role "{role}"')


def _check(place: Workplace, *words: str, status: int = 0) -> dict[str, dict[str, object]]:
    """Return the findings by their subject and check."""
    done = place.run("exporter", "check", "--json", *words)
    assert (done.returncode, done.stderr) == (status, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(list(one) == ["status", "subject", "check", "message", "fix"] for one in found)
    return {f"{one['subject']} {one['check']}": one for one in found}


def _apply(place: Workplace, url: str, finding: dict[str, object]) -> None:
    fixes = finding["fix"]
    assert isinstance(fixes, list)
    assert fixes
    for statement in fixes:
        place.query(url, statement)


def test_a_line_each_and_nothing_is_changed(items: Workplace) -> None:
    relations = "select count(*) from pg_class"
    before = [items.query(url, relations) for url in (items.core, items.analytics)]
    done = items.run("exporter", "check", NO_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    told = done.stdout.splitlines()
    assert max(map(len, told)) <= 80
    assert "\x1b" not in done.stdout
    assert told[0] == "ok    definitions: 1 table declared"
    assert "ok    Item drift: analytics_raw.item is made by the first load" in told
    assert "      → CREATE INDEX CONCURRENTLY ON public.item (at, id);" in told
    assert [items.query(url, relations) for url in (items.core, items.analytics)] == before
    assert items.query(items.analytics, "select to_regnamespace('analytics_raw')") == [(None,)]
    found = _check(items)
    for name in ("core connection", "core tls", "core clock", "core transactions", "Item lock"):
        assert found[name]["status"] == "ok"
    items.load("Item")
    assert "has the source's columns" in str(_check(items)["Item drift"]["message"])


def test_both_sessions_are_read_only(items: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in items.environment.items():
        monkeypatch.setenv(name, value)
    seen = {}

    def write(session: object, *_: object) -> Iterator[str]:
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            session.execute("create table x ()")  # type: ignore[attr-defined]
        seen[session] = True
        return iter(())

    monkeypatch.setattr(check.grants, "missing_on_source", write)
    monkeypatch.setattr(check.grants, "missing_on_destination", write)
    list(check.findings(items.folder, ()))
    assert len(seen) == 2


def test_the_index_that_is_missing(items: Workplace) -> None:
    items.query(
        items.core,
        'create schema "Old"; create table "Old"."Order" (id int, "updatedAt" timestamptz)'
        ' partition by range (id); create table "Old".low partition of "Old"."Order"'
        ' for values from (0) to (9); create table "Old".high partition of "Old"."Order" default;'
        "create view latest as select * from item",
    )
    items.define(
        ITEM,
        ITEM.replace("item", "order").replace("key: Item", "key: Order")
        .replace("table: order", "schema: Old\n          table: Order")
        .replace("field: at", "field: updatedAt"),
        ITEM.replace("item", "latest").replace("key: Item", "key: Latest"),
    )  # fmt: skip
    found = _check(items)
    assert found["Latest index"]["status"] == "ok"
    for key in ("Item", "Order"):
        assert found[f"{key} index"]["status"] == "warn"
        _apply(items, items.core, found[f"{key} index"])
    found = _check(items)
    assert found["Item index"]["message"] == "(at, id)"
    assert found["Order index"]["message"] == '("updatedAt", id)'
    one = _check(items, "Order")
    assert {"Order index"} <= set(one) <= set(found) - {"Item index"}
    items.query(items.core, "drop index item_at_id_idx; create index on item (id, at)")
    items.query(items.core, "create index on item (at) where id > 5")
    assert _check(items)["Item index"]["status"] == "warn"


def test_the_rights_that_are_missing_are_told_one_after_the_other(
    items: Workplace, limited: Workplace
) -> None:
    found = _check(limited, status=1)
    assert found["Item rights"]["status"] == "fail"
    assert "Item source" not in found
    assert found["core transactions"]["status"] == "warn"
    for name, url in (
        ("Item rights", items.core),
        ("core transactions", items.core),
        ("analytics rights", items.analytics),
    ):
        _apply(items, url, found[name])
    found = _check(limited)
    assert {one["status"] for name, one in found.items() if name != "Item index"} == {"ok"}
    limited.load("Item")
    assert _check(limited)["analytics rights"]["status"] == "ok"


def test_the_least_grants_are_enough(items: Workplace, limited: Workplace) -> None:
    script = limited.run("exporter", "check", "--grants")
    assert (script.returncode, script.stderr) == (0, "")
    core, analytics = script.stdout.split("-- on the database of DATABASE_URL_ANALYTICS\n")
    items.query(items.core, core)
    items.query(items.analytics, analytics)
    _check(limited)
    limited.load("Item")
    items.query(items.core, "insert into item values (100, now()); delete from item where id = 1")
    items.query(items.core, "alter table item add v int")
    limited.load("Item")
    limited.load("Item", "--full-refresh")
    compare(items, "public.item", "analytics_raw.item", "id, at, v")


def test_rights_on_tables_of_somebody_else(items: Workplace, limited: Workplace) -> None:
    items.load("Item")
    reader = unquote(str(urlsplit(limited.core).username))
    items.query(items.core, f'grant usage on schema public to "{reader}";'
                f'grant select on item to "{reader}"')  # fmt: skip
    missing = _check(limited, status=1)["analytics rights"]
    _apply(items, items.analytics, missing)
    assert "Item" not in str(_check(limited)["analytics rights"]["fix"])
    limited.load("Item")
    items.query(items.core, "alter table item add v int")
    drift = _check(limited, status=1)["Item drift"]
    assert "only the owner" in str(drift["message"])
    _apply(items, items.analytics, drift)
    items.query(items.core, "insert into item values (100, now(), 3)")
    limited.load("Item")
    items.query(items.core, "alter table item enable row level security")
    policies = _check(limited, status=1)["Item policies"]
    assert "row security" in str(policies["message"])
    done = limited.run("exporter", "load", "Item")
    assert done.returncode == 1
    assert "row security hides rows of public.item" in done.stderr
    _apply(items, items.core, policies)
    limited.load("Item")


def test_drift_is_told_before_it_happens(items: Workplace) -> None:
    items.load("Item")
    items.query(items.core, "alter table item add v int")
    drift = _check(items)["Item drift"]
    assert (drift["status"], "new column v integer" in str(drift["message"])) == ("warn", True)
    items.load("Item")
    items.query(items.core, "alter table item alter v type text")
    drift = _check(items, status=1)["Item drift"]
    assert drift["status"] == "fail"
    columns = "select column_name, data_type from information_schema.columns"
    columns += " where table_name = 'item' and column_name = 'v'"
    assert items.query(items.analytics, columns) == [("v", "integer")]
    _apply(items, items.analytics, drift)
    items.load("Item")
    compare(items, "public.item", "analytics_raw.item")
    items.define(ITEM + "        deletes: mark\n")
    assert "has _deleted_at from now on" in str(_check(items)["Item drift"]["message"])


def test_who_holds_the_lock(items: Workplace) -> None:
    with psycopg.connect(items.analytics, autocommit=True, application_name="night") as holder:
        state.lock(holder, definitions(items.folder)[0].destination)
        lock = _check(items)["Item lock"]
    assert (lock["status"], "night" in str(lock["message"])) == ("warn", True)


def test_prepared_transactions(items: Workplace) -> None:
    items.query(
        items.core, "begin; insert into item values (99, now()); prepare transaction 'check'"
    )
    assert "1 prepared" in str(_check(items)["core prepared"]["message"])
    items.query(items.core, "rollback prepared 'check'")


def test_what_cannot_be_looked_at_is_told_and_the_rest_goes_on(items: Workplace) -> None:
    items.query(items.core, "alter table item rename at to stamped")
    source = _check(items, status=1)["Item source"]
    assert source["status"] == "fail"
    assert "stamped" in str(source["fix"])
    items.define(ITEM.replace("conflict_columns", "conflictColumns"))
    found = _check(items, status=1)
    assert "did you mean conflict_columns?" in str(found["definitions definitions"]["message"])
    assert found["core connection"]["status"] == "ok"
    items.define(ITEM)
    core = items.core
    items.core = "postgresql://nobody:secret@/x?host=/no/where"
    done = items.run("exporter", "check")
    assert done.returncode == 1
    assert "fail  core connection: DATABASE_URL_CORE" in done.stdout
    assert "secret" not in done.stdout
    assert "ok    analytics connection" in done.stdout
    items.core = core
    items.query(items.analytics, "do $$ begin execute format('alter database %I set"
                " default_transaction_read_only = on', current_database()); end $$")  # fmt: skip
    assert _check(items, status=1)["analytics writable"]["status"] == "fail"
    done = items.run("exporter", "check", "Itme")
    assert (done.returncode, "did you mean Item?" in done.stderr) == (2, True)


@pytest.mark.parametrize(("apart", "said"), [(60.5, "ahead of"), (-60.5, "behind")])
def test_clocks_that_differ(apart: float, said: str) -> None:
    finding = check._clock("core", apart)
    assert (finding.status, said in finding.message, "60.500 s" in finding.message) == (
        "warn",
        True,
        True,
    )


def _address() -> str | None:
    """An address of this machine that is not the loopback's; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        found = str(probe.getsockname()[0])
        return None if found.startswith("127.") else found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_tls_and_a_standby(items: Workplace) -> None:
    address = _address()
    if not address or not shutil.which("openssl"):
        pytest.skip("needs openssl and an address beside the loopback's")
    with running_server({"fsync": "off"}) as server:
        with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
            connection.execute(TABLE.encode())
        server.stop()
        with (server.data / "pg_hba.conf").open("a") as file:
            file.write("host all all all trust\n")
        command = "openssl req -new -x509 -nodes -days 2 -subj /CN=localhost -out server.crt"
        subprocess.run([*command.split(), "-keyout", "server.key"], cwd=server.data, check=True,
                       capture_output=True)  # fmt: skip
        owner = server.data.stat()
        for name in ("server.crt", "server.key"):
            (server.data / name).chmod(0o600)
            os.chown(server.data / name, owner.st_uid, owner.st_gid)
        port = _free_port()
        server.settings.update(listen_addresses="*", port=str(port), ssl="on")
        try:
            server.start()
        except ServerError:
            pytest.skip("this server was built without TLS")
        url = f"postgresql://postgres@{address}:{port}/postgres?sslmode="
        items.core = f"{url}require"
        found = _check(items)
        assert "TLSv1" in str(found["core tls"]["message"])
        assert "core standby" not in found
        items.core = f"{url}disable"
        assert _check(items)["core tls"]["status"] == "warn"
        server.stop()
        (server.data / "standby.signal").touch()
        os.chown(server.data / "standby.signal", owner.st_uid, owner.st_gid)
        server.start()
        assert _check(items)["core standby"]["status"] == "warn"
        items.core, items.analytics = items.analytics, items.core
        assert _check(items, status=1)["analytics writable"]["status"] == "fail"
