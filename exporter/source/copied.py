"""The copy that a table needs before its changes can be applied, and whether it needs one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from exporter.config import Definition
from exporter.errors import SourceError, UsageError
from exporter.source import publication, slots, standby
from exporter.source.blocks import select
from exporter.source.landed import position_of
from exporter.source.member import Member, Replayed, snapshot_of
from exporter.source.reader import Lands, Plan, Target, Wanted
from exporter.source.scan import ScanReader
from exporter.source.snapshot import TRUE
from exporter.source.table import Column, Table
from exporter.source.versions import OWN, own_columns
from exporter.state import Binding, Copied, Judgement, Position, Reading, State, Worth, judge
from exporter.state import slots as remembered
from exporter.state.slots import Slot
from exporter.wire import Connection
from exporter.wire.replication import lsn_number, lsn_text


class CopyReader(ScanReader):
    """Copies a table whose changes are to follow, once: a table that has its copy is left alone.

    The position that it leaves names the slot, and the snapshot: what is in it is not applied
    again. A copy is made anew where the table was written anew, or got or lost a partition: that
    sends no changes.

    A history gets of a copy what differs from its newest versions. A copy that does not end is not
    gone on with: all of its rows are of one moment.
    """

    way = "changes"

    def __init__(
        self, source: Connection, definition: Definition, slot: Slot | None = None
    ) -> None:
        """``slot``: the one that is going to be read, where that is not the one remembered."""
        super().__init__(source, definition)
        self._slot, self._foreseen = slot, slot is not None
        self._sent: str | None = None
        self._history = definition.destination.is_history

    @contextlib.contextmanager
    def opened(self, stored: State, destination: Connection | None) -> Iterator[Table]:
        """See ``Reader``."""
        with super().opened(stored, destination) as table:
            refuse_unfit(self._source, self._definition, self.table)
            if not self._foreseen and destination is not None and remembered.exist(destination):
                self._slot = remembered.of(destination, self.found)
            if self._slot:
                self._sent = publication.sent(self._source, self._slot.name, table.oid)
            if self._history:
                self.table = table._replace(computed=self._own())
            yield self.table

    def _look_within(self) -> None:
        """Find out what the snapshot shows, as ``snapshot_of`` takes it."""
        self._seen = self._visible()

    def _visible(self) -> str:
        if self.horizon.standby:
            if self._history:
                raise SourceError(
                    f"{self._declared.where}: {self._declared.variable} leads to a standby, where"
                    " the moment of a copy is not known, by which a history begins",
                    hint=f"{self._declared.variable}: the primary; or exporter.mode: upsert",
                )
            # The first is of just before the snapshot: what comes in between is in doubt.
            return Replayed(self.horizon.server.lsn or 0, standby.replayed(self._source)).text
        row = self._source.execute("select pg_current_snapshot()::text").fetchone()
        assert row is not None
        return str(row[0])

    def reading(self) -> Reading:
        """See ``Reader``."""
        reading = super().reading()
        if not self._history:
            return reading
        columns = {name: how for name, how in reading.columns.items() if name not in OWN}
        return reading._replace(columns=columns)

    def doubt(self, stored: State) -> Judgement:
        """See ``Reader``. Whether the table is copied was decided before."""
        return Judgement(Worth.ONWARD)

    def why_copy(self, stored: State, now: Binding, *, empty: bool) -> str:
        """Return why the table has to be copied before its changes are applied; "" if it has not.

        ``now`` is what a position would be bound to. Raises SourceError for a history of other
        keys.
        """
        if self._history and not empty:
            self._refuse_other_keys(stored)
        if stored.slot is None or stored.slot.until is None or stored.binding is None:
            return "its rows are copied, then its changes follow"
        before = of_slot(stored).binding or stored.binding
        judgement = judge(before, now, raw_is_empty=empty and stored.cursor is not None)
        if judgement.worth is not Worth.ONWARD:
            return judgement.reason
        return self.why_missed(stored)

    def why_missed(self, stored: State) -> str:
        """Return why the table may have missed changes; "" where it has not."""
        slot = stored.slot
        if slot is None:
            return ""
        if self._slot is None or slot.name != self._slot.name:
            return f"the slot {slot.name} is gone: everything is read once, and compared with raw"
        name = f"{self._declared.schema}.{self._declared.table}"
        if slot.sent != self._sent:
            return (
                f"{name} was not in the publication {slot.name} all the time, or that was altered:"
                " everything is read once, and compared with raw"
            )
        return self.why_files(stored)

    def why_files(self, stored: State) -> str:
        """Return why its files say that the table may have missed changes; "" where they do not."""
        slot = stored.slot
        if slot is None or slot.until is None:
            return ""
        name = f"{self._declared.schema}.{self._declared.table}"
        if self._is_another(slot):
            return (
                f"{name} was written anew, or has other partitions, which sends no changes:"
                " everything is read once, and compared with raw"
            )
        return ""

    def plan(
        self, stored: State, target: Target, wanted: Wanted, *, empty: bool, shared: bool = False
    ) -> Plan:
        """See ``Reader``."""
        if wanted.span:
            raise UsageError(
                f"{self._definition.where}: {self._key} is read by its changes, and has no cursor"
                " for --since and --until",
            )
        self.refuse_unkeyed(target)
        self._empty = empty
        self._current = stored
        plan = Plan(
            path="changes",
            stream=self._stream(target),
            order=(),
            begin=stored,
            horizon=self.horizon,
        )
        if self._follows(stored) and not wanted.full_refresh:
            self._finish = lambda: stored
            return plan
        if self._slot is None:
            raise SourceError(
                f"{self._key}: there is no slot yet that keeps the changes during the copy",
                hint=f"exporter load {self._key} makes it",
            )
        same = not empty and self._goes_on(stored)
        fresh = Copied(self._slot.name, self._seen, None, self.files(), self._sent)
        if same and stored.slot:
            fresh = stored.slot._replace(resumed=True)
        self._moment = self._moment._replace(slot=fresh)
        if self._is_first(stored, target, wanted, empty=empty):
            return self._first(plan, target, empty=empty)
        # Until the end of it is stored, rows that are newer than the position are no copy.
        self._current = stored._replace(slot=fresh._replace(snapshot=None))
        self._finish = lambda: self._complete(stored)
        query = select(self.table, plan.stream[:-1], TRUE)
        return plan._replace(
            path="full refresh",
            query=query,
            lands=Lands.WHOLE,
            rows=self.table.rows,
            max_deletes=100 if self._is_emptied(stored) else wanted.max_deletes,
        )

    def refuse_unkeyed(self, target: Target) -> None:
        """Raise SourceError where the source does not prove that the key tells rows apart."""
        if not target.keyed:
            keys = ", ".join(self._definition.destination.conflict_columns)
            raise SourceError(
                f"{self._declared.where}: changes need a key that is unique at the source and never"
                f" NULL, and {keys} has no unique index there, or may be NULL",
                hint="exporter.conflict_columns: the columns of the primary key",
            )

    def _is_emptied(self, stored: State) -> bool:
        """Whether it may be TRUNCATE, or a partition that is gone, that took rows of this table.

        They are changes as any other, and take as much as they take.
        """
        slot = stored.slot
        return bool(
            slot
            and self._slot
            and slot.name == self._slot.name
            and stored.binding
            and stored.binding.source.oid == self.table.oid
            and self._is_another(slot)
        )

    def _follows(self, stored: State) -> bool:
        bound = stored.binding
        if bound is None:
            return False
        now = Binding(self.found, bound.raw, self.reading())
        return not self.why_copy(stored, now, empty=False)

    def _goes_on(self, stored: State) -> bool:
        """Whether an unfinished copy of this very table has the slot of now behind it."""
        slot, files = stored.slot, self.files()
        return (
            stored.is_first
            and not self._history
            and slot is not None
            and self._slot is not None
            and slot.snapshot is not None
            and (slot.name, slot.files, slot.sent) == (self._slot.name, files, self._sent)
            and self._left_at(stored) is not None
        )

    def _is_first(self, stored: State, target: Target, wanted: Wanted, *, empty: bool) -> bool:
        if stored.is_first and not empty and not self._goes_on(stored):
            return False
        return super()._is_first(stored, target, wanted, empty=empty)

    def can_follow(self, stored: State, why_copy: str) -> bool:
        """Whether what is to be copied again gets its changes before that, so that none is missed.

        The versions that a history has not got yet are in them, and not in the copy.
        """
        slot = stored.slot
        if not self._history or slot is None or self._slot is None or slot.name != self._slot.name:
            return False
        return why_copy != "" and why_copy == self.why_files(stored)

    def followed(self, stored: State, lsn: str, *, rows: bool, is_to_copy: bool) -> State:
        """Return the position when all changes before this one in the WAL have landed.

        One that ``is_to_copy`` stays so: it keeps the files that it was copied from.
        """
        assert stored.slot is not None
        slot, until = stored.slot, stored.slot.until or "0/0"
        if not is_to_copy:
            slot = slot._replace(files=self.files())
        if lsn_number(lsn) >= lsn_number(until):  # no change can be in the copy any more
            slot = slot._replace(snapshot=None, resumed=False)
        cursor = Position(lsn) if rows else None
        return self._moment._replace(cursor=cursor, slot=slot, exported_at=stored.exported_at)

    def member(self, stored: State, columns: Sequence[Column]) -> Member:
        """Return what the changes of the table are gathered by, for raw's columns."""
        assert stored.slot is not None  # else it would be copied first
        keys = self._definition.destination.conflict_columns
        names = [None if one.expression == "null" else one.name for one in columns]
        known = frozenset(column.name for column in self.table.columns)
        snapshot, resumed = snapshot_of(stored.slot.snapshot), stored.slot.resumed
        if not self._history:
            return Member(self._key, self.table.oid, tuple(names), keys, known, snapshot, resumed)
        # What the source has lost meanwhile, earlier changes still have.
        names = [one.name for one in columns if one.name not in OWN]
        known |= frozenset(filter(None, names))
        near = self.found.next_xid
        return Member(self._key, self.table.oid, tuple(names), keys, known, snapshot, near=near)

    def files(self) -> dict[str, str]:
        """Return the files of its heaps: a table that is written anew has others."""
        return {str(heap.oid): heap.file for heap in self.table.heaps}

    def adopted(self, stored: State) -> State:
        """See ``Reader``. A slot is not moved: the table is copied again."""
        return stored._replace(slot=None, snapshot_xmin=None, source=None)

    def _complete(self, current: State) -> State:
        slot = self._moment.slot
        assert slot is not None
        end, until = self._end()
        keeps = self._history or self._definition.destination.deletes == "mark"
        rows = (keeps and not self._empty) or self._any(self._declared.name)
        return self._moment._replace(
            cursor=Position(end) if rows else None, slot=slot._replace(until=until)
        )

    def _end(self) -> tuple[str, str]:
        """Return where the WAL is, and the position behind which no change is in the copy."""
        if self.horizon.standby:
            end = standby.replayed(self._source)
            return lsn_text(end), lsn_text(end + 1)  # the record behind it may be seen already
        row = self._source.execute("select pg_current_wal_insert_lsn()::text").fetchone()
        assert row is not None
        return row[0], row[0]

    def _reached(self, last: bytes) -> State:
        return self._current

    def _is_another(self, slot: Copied) -> bool:
        """Whether a heap was written anew, is gone, or has come with rows."""
        now, before = self.files(), slot.files
        changed = [oid for oid, file in before.items() if now.get(oid) != file]
        if changed and not self._were_emptied(changed, slot.emptied_by):
            return True
        return any(self._any_in(heap) for heap in self.table.heaps if str(heap.oid) not in before)

    def _were_emptied(self, heaps: Sequence[str], emptied_by: int | None) -> bool:
        """Whether these have the files that a TRUNCATE gave them, which has landed.

        Its transaction may have altered a column as well, which writes the table anew once more.
        """
        if emptied_by is None:
            return False
        row = self._source.execute(
            "select count(*) from pg_class c where oid = any(%s::oid[]) and xmin::text = %s"
            " and not exists (select from pg_attribute a where attrelid = c.oid"
            " and a.xmin = c.xmin)",
            ([*heaps], str(emptied_by % 2**32)),
        ).fetchone()
        return row == (len(heaps),)

    def _own(self) -> tuple[Column, ...]:
        """Return a history's own columns: its copy stands just before what the slot sends next."""
        slot = self._slot or Slot("")
        place = position_of(slot.last_commit) or lsn_number(slot.lsn or "0/1")
        return own_columns(lsn_text(place - 1), self.horizon.clock)

    def _refuse_other_keys(self, stored: State) -> None:
        before = stored.binding.reading.keys if stored.binding else ()
        now = self._definition.destination.conflict_columns
        if before and before != now:
            raw = self._definition.destination
            raise SourceError(
                f"{self._declared.where}: the versions in {raw} are those of"
                f" {', '.join(before)}, and conflict_columns is {', '.join(now)}",
                hint=f"alter table {raw} rename to …: then exporter load {self._key} begins a new"
                " history",
            )


def of_slot(stored: State) -> State:
    """Return the position of a table without what is known of its slot, which is looked after."""
    if stored.binding is None or stored.slot is None or stored.slot.snapshot is not None:
        return stored
    source = stored.binding.source._replace(timeline=None, lsn=None, next_xid=None)
    return stored._replace(binding=stored.binding._replace(source=source))


def refuse_unfit(source: Connection, definition: Definition, table: Table) -> None:
    """Raise SourceError for a table that cannot be published, or whose rows lose their key."""
    declared = definition.source
    name, where = f"{declared.schema}.{declared.table}", declared.where
    if table.kind not in ("r", "p") or (table.kind == "r" and table.partitions):
        raise SourceError(
            f"{where}: {name} is no plain or partitioned table: it has no changes of its own",
            hint="exporter.source.read: scan",
        )
    computed = [
        one
        for (one,) in source.execute(
            "select attname from pg_attribute where attrelid = %s and attgenerated <> ''"
            " and not attisdropped",
            (table.oid,),
        )
        if declared.lands(one)
    ]
    if computed:
        raise SourceError(
            f"{where}: {name} computes {', '.join(computed)}, which changes do not have",
            hint=f"exporter.source.exclude: [{', '.join(computed)}]",
        )
    keys = frozenset(definition.destination.conflict_columns)
    for one in slots.identities(source, [heap.oid for heap in table.heaps] or [table.oid]):
        if not one.logged:
            raise SourceError(
                f"{where}: {one.name} is unlogged: it has no changes",
                hint=f"alter table {one.name} set logged",
            )
        if one.kind != "f" and not keys <= one.columns:
            raise SourceError(
                f"{where}: the replica identity of {one.name} does not have"
                f" {', '.join(sorted(keys - one.columns))}: which row a change is of could not"
                " be told",
                hint=f"alter table {one.name} replica identity using index <a unique index on"
                f" {', '.join(sorted(keys))}>; or replica identity full",
            )
