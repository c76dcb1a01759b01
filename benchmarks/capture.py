"""Change capture beside PostgreSQL's own subscription, on the same changes."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import psycopg

from benchmarks.contestants import FDW, NAMES, ROOT, TYPED, Place, fdw_again, fdw_first
from benchmarks.measure import cost_of, wal_position
from benchmarks.place import SETTINGS, about, rotated, sql, write_section
from exporter.demo.demo import create_databases, fill
from exporter.demo.embedded import Server, running_server

SHAPES = {"transactions of 2,000": 1000, "one transaction": None}
_TICK = os.sysconf("SC_CLK_TCK")
# Half of the rows are changed and half are new; the changed ones lie anywhere in the table.
_PREPARE = """
create table fresh as select * from "StatEvent" where id > %(last)s;
delete from "StatEvent" where id > %(last)s;
create table todo as select id, (row_number() over (order by md5(id)) - 1) / %(share)s as step
from "StatEvent";
alter table fresh add step int;
update fresh f set step = n.step from (
    select id, (row_number() over (order by id) - 1) / %(share)s as step from fresh) n
where n.id = f.id;
create index on todo (step); create index on fresh (step);
update "StatEvent" set updated_at = updated_at - interval '1 day'
"""
_STEP = """
update "StatEvent" set status = 'VALIDATED', updated_at = now() at time zone 'UTC'
where id in (select id from todo where step = {step});
insert into "StatEvent" ({names}) select {values} from fresh where step = {step}
"""
_CHANGE = """
do $$ begin for n in 0 .. (select max(step) from todo) loop {step}; commit; end loop; end $$
"""


@dataclass(frozen=True)
class Cost:
    """``seconds``, and those of CPU: the command's and the servers'; ``memory`` and ``wal``."""

    seconds: float
    cpu: float
    servers: float
    memory: int
    wal: int


@click.command()
@click.option("--rows", default=500_000, show_default=True, help="So many change, as many are new.")
@click.option("--rounds", default=3, show_default=True, help="Figures are medians of so many.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)))
@click.option("--only", multiple=True, help="These contestants.")
@click.option("--save", is_flag=True, help="Replace the figures in README.md.")
def main(
    rows: int, rounds: int, shapes: tuple[str, ...], only: tuple[str, ...], save: bool
) -> None:
    """Land the same changes by a subscription, from the slot, by the cursor, by postgres_fdw."""
    costs: dict[tuple[str, str], list[Cost]] = defaultdict(list)
    chosen = [name for name in CONTESTANTS if not only or name in only]
    for shape in shapes or SHAPES:
        for number in range(rounds):
            for name, cost in _round(chosen, number, rows, SHAPES[shape] or rows):
                costs[shape, name].append(cost)
                click.echo(f"round {number + 1}, {shape}: {name} {cost}", err=True)
    table = _table(costs, rows)
    click.echo(table)
    if save:
        write_section("changes", f"{about(rounds)}\n\n{table}")


def _round(chosen: list[str], number: int, rows: int, share: int) -> Iterator[tuple[str, Cost]]:
    """Let each contestant land the same changes on new servers; ``share`` rows a transaction."""
    with _place() as (servers, place):
        _prepare(place, rows, share)
        for name in chosen:
            CONTESTANTS[name].first(place)
            sql(place.analytics, f"vacuum (analyze) {CONTESTANTS[name].table}")
        _change(place)
        for name in rotated(chosen, number):
            sql(place.analytics, "checkpoint")
            yield name, _cost(servers, place, CONTESTANTS[name])
        _assert_same(place, chosen)


# -- the changes


@contextlib.contextmanager
def _place() -> Iterator[tuple[list[Server], Place]]:
    """Run two servers: on one, a slot would read what the contestants before it have written."""
    settings = SETTINGS | {"wal_level": "logical", "max_worker_processes": "16"}
    with (
        running_server(settings) as source,
        running_server(settings) as destination,
        tempfile.TemporaryDirectory() as folder,
    ):
        os.environ["PATH"] = f"{source.binaries}{os.pathsep}{os.environ['PATH']}"
        core, analytics = create_databases(source)[0], create_databases(destination)[1]
        yield [source, destination], Place(core, analytics, Path(folder))


def _prepare(place: Place, rows: int, share: int) -> None:
    for first in range(1, 2 * rows + 1, 500_000):
        fill(place.core, first, min(first + 499_999, 2 * rows))
    last = sql(place.core, f'select id from "StatEvent" order by id offset {rows - 1} limit 1')
    with psycopg.connect(place.core) as connection:
        cursor = psycopg.ClientCursor(connection)
        cursor.execute(_PREPARE, {"last": last[0][0], "share": share})
    sql(place.core, 'vacuum (full, analyze) "StatEvent"')


def _change(place: Place) -> None:
    values = NAMES.replace("updated_at", "now() at time zone 'UTC'")
    sql(place.core, _CHANGE.format(step=_STEP.format(names=NAMES, values=values, step="n")))
    sql(place.core, 'vacuum (analyze) "StatEvent"')


# -- the contestants


@dataclass(frozen=True)
class Contestant:
    """``first`` sets it up; ``again`` lands the changes: a command, or something to wait for."""

    table: str
    first: Callable[[Place], None]
    again: Callable[[Place], list[str]] | None


def _load(key: str) -> Callable[[Place], list[str]]:
    program = str(Path(sys.executable).parent / "exporter")
    command = [program, "load", key, "--project-dir", str(ROOT / "benchmarks" / "changes")]
    return lambda _: command


def _run(command: Callable[[Place], list[str]]) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        cost_of(command(place), _environment(place), place.analytics)

    return run


def _environment(place: Place) -> dict[str, str]:
    urls = {"DATABASE_URL_CORE": place.core, "DATABASE_URL_ANALYTICS": place.analytics}
    return {**os.environ, **urls, "PYTHONPATH": str(ROOT)}


def _subscribe(place: Place) -> None:
    sql(place.core, 'create publication bench for table "StatEvent"')
    sql(place.core, "select pg_create_logical_replication_slot('bench', 'pgoutput')")
    sql(place.analytics, f'create table "StatEvent" ({TYPED}, primary key (id))')
    _copy(place)
    sql(
        place.analytics,
        f"create subscription bench connection '{place.core}' publication bench"
        " with (create_slot = false, slot_name = bench, enabled = false, copy_data = false)",
    )


def _copy(place: Place) -> None:
    with psycopg.connect(place.core) as source, psycopg.connect(place.analytics) as destination:
        out = source.cursor().copy(f'copy "StatEvent" ({NAMES}) to stdout')
        into = destination.cursor().copy(f'copy "StatEvent" ({NAMES}) from stdin')
        with out as rows, into as target:
            for block in rows:
                target.write(block)


def _subscribed(place: Place) -> None:
    """Let the subscription run until all that was committed before is on disk."""
    end = sql(place.core, "select pg_current_wal_lsn()")[0][0]
    reached = f"select confirmed_flush_lsn >= '{end}' from pg_replication_slots"
    with psycopg.connect(place.core, autocommit=True) as connection:
        sql(place.analytics, "alter subscription bench enable")
        while connection.execute(f"{reached} where slot_name = 'bench'").fetchone() != (True,):
            time.sleep(0.01)
    sql(place.analytics, "alter subscription bench disable")


CONTESTANTS = {
    "exporter, changes": Contestant(
        "bench_changes.stat_event", _run(_load("ByChanges")), _load("ByChanges")
    ),
    "subscription": Contestant('public."StatEvent"', _subscribe, None),
    "exporter, cursor": Contestant(
        "bench_cursor.stat_event", _run(_load("ByCursor")), _load("ByCursor")
    ),
    FDW: Contestant("bench_fdw.stat_event", _run(fdw_first), fdw_again),
}


# -- what it costs


def _cost(servers: list[Server], place: Place, one: Contestant) -> Cost:
    before = sum(map(_cpu_of, servers))
    if one.again is None:
        wal, begin = wal_position(place.analytics), time.perf_counter()
        _subscribed(place)
        seconds = time.perf_counter() - begin
        time.sleep(0.5)  # its workers end
        own, memory, wal = 0.0, 0, wal_position(place.analytics) - wal
    else:
        cost = cost_of(one.again(place), _environment(place), place.analytics)
        seconds, own, memory, wal = cost.seconds, cost.cpu, cost.memory, cost.wal
    return Cost(seconds, own, sum(map(_cpu_of, servers)) - before, memory, wal)


def _cpu_of(server: Server) -> float:
    """Return the CPU of a server in seconds: of what runs, and of what has ended."""
    main = int((server.data / "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    ticks = sum(_ticks(main)[:4])
    for child in children:
        with contextlib.suppress(OSError):
            ticks += sum(_ticks(int(child))[:2])
    return ticks / _TICK


def _ticks(pid: int) -> list[int]:
    return [
        int(one) for one in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    ]


def _assert_same(place: Place, chosen: list[str]) -> None:
    statement = (
        "select count(*), sum(hashtextextended(row(id, type::text, updated_at, source::text,"
        " status::text, custom_attributes)::text, 0)) from {}"
    )
    wanted = sql(place.core, statement.format('"StatEvent"'))
    for name in chosen:
        found = sql(place.analytics, statement.format(CONTESTANTS[name].table))
        assert found == wanted, (name, found, wanted)


def _table(costs: dict[tuple[str, str], list[Cost]], rows: int) -> str:
    lines = [
        f"**{rows:,} changed + {rows:,} new rows**",
        "",
        "| | | seconds | to the subscription's | CPU, s | servers' CPU, s | peak MB | WAL, MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for shape in dict.fromkeys(shape for shape, _ in costs):
        of = {name: _median(found) for (where, name), found in costs.items() if where == shape}
        other = of["subscription"]["seconds"] if "subscription" in of else 1.0
        for place, name in enumerate(sorted(of, key=lambda one: of[one]["seconds"])):
            one = of[name]
            lines.append(
                f"| {'' if place else shape} | {name} | {one['seconds']:.2f} |"
                f" {one['seconds'] / other:.2f} | {one['cpu']:.2f} | {one['servers']:.2f} |"
                f" {one['memory'] / 2**20:.0f} | {one['wal'] / 2**20:.0f} |"
            )
    return "\n".join(lines) + "\n"


def _median(costs: list[Cost]) -> dict[str, float]:
    every = [asdict(cost) for cost in costs]
    return {name: statistics.median(one[name] for one in every) for name in every[0]}
