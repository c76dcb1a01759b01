"""``Reader``: all that a load knows of a source.

A way of reading is a class with these methods. It plans from a stored position, yields batches of
rows, and says which position each of them reaches. ``load/`` lands the batches and stores the
positions; it does not ask how they were found.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from enum import Enum
from typing import NamedTuple, Protocol

from psycopg import sql

from exporter.source.blocks import STAGED, Blocks
from exporter.source.snapshot import Horizon
from exporter.source.table import BLOCK, Column, Table
from exporter.source.window import Span
from exporter.state import Bound, Judgement, Reading, Source, State
from exporter.wire import Block, Connection

# In the stream alone: whether a row lies beyond the stored position.
BEYOND = Column("_exporter_beyond", "boolean", "boolean", "boolean", True, True)


class Wanted(NamedTuple):
    """What the command line asks of a read; neither: what is new."""

    full_refresh: bool = False
    span: Span | None = None
    max_deletes: float = 100  # percent of raw that a full refresh may remove
    sweep: bool = False  # also what the cursor has passed over, in the whole table

    def words(self) -> list[str]:
        """Return the options that ask for it."""
        words = ["--full-refresh"] if self.full_refresh else []
        words += ["--sweep"] if self.sweep else []
        if self.span:
            words += ["--since", self.span.since] if self.span.since else []
            words += ["--until", self.span.until] if self.span.until else []
        return words


NEW = Wanted()


class Lands(Enum):
    """How the rows of a plan stand to those that raw has."""

    ANY = "any"  # raw may have them already, as they are or otherwise
    BEYOND = "beyond"  # each says whether it is beyond the stored position
    WHOLE = "whole"  # they are the table: what raw has beside them is gone at the source


class Target(Protocol):
    """What a reader has to know of the raw table."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that are read."""

    @property
    def keyed(self) -> bool:
        """Whether a key that is unique at the source, too, tells its rows apart."""

    @property
    def binary(self) -> bool:
        """Whether rows may go into it in COPY's binary format, with their stamp."""


class Plan(NamedTuple):
    """What will be read and why. Nothing of it has been read yet.

    First come the ranges of ``blocks``, which several sessions may read side by side; then the
    ``query``, in the reader's own session, and what the sweep looks at, ``swept`` blocks. The rows
    have the columns of ``stream``. Of two versions
    of a row the newer one is greater by ``order``. ``begin`` is the position before the first row.
    A position's watermark must not pass the ``bound``.
    """

    path: str  # scan, increment, first load, full refresh or backfill
    stream: tuple[Column, ...]
    order: tuple[Column, ...]
    begin: State
    blocks: Blocks | None = None
    query: sql.Composable | None = None
    lands: Lands = Lands.ANY
    bound: Bound | None = None
    rows: float | None = None  # an estimate; None, or below 0, where there is none
    horizon: Horizon | None = None
    max_deletes: float = 100  # percent of raw that the rows of a whole table may remove
    unseen: str = ""  # what other transactions cannot be seen, for a person to know
    size: int | None = None  # bytes that the source reads in any case: None where an index serves
    swept: int = 0
    passed_over: str = ""  # why the cursor may pass over rows, and what to do about it
    reconciles: bool = False  # rows that are gone at the source are looked for afterwards
    versions: bool = False  # rows may share a key: the newest by ``order``, else the last, counts
    call: str = ""  # of a function, which has no query, for people

    @property
    def goes_on(self) -> bool:
        """Whether a load that does not end leaves a position from which another one goes on."""
        return self.path in ("first load", "increment")

    def how(self) -> str:
        """Return which way the rows take, for people."""
        how = self.blocks.how if self.blocks else STAGED
        how += ", in one transaction" if self.lands is Lands.WHOLE else ""
        how += f", reads {megabytes(self.size)}" if self.size is not None else ""
        return how + (f", sweeps {megabytes(self.swept * BLOCK)}" if self.swept else "")


def megabytes(size: int) -> str:
    """Return a size in words for people."""
    return f"{size / 1024**2:,.0f} MB" if size >= 1024**2 else f"{size / 1024:,.0f} kB"


class Rows(NamedTuple):
    """Rows of one definition, in COPY's text format, and the keys of rows that are gone.

    Those that are ``swept`` and not in raw are what the cursor has passed over.
    """

    key: str
    present: Iterator[Block]
    gone: Iterable[Block] = ()
    swept: bool = False


class Batch(NamedTuple):
    """What lands in one transaction: ``parts`` one after the other, then the position.

    ``reaches`` gives the position to store; it may be called when the parts have been read. The
    columns of ``stream`` come from here on, where that is given, and ``table`` is as raw has to be.
    """

    parts: Iterable[Rows]
    reaches: Callable[[], State]
    table: Table | None = None
    stream: tuple[Column, ...] = ()


class Reader(Protocol):
    """One way of reading a source table onward from a position. On one session, for one load."""

    @property
    def horizon(self) -> Horizon | None:
        """What was open at the source when it was opened; None where that cannot be asked."""

    @property
    def found(self) -> Source:
        """What a position is bound to, as it was found."""

    def opened(
        self, stored: State, destination: Connection | None
    ) -> AbstractContextManager[Table]:
        """Look at the source from the stored position on; give the table as it stands.

        What is planned and read within this context is of one snapshot. The destination, where
        rows are to land, tells which types it knows. Raises SourceError.
        """

    def reading(self) -> Reading:
        """Return what of the definition gives a position its meaning."""

    def doubt(self, stored: State) -> Judgement:
        """Return what the position is worth by what the table's rows show."""

    def begun(self, stored: State, wanted: Wanted) -> Table:
        """Begin to read from this position; return the table with the columns of its first rows.

        A rehearsal does without it. Raises SourceError.
        """

    def plan(
        self, stored: State, target: Target, wanted: Wanted, *, empty: bool, shared: bool = False
    ) -> Plan:
        """Decide what to read for a raw table that is ``empty`` or not.

        ``shared``: sessions beside the reader's own may read blocks. Raises SourceError, and
        UsageError for what this way of reading does not have.
        """

    def batches(self, plan: Plan) -> Generator[Batch]:
        """Yield what the plan's query gives. A batch has to be read before the next one comes."""

    def finished(self) -> State:
        """Return the position when all of the plan has landed."""

    def in_flight(self, stored: State) -> sql.Composable:
        """Return the condition for rows of the source that the next load is going to land."""

    def adopted(self, stored: State) -> State:
        """Return a position for a source that is another one, as a planned move makes it."""

    def confirm(self, position: State) -> None:
        """Take note that the destination has this position on disk: the source may forget."""
