"""Runs one Python model: compiles and calls its code, and turns its result into a query."""

from __future__ import annotations

import contextlib
import gc
import linecache
import logging
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
from dbt.adapters.events.logging import AdapterLogger
from dbt_common.exceptions import DbtRuntimeError

from exporter.errors import ExporterError
from exporter.python_models import results
from exporter.python_models.relation import Relation, RowError, Session, This
from exporter.values.columns import ResultError

if TYPE_CHECKING:
    from exporter.python_models.workers import Workers

_log = AdapterLogger("Postgres")


def run(adapter: Any, model: dict[str, Any], code: str) -> str:
    """Run a model's code on dbt's connection; return the query that gives its rows.

    `model` is dbt's node, `code` what dbt compiled. The query may read a temporary table, which is
    dropped with the transaction. Raises DbtRuntimeError with the model's own traceback.
    """
    connection = adapter.connections.get_thread_connection()
    if not connection.transaction_open:
        adapter.connections.begin()  # dbt itself begins with its first statement only
    session = Session(connection.handle)
    session.execute("set local cursor_tuple_fraction = 1")  # every row of a cursor is wanted
    with _module(adapter, model) as module, _logging(), _rare_collections():
        session.workers = _workers(model, module)
        try:
            exec(_compiled(adapter, model, code), module.__dict__)  # noqa: S102 — a model is code
            dbt = _dbt(module, session)
            result = module.__dict__["model"](dbt, session)
            return results.query_of(result, session, dbt, _declared(model), _key_names(model))
        except Exception as error:
            raise DbtRuntimeError(_explained(error, model)) from error
        finally:
            session.close()


def warn(message: str) -> None:
    """Write a warning to dbt's log."""
    _log.warning(message)


def _workers(model: dict[str, Any], module: types.ModuleType) -> Workers | None:
    scheduler = (model["config"].get("meta") or {}).get("scheduler")
    if not scheduler:
        return None
    from exporter.python_models.workers import Workers  # Dask: most models do not need it

    return Workers(scheduler, module)


def _dbt(module: types.ModuleType, session: Session) -> Any:
    """Return dbt's own object for a model, whose `ref`, `source` and `this` give relations."""

    def load(name: str) -> Relation:
        return Relation(session, f"select * from {name}", name)

    dbt = module.__dict__["dbtObj"](load)
    dbt.this = This(session, dbt.this)

    def new_rows(relation: Relation, column: str = "_exported_at") -> Relation:
        """Return the rows that changed after this model's newest one, as the macro does."""
        if not dbt.is_incremental:
            return relation
        newest = f"select coalesce(max({column}), '-infinity') from {dbt.this}"
        return relation.where(f"{column} > ({newest})")

    dbt.new_rows = new_rows
    return dbt


def _declared(model: dict[str, Any]) -> dict[str, str]:
    return {
        name.strip('"'): column["data_type"]
        for name, column in model["columns"].items()
        if column.get("data_type")
    }


def _key_names(model: dict[str, Any]) -> list[str]:
    key = model["config"].get("unique_key") or []
    return [name.strip('"') for name in ([key] if isinstance(key, str) else key)]


# --- the model's code as a module ---------------------------------------------------------------


@contextlib.contextmanager
def _module(adapter: Any, model: dict[str, Any]) -> Iterator[types.ModuleType]:
    """Yield an importable module for the model's code: dataclasses, for one, look theirs up."""
    module = types.ModuleType(f"dbt_python_model_{model['name']}_{threading.get_ident()}")
    module.__file__ = str(Path(adapter.config.project_root) / model["original_file_path"])
    module.__dict__["print"] = _print
    sys.modules[module.__name__] = module
    try:
        yield module
    finally:
        del sys.modules[module.__name__]


def _compiled(adapter: Any, model: dict[str, Any], code: str) -> types.CodeType:
    """Compile the code with the file's line numbers: dbt strips blank lines at its beginning."""
    path = model["original_file_path"]
    with contextlib.suppress(OSError):
        text = (Path(adapter.config.project_root) / path).read_text()
        code = "\n" * text[: len(text) - len(text.lstrip())].count("\n") + code
    linecache.cache[path] = (len(code), None, code.splitlines(keepends=True), path)
    return compile(code, path, "exec", dont_inherit=True)


_THRESHOLD = gc.get_threshold()


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Collect garbage rarely: rows are many objects, and each collection walks dbt's manifest.

    A third of all time went there.
    """
    gc.set_threshold(100_000, *_THRESHOLD[1:])
    try:
        yield
    finally:
        gc.set_threshold(*_THRESHOLD)


# --- what a model says --------------------------------------------------------------------------


def _print(*values: object, sep: str | None = None, **_: object) -> None:
    _log.info((" " if sep is None else sep).join(str(value) for value in values))


class _ToDbt(logging.Handler):
    """Passes a model's log records to dbt's log, without those of other models' threads."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._thread = threading.get_ident()
        self._busy = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != self._thread or self._busy:
            return
        self._busy = True  # dbt's log may itself write through this handler
        try:
            say = {logging.INFO: _log.info, logging.WARNING: _log.warning}
            say.get(record.levelno, _log.error)(self.format(record))
        finally:
            self._busy = False


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    root, handler = logging.getLogger(), _ToDbt()
    root.addHandler(handler)
    if root.level == logging.WARNING:
        root.setLevel(logging.INFO)  # the default would drop what `logging.info` says
    try:
        yield
    finally:
        root.removeHandler(handler)


# --- errors -------------------------------------------------------------------------------------


def _explained(error: Exception, model: dict[str, Any]) -> str:
    """Return the error's text: the model's own part of the traceback, and the row's key."""
    path = model["original_file_path"]
    cause = error.__cause__ if isinstance(error, RowError) and error.__cause__ else error
    frames = traceback.extract_tb(cause.__traceback__)
    first = next((n for n, frame in enumerate(frames) if frame.filename == path), None)
    lines = [] if first is None else traceback.format_list(frames[first:])
    if not isinstance(error, (ResultError, ExporterError)):
        lines += traceback.format_exception_only(type(cause), cause)
        text = "The model failed:\n" + "".join(lines).rstrip()
    else:
        text = str(error)
    if isinstance(error, RowError):
        text += f"\nrow {error.number}" + _key(error, _key_names(model))
    return text


def _key(error: RowError, unique_key: list[str]) -> str:
    key = {name: error.row[name] for name in unique_key if name in error.row}
    with contextlib.suppress(psycopg2.Error):  # the transaction may have failed with the row
        key = key or error.relation.key(error.row)
    return "".join(f", {name} = {value!r}" for name, value in key.items())
