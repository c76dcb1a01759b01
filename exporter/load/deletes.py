"""Rows that are gone at the source: found by their keys alone, then marked in raw or removed."""

from __future__ import annotations

from psycopg import sql

from exporter import state
from exporter.load.transfer import After, Transfer, refuse_more
from exporter.raw import STAMP, compare, statements
from exporter.raw.sides import FALSE, Comparison, comparison, names
from exporter.source import Horizon, Table


def reconcile(most: float) -> After:
    """Return what ``load`` is to do afterwards: apply the definition's ``deletes``.

    It raises DriftError where more than ``most`` percent of raw would go.
    """

    def after(transfer: Transfer, table: Table) -> None:
        target, attempt = transfer.raw.target, transfer.attempt
        source, destination = attempt.source, attempt.destination
        if target.deletes == "ignore":
            return
        both = comparison(source, destination, target, table, keys_only=True)
        first = compare.sums(source, destination, both)
        if not first.differ:
            return
        with destination.transaction():
            young = not_yet(both, transfer.plan.horizon)
            extra = compare.narrow(source, destination, both, first, young=young)["extra"]
            command = f"exporter load {target.key} --reconcile"
            refuse_more(target.key, extra, first.rows_raw, most, command)
            if extra:
                stamp = next_stamp(transfer)
                apply(transfer, both, stamp)
                store(transfer, stamp)

    return after


def apply(transfer: Transfer, both: Comparison, stamp: str) -> None:
    """Mark or remove the rows that ``compare.narrow`` found to be extra, in its transaction."""
    raw = transfer.raw
    comma = sql.SQL(", ")
    done = transfer.attempt.destination.execute(
        statements.gone(raw, stamp)
        + sql.SQL(" where ({}) in (select {} from {} where kind = 'extra')").format(
            comma.join(sql.Identifier("r", key.name) for key in both.raw.keys),
            comma.join(names(both.raw.keys)),
            compare.DIFFERENCES,
        )
        + statements.living(raw)
    )
    transfer.attempt.result.totals.rows_deleted += done.rowcount


def next_stamp(transfer: Transfer) -> str:
    """Return an ``_exported_at`` that is later than all that the load gave."""
    destination = transfer.attempt.destination
    return state.stamp(destination, state.read(destination, transfer.raw.target))


def store(transfer: Transfer, stamp: str) -> None:
    """Record what was done with that stamp, in its transaction."""
    stored = state.read(transfer.attempt.destination, transfer.raw.target)
    transfer.store(stored._replace(exported_at=stamp), "ok")


def not_yet(both: Comparison, horizon: Horizon | None) -> sql.Composable:
    """Return the condition for rows of raw that a standby may not have been told of yet.

    It shows what its primary had a while ago, and another server may have been read before.
    """
    if horizon is None or not horizon.standby or not both.stamped:
        return FALSE
    return sql.SQL("{} > {}::timestamptz - interval '5 minutes'").format(
        sql.Identifier(STAMP), sql.Literal(horizon.oldest_open)
    )
