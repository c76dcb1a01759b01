"""What a model returned, as a query: its own, or one of the rows that were staged."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import chain
from typing import Any

from exporter.python_models.relation import Relation, Session
from exporter.python_models.staging import Known, ResultError, stage

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
    rows are staged. `declared` are the types that the model's YAML names, `key` names the row in
    an error. Raises ResultError, and whatever the model's own generator raises.
    """
    if isinstance(result, Relation):
        return result.query
    if _is(result, "ibis", "Expr"):
        from exporter.python_models import frames

        return frames.ibis_query(result, session)
    if result is None or isinstance(result, (str, bytes, dict)) or not isinstance(result, Iterable):
        raise ResultError(
            f"model() returned {'nothing' if result is None else f'a {type(result).__name__}'}:"
            " return rows (an iterable of dicts), a relation, or a frame"
        )
    known = Known(declared, session.types, dbt.this.types if dbt.is_incremental else {})
    if not _is_frame(result) and "pyarrow" in sys.modules:
        result = _peeked(iter(result))
    if _is_frame(result):
        from exporter.python_models import frames

        types, result = frames.rows_of(result, session.types)
        known.exact.update(types)
    return stage(session, result, known, key)


def _is(value: Any, library: str, name: str) -> bool:
    module = sys.modules.get(library)  # a model that has not imported it cannot have made one
    return module is not None and isinstance(value, getattr(module, name))


def _is_frame(value: Any) -> bool:
    return any(_is(value, library, name) for library, name in _FRAMES)


def _peeked(items: Any) -> Any:
    """The items; as one reader of record batches, where they are such."""
    first = next(items, None)
    items = chain([first] if first is not None else [], items)
    if first is None or not _is(first, "pyarrow", "RecordBatch"):
        return items
    import pyarrow

    return pyarrow.RecordBatchReader.from_batches(first.schema, items)
