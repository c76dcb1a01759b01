"""pandas, polars, pyarrow and ibis: imported only where a model uses one.

All frames pass through Arrow: PostgreSQL's types to Arrow's and back, exactly. Where Arrow has no
such type, a column travels as PostgreSQL's text, and gets its type back by its name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from exporter.python_models.values import BATCH
from exporter.values.columns import ResultError
from exporter.values.text import InfiniteDate, InfiniteTimestamp, to_json

_EXACT = {
    "smallint": "int16",
    "integer": "int32",
    "bigint": "int64",
    "real": "float32",
    "double precision": "float64",
    "boolean": "bool_",
    "date": "date32",
    "bytea": "binary",
}
_NUMERIC = re.compile(r"numeric\((\d+),(-?\d+)\)")


def library(name: str) -> Any:
    """Import a library. Raises ResultError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ResultError(
            f"{name} is not installed, and the model asks for it: pip install {name}"
        ) from None


# --- from PostgreSQL ----------------------------------------------------------------------------


def arrow_type(kind: str) -> Any:
    """Return the Arrow type of a PostgreSQL type; string where Arrow has no exact one."""
    pa = library("pyarrow")
    if kind.endswith("[]"):
        return pa.list_(arrow_type(kind[:-2]))
    if kind.startswith("timestamp"):
        return pa.timestamp("us", "UTC" if kind.endswith("with time zone") else None)
    if kind == "time without time zone":
        return pa.time64("us")
    if sized := _NUMERIC.fullmatch(kind):
        digits, scale = int(sized[1]), int(sized[2])
        if 0 <= scale <= digits <= 76:
            return pa.decimal128(digits, scale) if digits <= 38 else pa.decimal256(digits, scale)
    return getattr(pa, _EXACT.get(kind, "string"))()


def as_text(kind: str) -> bool:
    """Whether a column of this type is read as PostgreSQL's own text."""
    return bool(arrow_type(kind.removesuffix("[]")) == library("pyarrow").string())


def arrow_table(types: dict[str, str], batches: Iterable[list[tuple[Any, ...]]]) -> Any:
    """Return a query's rows as a pyarrow table. Raises ResultError for what Arrow cannot hold."""
    pa = library("pyarrow")
    schema = pa.schema([(name, arrow_type(kind)) for name, kind in types.items()])
    found = []
    for rows in batches:
        arrays = []
        for column, values in zip(schema, zip(*rows)):  # noqa: B905
            try:
                arrays.append(pa.array(_finite(values), column.type))
            except (pa.ArrowException, ValueError, TypeError, OverflowError):
                raise ResultError(
                    f"column {column.name!r} holds a {types[column.name]} that Arrow's"
                    f" {column.type} cannot: select it as text,"
                    f" .select(..., '{column.name}::text')"
                ) from None
        found.append(pa.record_batch(arrays, schema=schema))
    return pa.Table.from_batches(found, schema)


def _finite(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not {InfiniteDate, InfiniteTimestamp}.isdisjoint(map(type, values)):
        raise ValueError("infinity")
    return values


# --- ibis ---------------------------------------------------------------------------------------


def ibis_table(name: str, types: dict[str, str]) -> Any:
    """Return an unbound ibis table with the columns of a query."""
    ibis = library("ibis")
    from ibis.backends.sql.datatypes import PostgresType

    schema = {column: PostgresType.from_string(kind) for column, kind in types.items()}
    return ibis.table(schema, name=name)


def ibis_query(expression: Any, session: Any) -> str:
    """Return the SQL of an ibis expression, with the queries behind its tables."""
    ibis = library("ibis")
    if not hasattr(expression, "schema"):
        expression = expression.as_table()
    sql = ibis.to_sql(expression, dialect="postgres")
    used = {table.name for table in expression.op().find(ibis.expr.operations.UnboundTable)}
    named = [
        f'"{name}" as not materialized ({query})'
        for name, query in session.named.items()
        if name in used
    ]
    return f"with {', '.join(named)} select * from ({sql}) as expression" if named else str(sql)


# --- to PostgreSQL ------------------------------------------------------------------------------


def rows_of(frame: Any, origin: dict[str, str]) -> tuple[dict[str, str], Iterator[dict[str, Any]]]:
    """Return the PostgreSQL types of a frame's columns, and its rows in constant memory.

    `origin` has the types of the columns that were read: a column of such a name gets its type
    back, if it still has the Arrow type of that. Columns of pandas with Python objects, and those
    with nothing but NULL, get no type here.
    """
    pa = library("pyarrow")
    pandas = type(frame).__module__.startswith("pandas")
    if type(frame).__module__.startswith("polars"):
        frame = frame.to_arrow()
    if pandas:
        frame = _with_index(frame)
    else:
        frame = pa.Table.from_batches([frame]) if isinstance(frame, pa.RecordBatch) else frame
    names = [str(name) for name in frame.columns] if pandas else frame.schema.names
    _refuse_shared(names)
    if pandas:
        plain = [name for name in frame.columns if frame[name].dtype != object]
        schema = pa.Schema.from_pandas(frame[plain], preserve_index=False)
        columns = _pandas_columns(pa, frame)
    else:
        schema = frame.schema
        batches = frame.to_batches(BATCH) if isinstance(frame, pa.Table) else frame
        columns = ([_values(pa, a, n) for n, a in zip(schema.names, b.columns)] for b in batches)  # noqa: B905
    types = {}
    for column in schema:
        kind = origin.get(column.name)
        same = kind is not None and _plain(pa, column.type) == arrow_type(kind)
        found = kind if same else postgres_type(column.type, column.name)
        if found is not None:
            types[column.name] = found
    return types, (dict(zip(names, row)) for several in columns for row in zip(*several))  # noqa: B905


def _with_index(frame: Any) -> Any:
    """Return a pandas frame whose named index is columns. Raises ResultError.

    A nameless range numbers the rows, and is left out; any other nameless index may be data.
    """
    if frame.columns.nlevels > 1 or any(isinstance(name, tuple) for name in frame.columns):
        raise ResultError(
            "the frame's columns have several levels: make one name of each, such as"
            " frame.columns = ['_'.join(map(str, names)) for names in frame.columns]"
        )
    index = frame.index
    if index.names == [None] and (type(index).__name__ == "RangeIndex" or not len(frame)):
        return frame
    if None in index.names:
        raise ResultError(
            "the frame has an index without a name, and the rows' labels would be lost: name it,"
            " frame.rename_axis('name'), or drop it, frame.reset_index(drop=True)"
        )
    _refuse_shared([str(name) for name in (*index.names, *frame.columns)])
    return frame.reset_index()


def _refuse_shared(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ResultError(
                f"the frame has more than one column {name!r}, the names of its index included:"
                " rename or drop one"
            )


def _pandas_columns(pa: Any, frame: Any) -> Iterator[list[list[Any]]]:
    for first in range(0, len(frame), BATCH):
        part = frame.iloc[first : first + BATCH]
        columns = []
        for name in frame.columns:
            series = part[name]
            if series.dtype == object:
                gone = series.isna()
                columns.append([None if no else value for value, no in zip(series, gone)])  # noqa: B905
            else:
                columns.append(_values(pa, pa.array(series, from_pandas=True), str(name)))
        yield columns


def _values(pa: Any, array: Any, name: str) -> list[Any]:
    """Return an array as Python's values; what becomes jsonb as its text."""
    kind = array.type
    if getattr(kind, "unit", None) == "ns":
        try:  # Python has microseconds, as PostgreSQL has
            array = array.cast(_microseconds(pa, kind))
        except pa.ArrowInvalid:
            raise ResultError(
                f"column {name!r} has nanoseconds, PostgreSQL has microseconds: round it"
            ) from None
    found = array.to_pylist(maps_as_pydicts="strict")
    if postgres_type(kind, name) == "jsonb":
        return [None if value is None else to_json(value) for value in found]
    return list(found)


def _microseconds(pa: Any, kind: Any) -> Any:
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us")


def _plain(pa: Any, kind: Any) -> Any:
    """Return a type without its storage: `large_string` or a dictionary of strings is a string."""
    if pa.types.is_dictionary(kind):
        return _plain(pa, kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_large_list(kind):
        return pa.list_(_plain(pa, kind.value_type))
    return kind


def postgres_type(kind: Any, name: str) -> str | None:
    """Return the PostgreSQL type that holds an Arrow type exactly; None for a column of NULL."""
    pa = library("pyarrow")
    kind = _plain(pa, kind)
    plain = {
        pa.bool_(): "boolean",
        pa.int8(): "smallint",
        pa.int16(): "smallint",
        pa.uint8(): "smallint",
        pa.int32(): "integer",
        pa.uint16(): "integer",
        pa.int64(): "bigint",
        pa.uint32(): "bigint",
        pa.uint64(): "numeric(20,0)",
        pa.float16(): "real",
        pa.float32(): "real",
        pa.float64(): "double precision",
        pa.string(): "text",
        pa.binary(): "bytea",
        pa.date32(): "date",
        pa.date64(): "date",
        pa.uuid(): "uuid",
    }
    if kind in plain:
        return plain[kind]
    if pa.types.is_timestamp(kind):
        return "timestamptz" if kind.tz else "timestamp"
    if pa.types.is_decimal(kind):
        return f"numeric({kind.precision},{kind.scale})"
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        element = postgres_type(kind.value_type, name)
        nested = element is None or element == "jsonb" or element.endswith("[]")
        return "jsonb" if nested else f"{element}[]"
    for found, answer in (
        (pa.types.is_time, "time"),
        (pa.types.is_duration, "interval"),
        (pa.types.is_fixed_size_binary, "bytea"),
        (pa.types.is_struct, "jsonb"),
        (pa.types.is_map, "jsonb"),
    ):
        if found(kind):
            return answer
    if pa.types.is_null(kind):
        return None
    raise ResultError(f"column {name!r} is of Arrow's type {kind}: PostgreSQL has none for it")
