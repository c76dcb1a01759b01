"""Source against raw, by checksums that each server computes for itself.

A row's key is hashed into one of 65,536 buckets: the same one on both sides, whatever their
collations, and no index is needed. First each side counts its rows and adds up their hashes for
each bucket: one read of each table, at the same time, and few megabytes over the wire. Then keys
and hashes of the rows in buckets that differ are copied into a temporary table of the destination,
where each is found to be missing, extra or different. The loader's memory does not grow with
either.

The first read is made of short statements, each with a snapshot of its own. It may so take a bucket
for different that is not: the second read, of one snapshot, decides. And it may pass over a row
that changed while it ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

from psycopg import sql

from exporter.raw.sides import BUCKETS, COMMA, FALSE, TRUE, Comparison, Side, key_names
from exporter.wire import ReadAhead, cancel, copy_out, pour

NAMED = 100  # rows of each kind whose keys are listed
KINDS = ("missing", "extra", "different", "in flight")
DIFFERENCES = sql.Identifier("_exporter_differences")
_BLOCK = 8192  # bytes
_SLICE = 131_072  # blocks of the source that a statement reads: 1 GB
_KEYS = sql.Identifier("_exporter_keys")
# The planner expects as many buckets as keys, and would sort the table by them.
_PLAN = "set local enable_sort = off; set local work_mem = '64MB'"
_ONE_PROCESS = "; set local max_parallel_workers_per_gather = 0"


class Sums(NamedTuple):
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
    key: dict[str, str | None]
    columns: tuple[str, ...] = ()


def sums(
    comparison: Comparison, progress: Callable[[int, int], None] = lambda rows, size: None
) -> Sums:
    """Read both sides once, at the same time. Raises psycopg.Error.

    The source runs one statement at a time, in one process, of a gigabyte at most where its table
    can be read by ranges of blocks. ``progress`` gets the rows and bytes that it has read.
    """
    source, raw = comparison.source, comparison.raw
    with ThreadPoolExecutor(1) as other:
        reading = other.submit(_sums, source, _PLAN + _ONE_PROCESS, _parts(comparison), progress)
        try:
            in_raw = _sums(raw, _PLAN, [(TRUE, 0)], lambda rows, size: None)
            at_source = reading.result()
        except BaseException:
            while not reading.done():  # it may just be between two statements
                cancel(source.session)
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
    if not comparison.table.in_blocks or len(comparison.table.heaps) != 1:
        return [(TRUE, blocks * _BLOCK)]
    parts: list[tuple[sql.Composable, int]] = []
    for begin in range(0, max(blocks, 1), _SLICE):
        end = begin + _SLICE
        until = f" and ctid < '({end},0)'::tid" if end < blocks else ""  # the last has what is new
        where = sql.SQL(f"ctid >= '({begin},0)'::tid{until}")
        parts.append((where, (min(end, blocks) - begin) * _BLOCK))
    return parts


def _sums(
    side: Side,
    settings: str,
    parts: Sequence[tuple[sql.Composable, int]],
    progress: Callable[[int, int], None],
) -> dict[int, tuple[int, int]]:
    """Return bucket → count of its rows and sum of their hashes."""
    found: dict[int, tuple[int, int]] = {}
    rows = size = 0
    for where, part in parts:
        progress(rows, size)
        query = sql.SQL("select bucket, count(*), sum(hash)::text from ({}) r group by bucket")
        with side.session.transaction():
            side.session.execute(settings)
            for bucket, count, total in side.session.execute(query.format(side.rows(where))):
                before = found.get(bucket, (0, 0))
                found[bucket] = before[0] + count, before[1] + int(total)
                rows += count
        size += part
    return found


def classify(
    comparison: Comparison,
    first: Sums,
    *,
    in_flight: sql.Composable = FALSE,
    unreplicated: sql.Composable = FALSE,
) -> dict[str, int]:
    """Find the rows that make buckets differ: leave them in ``DIFFERENCES``, count each kind.

    Works in the running transactions of both; the temporary tables go with the destination's.
    ``in_flight`` is the condition for rows of the source that the next load lands,
    ``unreplicated`` the one for rows of raw that the source may not have yet. Raises psycopg.Error.
    """
    at_source, in_raw = comparison.source, comparison.raw
    destination = in_raw.session
    keys = COMMA.join(key_names(at_source.keys))
    fields = sql.SQL("{}, hash, in_flight").format(keys)
    destination.execute("set local work_mem = '64MB'")
    destination.execute(
        sql.SQL("create temp table {} on commit drop as select {} from ({}) r with no data").format(
            _KEYS, fields, in_raw.rows()
        )
    )
    query = sql.SQL("select {} from ({}) r").format(
        fields, at_source.rows(first.condition(at_source), in_flight=in_flight)
    )
    ahead = ReadAhead(lambda: copy_out(at_source.session, query, binary=False))
    try:
        pour(destination, sql.SQL("copy {} ({}) from stdin").format(_KEYS, fields), ahead)
    finally:
        ahead.stop(at_source.session)
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
            raw=in_raw.rows(first.condition(in_raw), in_flight=unreplicated),
        )
    )
    destination.execute(sql.SQL("analyze {}").format(DIFFERENCES))
    counts = sql.SQL("select kind, sum(rows)::bigint from {} group by kind").format(DIFFERENCES)
    return dict.fromkeys(KINDS, 0) | dict(destination.execute(counts).fetchall())


def differing_rows(comparison: Comparison) -> list[Difference]:
    """Return the first rows of each kind, with the columns that differ.

    To be called after ``classify``, in its transactions.
    """
    keys = key_names(comparison.raw.keys)
    rows = comparison.raw.session.execute(
        sql.SQL(
            "select kind, {texts} from (select *, row_number() over (partition by kind"
            " order by {keys}) as place from {differences}) d where place <= %s order by place"
        ).format(
            texts=COMMA.join(sql.SQL("{}::text").format(one) for one in keys),
            keys=COMMA.join(keys),
            differences=DIFFERENCES,
        ),
        (NAMED,),
    ).fetchall()
    changed = [row[1:] for row in rows if row[0] == "different"]
    if not comparison.target.conflict_columns:
        changed = []
    hashes = [_hashes(side, changed) for side in (comparison.source, comparison.raw) if changed]

    def columns(row: tuple[str, ...]) -> tuple[str, ...]:
        both = zip(comparison.raw.columns, *(one.get(row, []) for one in hashes), strict=False)
        return tuple(column.name for column, *pair in both if len(set(pair)) > 1)

    named = [one.name for one in comparison.raw.keys]
    return [
        Difference(kind, dict(zip(named, row, strict=True)), columns(tuple(row)))
        for kind, *row in sorted(rows, key=lambda one: KINDS.index(one[0]))
    ]


def _hashes(side: Side, rows: Sequence[Sequence[str]]) -> dict[tuple[str, ...], list[int]]:
    """Return the hashes of each column of these rows, by their keys."""
    values = key_names(side.keys)
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
    found = side.session.execute(
        sql.SQL("select {}, hashes from ({}) r").format(
            COMMA.join(sql.SQL("{}::text").format(value) for value in values),
            side.rows(where, each=True),
        )
    )
    return {tuple(row[:-1]): row[-1] for row in found}
