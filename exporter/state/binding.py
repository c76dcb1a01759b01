"""What a stored position is bound to, and what it is worth when that is no longer so.

A position means something only for the very tables that it describes. Here are plain values, and
the decision; who asks the servers for them is above.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple


class Source(NamedTuple):
    """The source as one load sees it. What it cannot be asked for is None; a function has none.

    ``partitions`` are those of a partitioned table, by oid. ``lsn`` and ``next_xid`` grow within
    one timeline; ``clock`` is the server's.
    """

    cluster: str | None
    database: str
    timeline: int | None
    lsn: int | None
    next_xid: int | None
    standby: bool
    clock: str
    table: str
    oid: int
    partitions: tuple[int, ...]


class Reading(NamedTuple):
    """What of the definition gives a position its meaning."""

    way: str
    cursor: str | None
    id_field: str | None
    nulls: str
    columns: dict[str, str]  # those that land, each with its expression; without one, ""
    keys: tuple[str, ...]


class Binding(NamedTuple):
    """What a position describes: the source, the raw table by its oid, and how it is read."""

    source: Source
    raw: int
    reading: Reading

    def as_json(self) -> dict[str, Any]:
        """Return what is stored."""
        return {
            "source": self.source._asdict(),
            "raw": self.raw,
            "reading": self.reading._asdict(),
        }

    @classmethod
    def of_json(cls, stored: dict[str, Any]) -> Binding:
        """Return what was stored."""
        source, reading = stored["source"], stored["reading"]
        source["partitions"] = tuple(source["partitions"])
        reading["keys"] = tuple(reading["keys"])
        return cls(Source(**source), stored["raw"], Reading(**reading))


class Worth(Enum):
    """What a load makes of a stored position."""

    ONWARD = "onward"  # it describes these tables: the load goes on from it
    SWEEP = "sweep"  # it does, but rows may lie behind it: what changed since is read by xmin
    REREAD = "reread"  # it does not: everything is read once, and upserted
    ANEW = "anew"  # raw has nothing of it: the load begins anew


class Judgement(NamedTuple):
    """The worth of a position, and why; ``reason`` is empty where the load just goes on."""

    worth: Worth
    reason: str = ""


def is_elsewhere(stored: Source, now: Source) -> bool:
    """Tell whether the source is another database, or in another cluster."""
    clusters = stored.cluster and now.cluster and stored.cluster != now.cluster
    databases = stored.database and now.database and stored.database != now.database
    return bool(clusters or databases)


def judge(stored: Binding, now: Binding, *, raw_is_empty: bool) -> Judgement:
    """Return what a position is worth that is bound to ``stored``, where ``now`` is found.

    The source is the same database: see ``is_elsewhere``.
    """
    reread = _why_reread(stored, now)
    if raw_is_empty:
        nothing = "raw has no row of what had landed"
        if now.reading.keys or stored.raw != now.raw:
            return Judgement(Worth.ANEW, f"{nothing}: the load begins anew")
        if not reread:  # somebody may empty a log after use
            return Judgement(Worth.ONWARD, f"{nothing}: a log goes on behind its position")
    if reread:
        return Judgement(Worth.REREAD, f"{reread}: everything is read once, and compared with raw")
    if now.reading.cursor and now.source.clock < stored.source.clock:
        back = f"from {stored.source.clock} to {now.source.clock}"
        return Judgement(
            Worth.SWEEP, f"the source's clock went back {back}: what changed since is read by xmin"
        )
    return Judgement(Worth.ONWARD)


def _why_reread(stored: Binding, now: Binding) -> str:
    before, source = stored.source, now.source
    if stored.raw != now.raw:
        return "raw is another table than the one that the position describes"
    if before.oid != source.oid:
        return f"{source.table} is another table than the one that was read before"
    if before.timeline and source.timeline and before.timeline != source.timeline:
        return f"the source is on timeline {source.timeline}, and was on {before.timeline}"
    # A standby may lag behind the server that was read before: what it lacks is yet to come.
    if not source.standby and (
        _behind(source.lsn, before.lsn) or _behind(source.next_xid, before.next_xid)
    ):
        return "the source ends before the position that was read: it has lost commits"
    for name in ("way", "cursor", "id_field", "nulls", "keys"):
        old, new_value = getattr(stored.reading, name), getattr(now.reading, name)
        if old != new_value:
            return f"{_NAMES[name]} was {_text(old)} and is {_text(new_value)}"
    return ""


_NAMES = {
    "way": "source.read",
    "cursor": "source.cursor.field",
    "id_field": "source.cursor.id_field",
    "nulls": "source.cursor.nulls",
    "keys": "conflict_columns",
}


def _text(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value or "not set")


def _behind(now: int | None, before: int | None) -> bool:
    return now is not None and before is not None and now < before


def changed_columns(stored: Reading, now: Reading) -> list[str]:
    """Return the columns that land now and did not, or that another expression computes."""
    return [name for name, how in now.columns.items() if stored.columns.get(name) != how]
