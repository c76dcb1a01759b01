"""What `dbt.ref` and `dbt.source` give a Python model: a query, not yet run."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

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
Result = TypeVar("Result")
FETCHED = 5_000
"""Rows of one FETCH: enough to hide the round trip, few enough to stay at some megabytes."""

DESCRIBED = "__dbt_python_described"
"""A temporary table that has the columns of a query, and no row."""


class Session:
    """dbt's own connection, as a model's `session`: what runs here runs in dbt's transaction."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._cursors = 0
        # One thread does all that needs the connection, one thing after the other, and goes on
        # while the model computes.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dbt_python")
        self.types: dict[str, str] = {}
        """The types of the columns that were read; of two with one name, the first one's."""
        self.named: dict[str, str] = {}
        """The queries behind the ibis tables that were handed out, by the tables' names."""
        self.workers: Workers | None = None
        """The Dask workers that run row functions; None where they run in this process."""

    def close(self) -> None:
        """Wait for the statements that are under way. The connection stays open: it is dbt's."""
        self._worker.shutdown()

    def sql(self, query: str, params: Any = None) -> Relation:
        """Return a query as a relation; `%s` and `%(name)s` stand for `params`."""
        return Relation(self, self.bound(query, params))

    def execute(self, statement: str, params: Any = None) -> int:
        """Run a statement in dbt's transaction; return the number of rows that it changed."""

        def run(cursor: Any) -> int:
            cursor.execute(statement, params)
            return int(cursor.rowcount)

        return self._begin(run).result()

    def fetch(self, query: str, params: Any = None) -> list[tuple[Any, ...]]:
        """Return the rows of a small query."""

        def run(cursor: Any) -> list[tuple[Any, ...]]:
            cursor.execute(query, params)
            return list(cursor.fetchall())

        return self._begin(run).result()

    def copy(self, statement: str, data: bytes) -> Future[None]:
        """Begin a COPY … FROM STDIN; the caller waits for its result."""
        # In one piece: each further one would wait for Python's lock, which the model holds.
        size = max(len(data), 1)
        return self._begin(lambda cursor: cursor.copy_expert(statement, io.BytesIO(data), size))

    def _begin(self, work: Callable[[Any], Result]) -> Future[Result]:
        def run() -> Result:
            with self._handle.cursor() as cursor:
                return work(cursor)

        return self._worker.submit(run)

    def stream(self, query: str) -> Iterator[list[tuple[Any, ...]]]:
        """Yield a query's rows in lists, in constant memory, by a cursor of the server.

        While a list is in use, the next one is fetched.
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

    def bound(self, sql: str, params: Any) -> str:
        """Return the SQL with its parameters written into it, as literals."""
        if params is None:
            return sql
        with self._handle.cursor() as cursor:
            return str(cursor.mogrify(sql, params).decode())

    def columns(self, query: str) -> list[tuple[str, str]]:
        """Return the names and types of a query's columns in their order, types with lengths."""
        # psycopg2's description of a cursor has no lengths
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

    `select`, `where` and `limit` return a new relation with more SQL. No query runs before rows are
    asked for; where a model returns a relation, no row leaves the database.
    """

    def __init__(self, session: Session, query: str, name: str | None = None) -> None:
        self._session = session
        self.query = query
        self._name = self._table = name

    def __str__(self) -> str:
        return self._name or f"({self.query})"

    def __iter__(self) -> Iterator[Row]:
        names = self.columns
        for rows in self._session.stream(self.query):
            for row in rows:
                yield dict(zip(names, row))  # noqa: B905 — a query's rows are as long as its columns

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
        """Keep only these columns, expressions of SQL: `select("id", "lower(tag) as tag")`."""
        return self._of(f"select {', '.join(columns)} from ({self.query}) as relation")

    def where(self, condition: str, params: Any = None) -> Relation:
        """Keep only the rows that meet a condition; `%s` and `%(name)s` stand for `params`."""
        bound = self._session.bound(condition, params)
        return self._of(f"select * from ({self.query}) as relation where {bound}")

    def limit(self, rows: int) -> Relation:
        """Keep at most that many rows."""
        return self._of(f"select * from ({self.query}) as relation limit {int(rows)}")

    def map(self, function: Callable[[Row], Row | None]) -> Mapped:
        """Return `function(row)` for each row, without those for which it returns None."""
        return Mapped(self, function)

    def arrow(self) -> pyarrow.Table:
        """Return all rows as a pyarrow table, whose types hold those of PostgreSQL exactly."""
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
        """Return all rows as a pandas frame with Arrow's types: integers stay so beside NULL."""
        from exporter.python_models import frames

        return self.arrow().to_pandas(types_mapper=frames.library("pandas").ArrowDtype)

    def polars(self) -> polars.DataFrame:
        """Return all rows as a polars frame."""
        from exporter.python_models import frames

        return frames.library("polars").from_arrow(self.arrow())

    def ibis(self) -> ibis.Table:
        """Return an ibis table. An expression that a model returns on it runs in the database."""
        from exporter.python_models import frames

        name = f"dbt_relation_{len(self._session.named) + 1}"
        self._session.named[name] = self.query
        return frames.ibis_table(name, self.types)

    def key(self, row: Row) -> dict[str, Any]:
        """Return the row's primary key, for a message; empty where the relation has none."""
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
        """The PostgreSQL type of each column; not remembered as those of a column that was read."""
        return dict(self._session.columns(self.query))


class RowError(Exception):
    """A row function failed; the cause is the user's own error."""

    def __init__(self, row: Row, number: int, relation: Relation) -> None:
        super().__init__(f"row {number}")
        self.row, self.number, self.relation = row, number, relation


class Mapped:
    """The rows of a relation after a row function, without those that became None."""

    def __init__(self, relation: Relation, function: Callable[[Row], Row | None]) -> None:
        self._relation = relation
        self._function = function

    def __iter__(self) -> Iterator[Row]:
        workers = self._relation._session.workers
        if workers:
            yield from self._mapped_by(workers)
            return
        function = self._function
        for number, row in enumerate(self._relation, 1):
            try:
                changed = function(row)
            except Exception as error:
                raise RowError(row, number, self._relation) from error
            if changed is not None:
                yield changed

    def _mapped_by(self, workers: Workers) -> Iterator[Row]:
        names, read = self._relation.columns, 0
        lists = self._relation._session.stream(self._relation.query)
        for rows, changed, failure in workers.map(self._function, names, lists):
            yield from (row for row in changed if row is not None)
            if failure is not None:
                number = len(changed)
                row = dict(zip(names, rows[number]))  # noqa: B905 — of one length
                error = self._error_of(row, failure)
                raise RowError(row, read + number + 1, self._relation) from error
            read += len(rows)

    def _error_of(self, row: Row, failure: str) -> Exception:
        """Return the error of a row that failed on a worker, with the lines of the model."""
        try:
            self._function(row)
        except Exception as error:  # noqa: BLE001 — whatever the user's function raises
            return error
        return RuntimeError(f"only on a worker, not here: {failure}")

    def map(self, function: Callable[[Row], Row | None]) -> Mapped:
        """Add a row function, which gets what this one returns."""
        first = self._function

        def both(row: Row) -> Row | None:
            changed = first(row)
            return None if changed is None else function(changed)

        return Mapped(self._relation, both)
