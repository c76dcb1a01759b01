"""Any order of writes, commits, loads and kills: raw equals the source after one more load."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.config.definition import Definition, parse
from exporter.load.one import load
from exporter.terminal.console import Console
from exporter.wire.connection import Sessions
from tests.conftest import Workplace

SESSIONS = 3
_number = itertools.count()

session = st.integers(0, SESSIONS - 1)
stamp = st.sampled_from(["now()", "clock_timestamp()", "now() - interval '290 seconds'"])
step = st.one_of(
    st.tuples(st.just("insert"), session, stamp),
    st.tuples(st.just("update"), session, stamp),
    st.tuples(st.just("commit"), session, st.none()),
    st.tuples(st.just("rollback"), session, st.none()),
    st.tuples(st.just("load"), st.none(), st.none()),
    st.tuples(st.just("killed load"), st.floats(0, 0.03), st.none()),
)


def _definition(table: str, cursor: str, lookback: str | None, batch_rows: int) -> Definition:
    fields = {"field": cursor, "id_field": "id", "lookback": lookback}
    meta = {
        "source": {"table": table, "cursor": {k: v for k, v in fields.items() if v}},
        "conflict_columns": ["id"],
        "batch_rows": batch_rows,
    }
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


def _load(definition: Definition) -> None:
    with Sessions() as sessions:
        for _ in range(100):
            result = load(definition, _SILENT, sessions)
            if result.status != "locked":  # by a killed one that the server still sees
                break
            time.sleep(0.02)
    assert result.error is None, str(result.error)


def _rows(url: str, table: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            f"select id, at, n, v from {table} order by id".encode()
        ).fetchall()


def _play(
    place: Workplace, cursor: str, lookback: str | None, batch_rows: int, steps: list[Any]
) -> None:
    table = f"item_{next(_number)}"
    place.query(
        place.core,
        f"create table {table} (id int primary key, at timestamptz not null,"
        f" n bigint not null, v int not null default 0); create sequence {table}_n",
    )
    definition = _definition(table, cursor, lookback, batch_rows)
    ids = itertools.count()
    with _sessions(place) as sessions:
        for what, who, when in steps:
            if lookback and when and "interval" in when:
                when = "now()"  # noqa: PLW2901  the lookback is for such clocks
            if what == "insert":
                sessions[who].execute(
                    f"insert into {table} values ({next(ids)}, {when}, nextval('{table}_n'))"
                )
            elif what == "update":
                sessions[who].execute(
                    f"update {table} set v = v + 1, at = {when}, n = nextval('{table}_n')"
                    f" where id in (select id from {table} order by random() limit 2"
                    " for update skip locked)"
                )
            elif what == "load":
                _load(definition)
            elif what == "killed load":
                _killed_load(definition, who)
            else:
                getattr(sessions[who], what)()
        for one in sessions:
            one.commit()
    _load(definition)
    assert _rows(place.core, table) == _rows(place.analytics, f"analytics_raw.{table}")


@pytest.mark.parametrize("examples", [50, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.parametrize(("cursor", "lookback"), [("at", None), ("at", "0 seconds"), ("n", None)])
def test_any_sequence(
    place: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    cursor: str,
    lookback: str | None,
    examples: int,
) -> None:
    monkeypatch.setenv("DATABASE_URL_CORE", place.core)
    monkeypatch.setenv("DATABASE_URL_ANALYTICS", place.analytics)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(1, 3), st.lists(step, min_size=4, max_size=30))
    def any_sequence(batch_rows: int, steps: list[Any]) -> None:
        _play(place, cursor, lookback, batch_rows, steps)

    any_sequence()
