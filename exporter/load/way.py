"""Out of others' way: who waits for a lock of ours at the source, and whom we wait for.

A thread looks once a second, where a load takes longer than a moment, on a session of its own on
each database. It ends the source's session of a load that somebody waits for, or that has to wait
at the destination: the server lets go of its locks at once, and the load begins again behind who
waited.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psycopg
from psycopg.pq import TransactionStatus

from exporter.errors import DatabaseError, ExporterError, LockedError
from exporter.terminal import Say, signals
from exporter.wire import Connection, connect, own_sessions

_FIRST = 1.5  # seconds before the first look: most loads take less
_LOOK = 1.0  # seconds between looks
_TELL = 4.5  # seconds after which a wait that was seen is told: it is then 5 to 6 seconds old
_MOST_LOST = 600.0  # seconds of work that a load which begins anew gives up for others
_REST = 10.0  # seconds without a look where a server gave no session, or ended it
_PATIENCE = 5.0  # seconds for the lock of the session that was given up
_ANY = "select exists (select from pg_locks where not granted)"  # costs next to nothing
# Only a mode that conflicts with what a reader holds counts: a session in the queue before another
# is not in its way. A lock to extend a file is waited for, too, where sessions fill one table.
_WAITS = """
with lock as materialized (select * from pg_locks), wait as (
    select true as behind, h.pid as ours, w.pid as other, w.locktype, w.relation, true as holds
    from lock w join lock h on h.granted and h.pid = any(%(ours)s) and h.locktype = w.locktype
        and (h.virtualxid = w.virtualxid or w.mode = 'AccessExclusiveLock'
            and w.locktype = 'relation' and (h.database, h.relation) = (w.database, w.relation))
    where not w.granted and w.pid <> all(%(ours)s)
    union all
    select false, w.pid, b.pid, w.locktype, w.relation, exists (
        select from lock h where h.granted and h.pid = b.pid
        and (h.locktype, h.relation) is not distinct from (w.locktype, w.relation))
    from lock w cross join unnest(pg_blocking_pids(w.pid)) b (pid)
    where not w.granted and w.pid = any(%(ours)s) and b.pid <> all(%(ours)s)
        and w.locktype not in ('extend', 'page')
)
select distinct on (behind, ours) behind, ours, other, coalesce(a.application_name, ''), holds,
    case when relation is not null then 'a lock on ' || relation::regclass::text
        when locktype = 'virtualxid' then 'the end of its transaction'
        when locktype = 'transactionid' then 'a row'
        else 'a lock (' || locktype || ')' end,
    (select query_start::timestamptz(0)::text from pg_stat_activity o where o.pid = ours)
from wait left join pg_stat_activity a on a.pid = other
where a.backend_type is distinct from 'autovacuum worker'
order by behind, ours, holds desc, other
"""
_TERMINATE = """
select count(pg_terminate_backend(a.pid)) from pg_stat_activity a
where (a.pid, a.backend_start) in (select * from unnest(%s::int[], %s::timestamptz[]))
"""


class MakeWay(Exception):  # noqa: N818  no error: the load goes on
    """The load gave up its session at the source, and with it so many seconds of work."""

    def __init__(self, lost: float) -> None:
        super().__init__("the load gave up its session at the source")
        self.lost = lost


class _Wait(NamedTuple):
    """One of our sessions and one of somebody else's, of which one waits for the other."""

    behind: bool  # the other one waits for ours
    ours: int
    other: int
    name: str
    holds: bool
    what: str
    since: str | None

    @property
    def who(self) -> str:
        """The other session."""
        if not self.other:
            return "a prepared transaction"
        return f"session {self.other} ({self.name or '?'})"


class Watched:
    """The two sessions of a load, or of a thread that helps with it."""

    def __init__(
        self,
        key: str,
        source: Connection | None,
        destination: Connection,
        say: Say | None,
        lost: float,
    ) -> None:
        self.key = key
        self.source = source
        self.destination = destination
        self.began = time.monotonic()
        self.ended = False  # its session on the source was
        self._say = say
        self.lost_before = lost
        self._anew: float | None = None
        self._told: set[tuple[str, int]] = set()

    @property
    def sessions(self) -> list[Connection]:
        """Those that there are: not every way of reading has one at the source."""
        return [one for one in (self.source, self.destination) if one is not None]

    def begins_anew(self) -> None:
        """Take note that what follows would have to be done again from its start."""
        self._anew = time.monotonic()

    @property
    def lost(self) -> float:
        """How many seconds of work are lost if it is ended now, those of earlier times included."""
        return self.lost_before + (time.monotonic() - self._anew if self._anew is not None else 0)

    @property
    def stays(self) -> bool:
        """Whether it has made way so often that it would never end."""
        return self._anew is not None and self.lost_before > _MOST_LOST

    def tell(self, what: str, wait: _Wait, text: str, level: str = "warning") -> None:
        """Tell a thing about the other session once."""
        if self._say and (what, wait.other) not in self._told:
            self._told.add((what, wait.other))
            self._say(text, level, event=what, session=wait.other)


class _Watch:
    """The thread that looks, for all loads of this process."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._loads: set[Watched] = set()
        self._thread: threading.Thread | None = None
        self._sessions: dict[str, Connection] = {}
        self._seen: dict[tuple[str, int, str], float] = {}  # waits of ours, since when

    def add(self, one: Watched) -> None:
        """Look after a load."""
        with self._change:
            self._loads.add(one)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def remove(self, one: Watched) -> None:
        """Leave a load alone; with the last one the sessions end."""
        with self._change:
            self._loads.discard(one)
            if self._sessions and not self._loads:
                self._change.notify_all()

    def _run(self) -> None:
        due = time.monotonic() + _FIRST
        while True:
            with self._change:
                while self._loads and (left := due - time.monotonic()) > 0:
                    self._change.wait(left)
                if not self._loads:
                    self._close()
                    self._thread = None
                    return
                begun = time.monotonic() - _FIRST
                long = [one for one in self._loads if one.began <= begun]
            due = time.monotonic() + _LOOK
            try:
                self._look(long)
            except (
                psycopg.Error,
                ExporterError,
                OSError,
            ):  # a load that cannot be looked after goes on
                self._close()
                due += _REST

    def _look(self, loads: list[Watched]) -> None:
        seen = {}
        for name in sorted({it.variable for one in loads for it in one.sessions}):
            session = self._session(name)
            if session.execute(_ANY).fetchone() == (False,):
                continue
            ours, _ = own_sessions(session)
            for wait in map(_Wait._make, session.execute(_WAITS, {"ours": ours}).fetchall()):
                known = (name, wait.ours, wait.what)
                if not wait.behind:
                    seen[known] = self._seen.get(known, time.monotonic())
                for one in loads:
                    self._weigh(session, one, wait, time.monotonic() - seen.get(known, 0))
        self._seen = seen

    def _weigh(self, session: Connection, one: Watched, wait: _Wait, seconds: float) -> None:
        """Do what a wait asks of a load, if it is one of its sessions'."""
        here = one.source is not None and session.variable == one.source.variable
        at_source = here and _is(one.source, wait.ours)
        if wait.behind:
            if at_source:
                self._ask(one, wait)
            return
        at_destination = not at_source and _is(one.destination, wait.ours)
        lets_go = not one.stays and _in_transaction(one.source)
        if at_destination and lets_go and seconds >= _LOOK / 2:
            self._end_source(one, wait, f"lets go of the source while it waits for {wait.who}")
        if (at_source or at_destination) and seconds >= _TELL:
            where = "source" if at_source else "destination"
            has = "holds" if wait.holds else "was first to ask for"
            since = f", since {wait.since}" if wait.since else ""
            text = f"waits at the {where} for {wait.who} that {has} {wait.what}{since}"
            one.tell("waits", wait, text)

    def _ask(self, one: Watched, wait: _Wait) -> None:
        """Have a load make way, unless it would never end."""
        if one.stays:
            text = f"does not make way for {wait.who}, which waits for {wait.what}: it would have"
            text += f" to begin anew, and has lost {one.lost_before / 60:.0f} minutes that way"
            one.tell("stays", wait, text)
            return
        text = f"makes way for {wait.who}, which waits for {wait.what}; goes on after it"
        self._end_source(one, wait, text)

    def _end_source(self, one: Watched, wait: _Wait, why: str) -> None:
        """End what a load, and who helps with it, have at the source. Raises psycopg.Error.

        From there: a cancellation does not reach a process whose client does not read.
        """
        with self._change:  # what has ended meanwhile has given its sessions to the next load
            if one.ended or one not in self._loads:
                return
            same = [it for it in self._loads if it.key == one.key]
            backends = [it.source.backend for it in same if it.source and it.source.backend]
            for it in same:
                it.ended = True
            pids, began = [pid for pid, _ in backends], [began for _, began in backends]
            assert one.source is not None  # else nobody could wait for it
            self._session(one.source.variable).execute(_TERMINATE, (pids, began))
        for it in same:
            it.tell("way", wait, why, "info")

    def _session(self, name: str) -> Connection:
        """Return the session on a database. Raises DatabaseError."""
        if name not in self._sessions:
            self._sessions[name] = connect(name, "dbt-exporter, looks for who waits")
        return self._sessions[name]

    def _close(self) -> None:
        while self._sessions:
            self._sessions.popitem()[1].close()


_watch = _Watch()


@contextlib.contextmanager
def watched(
    key: str,
    source: Connection | None,
    destination: Connection,
    say: Say | None = None,
    lost: float = 0.0,
    *,
    looks: bool = True,
) -> Iterator[Watched]:
    """Have a load make way for others. Raises MakeWay in place of what its ended session raises.

    ``say`` tells whom it waits for, and ``lost`` is what it has given up before. Not so where
    nobody ``looks``, since that takes another session.
    """
    one = Watched(key, source, destination, say, lost)
    if looks:
        _watch.add(one)
    try:
        yield one
    except (psycopg.Error, DatabaseError):
        if one.ended:
            raise MakeWay(one.lost) from None
        raise
    finally:
        _watch.remove(one)


def at_work(most: int | None) -> int | None:
    """Return how many of so many sessions may load: from three on, one looks for who waits."""
    return most - 1 if most is not None and most > 2 else most


def making_way(attempt: Callable[[float], None]) -> None:
    """Call ``attempt``, and again as often as it makes way; it gets the seconds lost so far."""
    lost, until = 0.0, 0.0
    while True:
        try:
            attempt(lost)
            return
        except MakeWay as why:
            lost, until = why.lost, time.monotonic() + _PATIENCE
        except LockedError:
            if time.monotonic() > until:
                raise
            signals.pause(0.1)  # the server has not noticed yet that our last session is gone


def _is(session: Connection | None, pid: int) -> bool:
    return session is not None and session.backend is not None and session.backend[0] == pid


def _in_transaction(session: Connection | None) -> bool:
    status = session.pgconn.transaction_status if session else TransactionStatus.IDLE
    return status not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN)
