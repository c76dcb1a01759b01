"""Source against raw, by checksums that each server computes for itself.

A row's key is hashed into one of 65,536 buckets: the same one on both sides, whatever their
collations, and no index is needed. First each side tells the count and the sum of its rows' hashes
for each bucket: one read of each table, at the same time, and few megabytes over the wire. Then
keys and hashes of the rows in buckets that differ are copied into a temporary table of the
destination, which tells what each of them comes to. The loader's memory does not grow with either.

The first read is made of short statements, each with a snapshot of its own. It may so take a bucket
for different that is not: the second read, of one snapshot, has the last word. And it may pass over
a row that changed while it ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

from psycopg import sql

from exporter.raw.sides import BUCKETS, COMMA, FALSE, TRUE, Comparison, Side, names
from exporter.wire import Connection, ReadAhead, cancel, copy_out, pour

TOLD = 100  # rows of each kind that are named
KINDS = ("missing", "extra", "different", "in flight")
DIFFERENCES = sql.Identifier("_exporter_differences")
_BLOCK = 8192  # bytes
_SLICE = 131_072  # blocks of the source that a statement reads: 1 GB
_KEYS = sql.Identifier("_exporter_keys")
# The planner takes each key for a bucket of its own, and would sort the table by them.
_PLAN = "set local enable_sort = off; set local work_mem = '64MB'"
_ONE_PROCESS = "; set local max_parallel_workers_per_gather = 0"


@dataclass
class Sums:
    """What the first read found. ``bits`` are the buckets that differ."""

    rows_source: int = 0
    rows_raw: int = 0
    bits: bytes = b""

    @property
    def differ(self) -> bool:
        """Whether any bucket does."""
        return any(self.bits)

    def condition(self, side: Side) -> sql.Composable:
        """Return the condition for a side's rows that are in these buckets."""
        return sql.SQL("get_bit({}::bytea, {}) = 1").format(
            sql.Literal(f"\\x{self.bits.hex()}"), side.bucket
        )


class Difference(NamedTuple):
    """A row that is not the same on both sides, by its key. ``columns`` are those that differ."""

    kind: str
    row: dict[str, str | None]
    columns: tuple[str, ...] = ()


def sums(
    source: Connection,
    destination: Connection,
    comparison: Comparison,
    progress: Callable[[int, int], None] = lambda rows, size: None,
) -> Sums:
    """Read both sides once, at the same time. Raises psycopg.Error.

    The source runs one statement at a time, in one process, of a gigabyte at most where its table
    can be read by ranges of blocks. ``progress`` is told the rows and bytes that it has read.
    """
    side = comparison.source
    parts = _parts(comparison)
    with ThreadPoolExecutor(1) as other:
        reading = other.submit(_sums, source, side, _PLAN + _ONE_PROCESS, parts, progress)
        try:
            in_raw = _sums(destination, comparison.raw, _PLAN, [(TRUE, 0)])
            at_source = reading.result()
        except BaseException:
            while not reading.done():  # it may just be between two statements
                cancel(source)
                wait([reading], 0.1)
            raise
    bits = bytearray(BUCKETS // 8)
    for bucket in at_source.keys() | in_raw.keys():
        if at_source.get(bucket) != in_raw.get(bucket):
            bits[bucket >> 3] |= 1 << (bucket & 7)
    rows = [sum(count for count, _ in found.values()) for found in (at_source, in_raw)]
    return Sums(rows[0], rows[1], bytes(bits))


def _parts(comparison: Comparison) -> list[tuple[sql.Composable, int]]:
    """Return the conditions of the source's statements, and how many bytes each reads."""
    blocks = comparison.table.blocks
    if not comparison.table.in_blocks or comparison.source.newest:
        return [(TRUE, blocks * _BLOCK)]
    parts: list[tuple[sql.Composable, int]] = []
    for begin in range(0, max(blocks, 1), _SLICE):
        end = begin + _SLICE
        until = f" and ctid < '({end},0)'::tid" if end < blocks else ""  # the last has what is new
        where = sql.SQL(f"ctid >= '({begin},0)'::tid{until}")
        parts.append((where, (min(end, blocks) - begin) * _BLOCK))
    return parts


def _sums(
    connection: Connection,
    side: Side,
    settings: str,
    parts: Sequence[tuple[sql.Composable, int]],
    progress: Callable[[int, int], None] = lambda rows, size: None,
) -> dict[int, tuple[int, int]]:
    """Return bucket → count of its rows and sum of their hashes."""
    found: dict[int, tuple[int, int]] = {}
    rows = size = 0
    for where, part in parts:
        progress(rows, size)
        query = sql.SQL("select bucket, count(*), sum(hash)::text from ({}) r group by bucket")
        with connection.transaction():
            connection.execute(settings)
            for bucket, count, total in connection.execute(query.format(side.rows(where))):
                before = found.get(bucket, (0, 0))
                found[bucket] = before[0] + count, before[1] + int(total)
                rows += count
        size += part
    return found


def narrow(
    source: Connection,
    destination: Connection,
    comparison: Comparison,
    first: Sums,
    *,
    flight: sql.Composable = FALSE,
    young: sql.Composable = FALSE,
) -> dict[str, int]:
    """Find the rows that make buckets differ: leave them in ``DIFFERENCES``, return each kind's.

    Works in the running transactions of both; the temporary tables go with the destination's.
    ``flight`` is the condition for rows of the source that are in flight, ``young`` the one for
    rows of raw that the source may not have yet. Raises psycopg.Error.
    """
    at_source, in_raw = comparison.source, comparison.raw
    keys = COMMA.join(names(at_source.keys))
    fields = sql.SQL("{}, hash, in_flight").format(keys)
    destination.execute("set local work_mem = '64MB'")
    destination.execute(
        sql.SQL("create temp table {} on commit drop as select {} from ({}) r with no data").format(
            _KEYS, fields, in_raw.rows()
        )
    )
    query = sql.SQL("select {} from ({}) r").format(
        fields, at_source.rows(first.condition(at_source), flight=flight)
    )
    ahead = ReadAhead(lambda: copy_out(source, query, binary=False))
    try:
        pour(destination, sql.SQL("copy {} ({}) from stdin").format(_KEYS, fields), ahead)
    finally:
        ahead.stop(source)
    destination.execute(
        sql.SQL(
            "create temp table {differences} on commit drop as select {keys},"
            " case when bool_or(in_flight) then 'in flight' when sum(s) > sum(r) then 'missing'"
            " when sum(s) < sum(r) then 'extra' else 'different' end as kind,"
            " greatest(abs(sum(s) - sum(r)), 1) as rows"
            " from (select {fields}, 1 as s, 0 as r from {staged} union all"
            " select {fields}, 0, 1 from ({raw}) r) u"
            " group by {keys} having sum(s) <> sum(r)"
            " or sum(hash) filter (where s = 1) <> sum(hash) filter (where r = 1)"
        ).format(
            differences=DIFFERENCES,
            keys=keys,
            fields=fields,
            staged=_KEYS,
            raw=in_raw.rows(first.condition(in_raw), flight=young),
        )
    )
    destination.execute(sql.SQL("analyze {}").format(DIFFERENCES))
    counts = sql.SQL("select kind, sum(rows)::bigint from {} group by kind").format(DIFFERENCES)
    return dict.fromkeys(KINDS, 0) | dict(destination.execute(counts).fetchall())


def name(source: Connection, destination: Connection, comparison: Comparison) -> list[Difference]:
    """Return the first rows of each kind, with the columns that differ.

    To be called after ``narrow``, in its transactions.
    """
    keys = names(comparison.raw.keys)
    rows = destination.execute(
        sql.SQL(
            "select kind, {texts} from (select *, row_number() over (partition by kind"
            " order by {keys}) as place from {differences}) d where place <= %s order by place"
        ).format(
            texts=COMMA.join(sql.SQL("{}::text").format(one) for one in keys),
            keys=COMMA.join(keys),
            differences=DIFFERENCES,
        ),
        (TOLD,),
    ).fetchall()
    columns = [one.name for one in comparison.raw.columns]
    changed = [row[1:] for row in rows if row[0] == "different"]
    hashes: list[dict[tuple[str, ...], list[int]]] = [{}, {}]
    if changed and comparison.target.conflict_columns:
        hashes = [
            _hashes(source, comparison.source, changed),
            _hashes(destination, comparison.raw, changed),
        ]

    def differing(row: tuple[str, ...]) -> tuple[str, ...]:
        ours, theirs = (one.get(row, []) for one in hashes)
        pairs = zip(columns, ours, theirs, strict=False)
        return tuple(column for column, one, other in pairs if one != other)

    named = [one.name for one in comparison.raw.keys]
    return [
        Difference(kind, dict(zip(named, row, strict=True)), differing(tuple(row)))
        for kind, *row in sorted(rows, key=lambda one: KINDS.index(one[0]))
    ]


def _hashes(
    connection: Connection, side: Side, rows: Sequence[Sequence[str]]
) -> dict[tuple[str, ...], list[int]]:
    """Return the hashes of each column of these rows, by their keys."""
    values = names(side.keys)
    where = sql.SQL("({stored}) in (select {values} from unnest({lists}) as v ({keys}))").format(
        stored=COMMA.join(one.stored for one in side.keys),
        values=COMMA.join(
            sql.SQL("v.{}::{}").format(value, sql.SQL(one.type))
            for value, one in zip(values, side.keys, strict=True)
        ),
        lists=COMMA.join(
            sql.SQL("{}::text[]").format(sql.Literal(list(column)))
            for column in zip(*rows, strict=True)
        ),
        keys=COMMA.join(values),
    )
    found = connection.execute(
        sql.SQL("select {}, hashes from ({}) r").format(
            COMMA.join(sql.SQL("{}::text").format(value) for value in values),
            side.rows(where, each=True),
        )
    )
    return {tuple(row[:-1]): row[-1] for row in found}
