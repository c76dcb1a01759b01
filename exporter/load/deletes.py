"""Rows that are gone at the source: found by their keys alone, then marked in raw or removed."""

from __future__ import annotations

import math
from collections.abc import Callable

from psycopg import sql

from exporter.errors import DriftError
from exporter.load.one import Load
from exporter.raw import compare, landing
from exporter.raw.sides import FALSE, Comparison, comparison, names
from exporter.raw.table import STAMP
from exporter.source.window import Horizon
from exporter.state import position as state


def reconcile(most: float) -> Callable[[Load], None]:
    """Return what ``load`` is to do afterwards: apply the definition's ``deletes``.

    It raises DriftError where more than ``most`` percent of raw would go.
    """

    def after(load: Load) -> None:
        definition = load.definition
        if definition.destination.deletes == "ignore":
            return
        both = comparison(load.source, load.destination, definition, load.table, keys_only=True)
        first = compare.sums(load.source, load.destination, both)
        if not first.differ:
            return
        with load.destination.transaction():
            found = compare.narrow(
                load.source, load.destination, both, first, young=not_yet(both, load.horizon)
            )
            extra = found["extra"]
            command = f"exporter load {definition.key} --reconcile"
            refuse_more(definition.key, extra, first.rows_raw, most, command)
            if extra:
                stamp = next_stamp(load)
                apply(load, both, stamp)
                store(load, stamp)

    return after


def refuse_more(key: str, extra: int, rows: int, most: float, command: str) -> None:
    """Raise DriftError where more than ``most`` percent of raw's rows would go.

    A source that is empty by accident, or hides its rows from this role, must not empty raw.
    """
    share = 100 * extra / max(rows, 1)
    if share > most:
        raise DriftError(
            f"{key}: {extra:,} of the {rows:,} rows of raw ({share:.0f} %) are gone at the source,"
            f" more than --max-deletes {most:g} allows: none was deleted",
            hint=f"if they have to go: {command} --max-deletes {math.ceil(share)}",
        )


def apply(load: Load, both: Comparison, stamp: str) -> None:
    """Mark or remove the rows that ``compare.narrow`` found to be extra, in its transaction."""
    raw = load.transfer.raw
    comma = sql.SQL(", ")
    done = load.destination.execute(
        landing.gone(raw, stamp)
        + sql.SQL(" where ({}) in (select {} from {} where kind = 'extra')").format(
            comma.join(sql.Identifier("r", key.name) for key in both.raw.keys),
            comma.join(names(both.raw.keys)),
            compare.DIFFERENCES,
        )
        + landing.living(raw)
    )
    load.result.totals.rows_deleted += done.rowcount


def next_stamp(load: Load) -> str:
    """Return an ``_exported_at`` that is later than all that the load gave."""
    return state.stamp(load.destination, state.read(load.destination, load.definition.key))


def store(load: Load, stamp: str) -> None:
    """Record what was done with that stamp, in its transaction."""
    stored = state.read(load.destination, load.definition.key)
    load.transfer.store(stored._replace(exported_at=stamp), "ok")


def not_yet(both: Comparison, horizon: Horizon) -> sql.Composable:
    """Return the condition for rows of raw that a standby may not have been told of yet.

    It shows what its primary had a while ago, and another server may have been read before.
    """
    if not horizon.standby or not both.stamped:
        return FALSE
    return sql.SQL("{} > {}::timestamptz - interval '5 minutes'").format(
        sql.Identifier(STAMP), sql.Literal(horizon.oldest_open)
    )
