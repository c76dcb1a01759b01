"""Bytes between servers: sessions and their settings, COPY, and second tries.

The names of databases' variables and statements come in; sessions and blocks of rows go out.
"""

from exporter.wire.connection import (
    Connection,
    Sessions,
    cancel,
    connect,
    find_operators,
    own_sessions,
    sever_all,
    stopped_in_order,
)
from exporter.wire.copy import (
    AHEAD,
    END_OF_BATCH,
    Block,
    CopyIn,
    Limit,
    ReadAhead,
    Stopped,
    copy_out,
    field,
    one_batch,
    pour,
)
from exporter.wire.retry import first_line, with_retries

__all__ = [
    "AHEAD",
    "END_OF_BATCH",
    "Block",
    "Connection",
    "CopyIn",
    "Limit",
    "ReadAhead",
    "Sessions",
    "Stopped",
    "cancel",
    "connect",
    "copy_out",
    "field",
    "find_operators",
    "first_line",
    "one_batch",
    "own_sessions",
    "pour",
    "sever_all",
    "stopped_in_order",
    "with_retries",
]
