"""Any order of writes, commits, loads and kills: raw equals the source after one more load."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.config.definition import Definition, parse
from exporter.load.deletes import reconcile
from exporter.load.one import load
from exporter.source import NEW, Wanted
from exporter.terminal.console import Console
from exporter.wire.connection import Sessions
from tests.conftest import Workplace

SESSIONS = 3
_number = itertools.count()
_ids = itertools.count()

session = st.integers(0, SESSIONS - 1)
stamp = st.sampled_from(["now()", "clock_timestamp()", "now() - interval '290 seconds'"])
LIES = ["'2001-01-01'", "now() - interval '3 hours'", "'2100-01-01'"]
step = st.one_of(
    st.tuples(st.just("insert"), session, stamp),
    st.tuples(st.just("update"), session, stamp),
    st.tuples(st.just("commit"), session, st.none()),
    st.tuples(st.just("rollback"), session, st.none()),
    st.tuples(st.just("load"), st.none(), st.none()),
    st.tuples(st.just("killed load"), st.floats(0, 0.03), st.none()),
)
# What no cursor finds.
lying = st.sampled_from(LIES)
any_step = st.one_of(
    step,
    st.tuples(st.just("insert"), session, lying),
    st.tuples(st.just("update"), session, lying),
    st.tuples(st.just("savepoint"), session, lying),
    st.tuples(st.just("delete"), session, st.none()),
    st.tuples(st.just("key"), session, st.none()),
    st.tuples(st.just("truncate"), st.none(), st.none()),
    st.tuples(st.just("partition"), st.none(), st.none()),
)


class Way(NamedTuple):
    """How a table is read. With ``anything``, cursors may lie and rows may go."""

    cursor: str | None
    lookback: str | None = None
    read: str = "cursor"
    sweep: str = "never"
    anything: bool = False
    partitioned: bool = False
    keyless: bool = False


def _definition(table: str, way: Way, batch_rows: int) -> Definition:
    source: dict[str, Any] = {"table": table, "read": way.read, "sweep": way.sweep}
    if way.cursor:
        fields = {"field": way.cursor, "id_field": "id", "lookback": way.lookback}
        source["cursor"] = {k: v for k, v in fields.items() if v}
    meta = {"source": source, "batch_rows": batch_rows}
    if way.keyless:
        meta["mode"] = "append"
    elif way.anything:
        meta |= {"conflict_columns": ["id"], "deletes": "remove"}
    else:
        meta["conflict_columns"] = ["id"]
    return parse(meta, where="x.yml:1", source="s", table=table, schema="analytics_raw")


@contextlib.contextmanager
def _sessions(place: Workplace) -> Iterator[list[psycopg.Connection[Any]]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(psycopg.connect(place.core)) for _ in range(SESSIONS)]


_SILENT = Console(level="error")


def _killed_load(definition: Definition, after: float) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=load, args=(definition, _SILENT, Sessions())
    )
    process.start()
    time.sleep(after)
    process.kill()
    process.join()


def _load(definition: Definition, wanted: Wanted = NEW) -> None:
    after = reconcile(100) if definition.destination.deletes == "remove" else None
    with Sessions() as sessions:
        for _ in range(100):
            result = load(definition, _SILENT, sessions, wanted=wanted, after=after)
            if result.status != "locked":  # by a killed one that the server still sees
                break
            time.sleep(0.02)
    assert result.error is None, str(result.error)


def _rows(url: str, table: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            f"select id, at, n, v from {table} order by id".encode()
        ).fetchall()


def _create(place: Workplace, table: str, way: Way) -> None:
    key = "id int not null" if way.keyless else "id int primary key"
    place.query(
        place.core,
        f"create table {table} ({key}, at timestamptz not null, n bigint not null,"
        " v int not null default 0)"
        + (" partition by hash (id)" if way.partitioned else "")
        + f"; create sequence {table}_n",
    )
    if way.read == "cursor":  # with no index, it would be scanned
        place.query(place.core, f"create index on {table} ({way.cursor}, id)")
    for part in range(3 if way.partitioned else 0):
        place.query(
            place.core,
            f"create table {table}_{part} partition of {table}"
            f" for values with (modulus 3, remainder {part})",
        )


def _write(session: psycopg.Connection[Any], what: str, when: str | None, table: str) -> None:
    some = f"id in (select id from {table} order by random() limit 2 for update skip locked)"
    row = f"insert into {table} values (%s, {when}, nextval('{table}_n'))"
    if what == "insert":
        session.execute(row.encode(), (next(_ids),))
    elif what == "savepoint":
        with contextlib.suppress(psycopg.Rollback), session.transaction():
            session.execute(row.encode(), (next(_ids),))
        with session.transaction(force_rollback=True):
            session.execute(row.encode(), (next(_ids),))
    elif what == "update":
        session.execute(
            f"update {table} set v = v + 1, at = {when}, n = nextval('{table}_n')"
            f" where {some}".encode()
        )
    elif what == "delete":
        session.execute(f"delete from {table} where {some}".encode())
    elif what == "key":
        session.execute(f"update {table} set id = id + 1000000 where {some}".encode())


def _alter(place: Workplace, what: str, table: str, way: Way) -> None:
    """Truncate the table, or take a partition off it or back, unless somebody writes."""
    statement = f"truncate {table}"
    if what == "partition":
        if not way.partitioned:
            return
        (attached,) = place.query(
            place.core, f"select count(*) from pg_inherits where inhrelid = '{table}_0'::regclass"
        )[0]
        statement = f"alter table {table} " + (
            f"detach partition {table}_0"
            if attached
            else f"attach partition {table}_0 for values with (modulus 3, remainder 0)"
        )
    with contextlib.suppress(psycopg.errors.LockNotAvailable):
        place.query(place.core, f"set lock_timeout = '20ms'; {statement}")


def _play(place: Workplace, way: Way, batch_rows: int, steps: list[Any]) -> None:
    table = f"item_{next(_number)}"
    _create(place, table, way)
    definition = _definition(table, way, batch_rows)
    with _sessions(place) as sessions:
        for what, who, when in steps:
            if way.keyless and what in ("update", "delete", "key", "truncate"):
                continue
            if way.lookback and when and "interval" in when:
                when = "now()"  # noqa: PLW2901  the lookback is for such clocks
            if what == "load":
                _load(definition)
            elif what == "killed load":
                _killed_load(definition, who)
            elif what in ("truncate", "partition"):
                _alter(place, what, table, way)
            elif what in ("commit", "rollback"):
                getattr(sessions[who], what)()
            else:  # for some rows there is no partition while one is detached
                with (
                    contextlib.suppress(psycopg.errors.CheckViolation),
                    sessions[who].transaction(),
                ):
                    _write(sessions[who], what, when, table)
        for one in sessions:
            one.commit()
    sweeps = way.read == "cursor" and way.anything
    _load(definition, Wanted(sweep=True) if sweeps else NEW)
    assert _rows(place.core, table) == _rows(place.analytics, f"analytics_raw.{table}")


WAYS = [
    Way("at"),
    Way("at", "0 seconds"),
    Way("n"),
    Way("at", sweep="1 day", anything=True),
    Way("at", sweep="1 day", anything=True, partitioned=True),
    Way("at", read="auto", anything=True),
    Way(None, read="scan", anything=True),
    Way(None, read="auto", anything=True, partitioned=True),
    Way(None, read="scan", anything=True, keyless=True),
]


@pytest.mark.parametrize("examples", [8, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_any_sequence(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, way: Way, examples: int
) -> None:
    monkeypatch.setenv("DATABASE_URL_CORE", place.core)
    monkeypatch.setenv("DATABASE_URL_ANALYTICS", place.analytics)
    steps = st.lists(any_step if way.anything else step, min_size=4, max_size=30)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(1, 3), steps)
    def any_sequence(batch_rows: int, steps: list[Any]) -> None:
        _play(place, way, batch_rows, steps)

    any_sequence()
