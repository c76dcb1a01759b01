"""What `dbt.ref` and `dbt.source` give a Python model: a query, not yet run."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg2

from exporter.python_models import values
from exporter.python_models.values import quoted

if TYPE_CHECKING:
    import ibis
    import pandas
    import polars
    import pyarrow

    from exporter.python_models.workers import Workers

Row = dict[str, Any]
FETCHED = 5_000
"""Rows of one FETCH: enough to hide the round trip, few enough to stay at some megabytes."""

DESCRIBED = "__dbt_python_described"


class Session:
    """dbt's own connection, as a model's `session`: what runs here runs in dbt's transaction."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._cursors = 0
        # All that the server does is done here, one after the other: a connection does one thing
        # at a time, and what was begun goes on while the model computes.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dbt_python")
        self.types: dict[str, str] = {}
        """The type of each column of the relations that were read, the first relation's first."""
        self.named: dict[str, str] = {}
        """The queries behind the ibis tables that were handed out, by their names."""
        self.workers: Workers | None = None
        """Where row functions run, if not here."""

    def close(self) -> None:
        """Wait for what was begun; the connection stays dbt's."""
        self._worker.shutdown()

    def sql(self, query: str, params: Any = None) -> Relation:
        """A relation of a query of one's own; `%s` and `%(name)s` stand for `params`."""
        return Relation(self, self.bound(query, params))

    def execute(self, statement: str, params: Any = None) -> int:
        """Run a statement in dbt's transaction; returns the number of rows it changed."""

        def run() -> int:
            with self._handle.cursor() as cursor:
                cursor.execute(statement, params)
                return int(cursor.rowcount)

        return self._worker.submit(run).result()

    def fetch(self, query: str, params: Any = None) -> list[tuple[Any, ...]]:
        """The rows of a small query."""

        def run() -> list[tuple[Any, ...]]:
            with self._handle.cursor() as cursor:
                cursor.execute(query, params)
                return list(cursor.fetchall())

        return self._worker.submit(run).result()

    def stream(self, query: str) -> Iterator[list[tuple[Any, ...]]]:
        """A query's rows, in lists, in constant memory: by a cursor of the server.

        While a list is in use, the server makes the next one.
        """
        self._cursors += 1
        cursor = self._handle.cursor(name=f"dbt_python_{self._cursors}")
        values.register(cursor)
        self._worker.submit(cursor.execute, query).result()
        try:
            ahead = self._worker.submit(cursor.fetchmany, FETCHED)
            while rows := ahead.result():
                ahead = self._worker.submit(cursor.fetchmany, FETCHED)
                yield rows
        finally:
            with contextlib.suppress(RuntimeError):  # the session was closed before
                self._worker.submit(_close, cursor)

    def copy(self, statement: str, data: bytes) -> Future[None]:
        """COPY … FROM STDIN, begun; the result is for the caller to ask."""

        def run() -> None:
            with self._handle.cursor() as cursor:
                # one piece: each further one would wait for Python's lock, which the model holds
                cursor.copy_expert(statement, io.BytesIO(data), max(len(data), 1))

        return self._worker.submit(run)

    def bound(self, sql: str, params: Any) -> str:
        """The SQL with its parameters written into it, as literals."""
        if params is None:
            return sql
        with self._handle.cursor() as cursor:
            return str(cursor.mogrify(sql, params).decode())

    def columns(self, query: str) -> list[tuple[str, str]]:
        """The names and types of a query's columns, in their order, each type with its length."""
        # what psycopg2 tells of a cursor's columns has no lengths
        self.execute(f"create temporary table {DESCRIBED} on commit drop as {query} with no data")
        found = self.fetch(
            "select attname, format_type(atttypid, atttypmod) from pg_attribute"
            f" where attrelid = 'pg_temp.{DESCRIBED}'::regclass and attnum > 0 order by attnum"
        )
        self.execute(f"drop table pg_temp.{DESCRIBED}")
        return [(name, kind) for name, kind in found]


def _close(cursor: Any) -> None:
    with contextlib.suppress(psycopg2.Error):  # a transaction that failed has closed it
        cursor.close()


class Relation:
    """A table, view or query. Iterating reads its rows as dicts, in constant memory.

    `select`, `where` and `limit` give a new relation, whose SQL does that; nothing runs before
    the rows are asked for, and nothing at all where a model returns the relation itself.
    """

    def __init__(self, session: Session, query: str, name: str | None = None) -> None:
        self._session = session
        self.query = query
        self._name = self._table = name

    def __str__(self) -> str:
        return self._name or f"({self.query})"

    def __iter__(self) -> Iterator[Row]:
        names = self.columns
        for rows in self.stream():
            for row in rows:
                yield dict(zip(names, row))  # noqa: B905 — a query's rows are as long as its columns

    def stream(self) -> Iterator[list[tuple[Any, ...]]]:
        """The rows in lists, in constant memory."""
        return self._session.stream(self.query)

    @property
    def workers(self) -> Workers | None:
        """Where row functions run, if not here."""
        return self._session.workers

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in their order."""
        return list(self.types)

    @property
    def types(self) -> dict[str, str]:
        """The PostgreSQL type of each column."""
        found = dict(self._session.columns(self.query))
        for name, kind in found.items():
            self._session.types.setdefault(name, kind)
        return found

    def select(self, *columns: str) -> Relation:
        """Only these columns, each an expression of SQL: `select("id", "lower(tag) as tag")`."""
        return self._of(f"select {', '.join(columns)} from ({self.query}) as relation")

    def where(self, condition: str, params: Any = None) -> Relation:
        """Only the rows that meet a condition of SQL; `%s` and `%(name)s` stand for `params`."""
        bound = self._session.bound(condition, params)
        return self._of(f"select * from ({self.query}) as relation where {bound}")

    def limit(self, rows: int) -> Relation:
        """At most so many rows."""
        return self._of(f"select * from ({self.query}) as relation limit {int(rows)}")

    def map(self, function: Callable[[Row], Row | None]) -> Mapped:
        """`function(row)` of each row; a row for which it returns None is left out."""
        return Mapped(self, function)

    def arrow(self) -> pyarrow.Table:
        """All rows as a pyarrow table, each column of the type that fits PostgreSQL's exactly."""
        from exporter.python_models import frames

        types = self.types
        exact = [
            f"{quoted(name)}::text{'[]' * kind.endswith('[]')} as {quoted(name)}"
            if frames.as_text(kind)
            else quoted(name)
            for name, kind in types.items()
        ]
        return frames.arrow_table(types, self._session.stream(self.select(*exact).query))

    def pandas(self) -> pandas.DataFrame:
        """All rows as a pandas frame with arrow's types, so that NULL and integers stay apart."""
        from exporter.python_models import frames

        return frames.to_pandas(self.arrow())

    def polars(self) -> polars.DataFrame:
        """All rows as a polars frame."""
        from exporter.python_models import frames

        return frames.to_polars(self.arrow())

    def ibis(self) -> ibis.Table:
        """An ibis table. An expression on it runs in the database when the model returns it."""
        from exporter.python_models import frames

        name = f"dbt_relation_{len(self._session.named) + 1}"
        self._session.named[name] = self.query
        return frames.ibis_table(name, self.types)

    def key(self, row: Row) -> dict[str, Any]:
        """What names the row in a message: its primary key, where the relation has one."""
        if self._table is None:
            return {}
        found = self._session.fetch(
            "select a.attname from pg_index i join pg_attribute a"
            " on a.attrelid = i.indrelid and a.attnum = any (i.indkey)"
            " where i.indrelid = %s::regclass and i.indisprimary",
            (self._table,),
        )
        return {name: row[name] for (name,) in found if name in row}

    def _of(self, query: str) -> Relation:
        relation = Relation(self._session, query)
        relation._table = self._table
        return relation


class This(Relation):
    """`dbt.this`: the model's own table, with the names that dbt's documentation gives it."""

    def __init__(self, session: Session, this: Any) -> None:
        super().__init__(session, f"select * from {this!r}", repr(this))
        self.database, self.schema, self.identifier = this.database, this.schema, this.identifier

    @property
    def types(self) -> dict[str, str]:
        """The PostgreSQL type of each column; a column of a result did not come from here."""
        return dict(self._session.columns(self.query))


class RowError(Exception):
    """A row function failed; the cause is the user's own error."""

    def __init__(self, row: Row, number: int, relation: Relation) -> None:
        super().__init__(f"row {number}")
        self.row, self.number, self.relation = row, number, relation


class Mapped:
    """The rows of a relation through a row function; a row that became None is left out."""

    def __init__(self, relation: Relation, function: Callable[[Row], Row | None]) -> None:
        self._relation = relation
        self._function = function

    def __iter__(self) -> Iterator[Row]:
        workers = self._relation.workers
        if workers:
            yield from self._by(workers)
            return
        function = self._function
        source: Iterator[Row] = iter(self._relation)
        for number, row in enumerate(source, 1):
            try:
                changed = function(row)
            except Exception as error:
                raise RowError(row, number, self._relation) from error
            if changed is not None:
                yield changed

    def _by(self, workers: Workers) -> Iterator[Row]:
        names, read = self._relation.columns, 0
        lists = self._relation.stream()
        for rows, changed, failure in workers.map(self._function, names, lists):
            yield from (row for row in changed if row is not None)
            if failure is not None:
                number = len(changed)
                row = dict(zip(names, rows[number]))  # noqa: B905 — of one length
                raise RowError(row, read + number + 1, self._relation) from self._failed(
                    row, failure
                )
            read += len(rows)

    def _failed(self, row: Row, failure: str) -> Exception:
        """The error of a row that failed elsewhere, with the lines of the model where it did."""
        try:
            self._function(row)
        except Exception as error:  # noqa: BLE001 — whatever the user's function raises
            return error
        return RuntimeError(f"only on a worker, not here: {failure}")

    def map(self, function: Callable[[Row], Row | None]) -> Mapped:
        """One more row function behind this one."""
        first = self._function

        def both(row: Row) -> Row | None:
            changed = first(row)
            return None if changed is None else function(changed)

        return Mapped(self._relation, both)
