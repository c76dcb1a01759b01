"""Turns what a model returned into a query: its own, or one that reads the staged rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from exporter.python_models.relation import Relation, Session
from exporter.python_models.staging import stage
from exporter.values.columns import Known, ResultError

_FRAMES = (
    ("pandas", "DataFrame"),
    ("polars", "DataFrame"),
    ("pyarrow", "Table"),
    ("pyarrow", "RecordBatch"),
    ("pyarrow", "RecordBatchReader"),
)


def query_of(
    result: Any, session: Session, dbt: Any, declared: dict[str, str], key: list[str]
) -> str:
    """Return the query that gives a model's result.

    A relation or an ibis expression is a query already, and no row leaves the database. Frames and
    rows are staged. `declared` are the types in the model's YAML, `key` the columns that name a
    row in an error. Raises ResultError, and whatever the model's own generator raises.
    """
    if isinstance(result, Relation):
        return result.query
    if _is(result, "ibis", "Expr"):
        from exporter.python_models import frames

        return frames.ibis_query(result, session)
    known = Known(declared, session.types, dbt.this.types if dbt.is_incremental else {})
    if _is(result, "polars", "LazyFrame"):
        result = result.collect(engine="streaming")  # only the result itself is held in memory
    if not _is_frame(result):
        result = _peeked(_rows(result))
    if _is_frame(result):
        from exporter.python_models import frames

        types, result = frames.rows_of(result, session.types)
        known.exact.update(types)
    return stage(session, result, known, key)


def _rows(result: Any) -> Iterator[Any]:
    if isinstance(result, Iterable) and not isinstance(result, (str, bytes, dict)):
        return iter(result)
    raise ResultError(
        f"model() returned {'nothing' if result is None else f'a {type(result).__name__}'}:"
        " return rows (an iterable of dicts), a relation, or a frame"
    )


def _is(value: Any, library: str, name: str) -> bool:
    # By name: where a library was not imported, no value is of it, and it need not be imported.
    return any(
        kind.__name__ == name and kind.__module__.partition(".")[0] == library
        for kind in type(value).__mro__
    )


def _is_frame(value: Any) -> bool:
    return any(_is(value, library, name) for library, name in _FRAMES)


def _peeked(items: Any) -> Any:
    """Return the items, or one reader of record batches where they are such batches."""
    first: Any = next(items, None)
    items = chain([first] if first is not None else [], items)
    if not _is(first, "pyarrow", "RecordBatch"):
        return items
    import pyarrow

    return pyarrow.RecordBatchReader.from_batches(first.schema, items)
