"""What is remembered at the destination: positions, locks, runs, and who may land a range.

Plain values go in and come out. Nothing here knows a source.
"""

from exporter.state.binding import Binding, Judgement, Reading, Source, Worth, judge
from exporter.state.position import (
    RUNS,
    SCHEMA,
    Bound,
    Position,
    Round,
    State,
    as_dict,
    create_schema,
    create_tables,
    holder,
    is_beyond,
    later,
    lock,
    read,
    remember_columns,
    remembered_columns,
    stamp,
    tables_exist,
    take_over,
    write,
)
from exporter.state.runs import Result, Totals, record, record_failure, take_counts

__all__ = [
    "RUNS",
    "SCHEMA",
    "Binding",
    "Bound",
    "Judgement",
    "Position",
    "Reading",
    "Result",
    "Round",
    "Source",
    "State",
    "Totals",
    "Worth",
    "as_dict",
    "create_schema",
    "create_tables",
    "holder",
    "is_beyond",
    "judge",
    "later",
    "lock",
    "read",
    "record",
    "record_failure",
    "remember_columns",
    "remembered_columns",
    "stamp",
    "tables_exist",
    "take_counts",
    "take_over",
    "write",
]
