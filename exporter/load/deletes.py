"""Rows that are gone at the source, found by their keys alone and then marked in raw or removed."""

from __future__ import annotations

from psycopg import sql

from exporter import state
from exporter.load.transfer import After, Transfer, refuse_more
from exporter.raw import compare, statements
from exporter.raw.compare import Sums
from exporter.raw.sides import Comparison, comparison, key_names
from exporter.source import Table


def reconcile(max_percent: float) -> After:
    """Return what ``load`` is to do afterwards: apply the definition's ``deletes``.

    It raises DriftError where more than ``max_percent`` of raw's rows would go.
    """

    def after(transfer: Transfer, table: Table) -> None:
        target, attempt = transfer.raw.target, transfer.attempt
        if target.deletes == "ignore":
            return
        both = comparison(attempt.source, attempt.destination, target, table, keys_only=True)
        sums = compare.sums(both)
        if sums.differ:
            settle(transfer, both, sums, max_percent, f"exporter load {target.key} --reconcile")

    return after


def settle(
    transfer: Transfer,
    both: Comparison,
    sums: Sums,
    max_percent: float,
    command: str,
    *,
    land: bool = False,
) -> dict[str, int]:
    """Apply ``deletes`` to extra rows and, to ``land``, bring what is missing or different.

    In one transaction, with a stamp that is later than all that the load gave. Returns the number
    of rows of each kind. Raises DriftError where more than ``max_percent`` of raw's rows would go;
    ``command`` is what to run if they have to.
    """
    target, destination = both.target, transfer.attempt.destination
    with destination.transaction():
        unreplicated = both.unreplicated(transfer.plan.horizon)
        counts = compare.classify(both, sums, unreplicated=unreplicated)
        extra = counts["extra"] if target.deletes != "ignore" else 0
        wrong = counts["missing"] + counts["different"] if land else 0
        refuse_more(target.key, extra, sums.rows_raw, max_percent, command)
        if extra or wrong:
            stored = state.read(destination, target)
            stamp = state.stamp(destination, stored)
            if extra:
                _delete(transfer, both, stamp)
            if wrong:
                transfer.land_at_once(both.table, sums.condition(both.source), stamp)
            transfer.store(stored._replace(exported_at=stamp), "ok")
    return counts


def _delete(transfer: Transfer, both: Comparison, stamp: str) -> None:
    """Mark or remove the rows that ``compare.classify`` found to be extra."""
    comma = sql.SQL(", ")
    extra = sql.SQL("({}) in (select {} from {} where kind = 'extra')").format(
        comma.join(sql.Identifier("r", key.name) for key in both.raw.keys),
        comma.join(key_names(both.raw.keys)),
        compare.DIFFERENCES,
    )
    statement = statements.mark_or_delete(transfer.raw, extra, stamp)
    deleted = transfer.attempt.destination.execute(statement).rowcount
    transfer.attempt.result.totals.rows_deleted += deleted
