"""What is told while a command runs: lines, JSON objects or progress bars, on standard error.

Safe to call from several threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Protocol

import click

from exporter.errors import ExporterError, StoppedError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LEVELS = ("debug", "info", "warning", "error")
_EVERY = 5.0  # seconds from one line about a load's progress to the next
_BAR_AFTER = 0.5  # seconds of work before a bar is worth showing
_BAR_EVERY = 0.1

# How far a load is: rows and bytes read since it began, and all its rows where that is estimated.
Progress = Callable[[int, int, "float | None"], None]


class Say(Protocol):
    """Tells something of one definition; the values go into the JSON object."""

    def __call__(
        self, text: str, level: str = "warning", event: str = "notice", **values: object
    ) -> None:
        """Tell it. A warning is what a person should look at."""


class Ended(Protocol):
    """What a command came to for one definition; its text is for people."""

    key: str
    error: ExporterError | None

    def as_dict(self) -> dict[str, object]:
        """Return what the log in JSON tells."""

    def as_json(self) -> str:
        """Return the one-line object of ``--json``."""


@dataclass
class _Pace:
    """How fast one load goes. ``due``: when to tell it again."""

    began: float
    due: float
    rows: int = 0
    size: int = 0
    total: float | None = None
    bar: TaskID | None = None

    def values(self, now: float) -> dict[str, object]:
        seconds = max(now - self.began, 0.001)
        left = None
        if self.total and 0 < self.rows <= self.total:
            left = round((self.total - self.rows) * seconds / self.rows)
        return {
            "rows": self.rows,
            "bytes": self.size,
            "bytes_per_second": round(self.size / seconds),
            "rows_expected": round(self.total) if self.total else None,
            "seconds_left": left,
        }

    def text(self, now: float) -> str:
        if not self.rows:
            return "reading …"
        values = self.values(now)
        speed = f"{self.rows:,} rows, {self.size / (now - self.began + 0.001) / 1e6:,.1f} MB/s"
        left = values["seconds_left"]
        return speed if left is None else f"{speed}, {timedelta(seconds=int(str(left)))} left"


class Console:
    """Where a command tells what happens. Only ``level`` and what is graver is told."""

    def __init__(self, *, as_json: bool = False, level: str = "info") -> None:
        self._json = as_json
        self._threshold = LEVELS.index(level)
        terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        self._with_bars = terminal and not as_json and self._tells("info")
        self._paces: dict[str, _Pace] = {}
        self._bars: RichProgress | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()

    def say(
        self,
        text: str,
        level: str = "info",
        *,
        key: str | None = None,
        event: str = "message",
        **values: object,
    ) -> None:
        """Tell something, of the definition ``key`` if there is one."""
        line = f"{key}: {text}" if key else text
        self._tell(f"exporter: {line}", level, event, key, text, values)

    def error(self, error: ExporterError) -> None:
        """Tell an error."""
        values = {"kind": type(error).__name__, "hint": error.hint}
        self._tell(self._line_of(error), "error", "error", None, error.message, values)

    def progress(self, key: str, rows: int, size: int, total: float | None) -> None:
        """Tell how far the load of a definition is. Cheap: it may be called at every block."""
        now = time.monotonic()
        pace = self._paces.get(key) or self._begin(key, now)
        pace.rows, pace.size, pace.total = rows, size, total
        if now < pace.due:
            return
        with self._lock:
            pace.due = now + (_BAR_EVERY if self._with_bars else _EVERY)
            if not self._with_bars:
                values = pace.values(now)
                text = pace.text(now)
                self._tell(f"exporter: {key}: {text}", "info", "progress", key, text, values)
            elif self._bars:
                self._draw(self._bars, key, pace)

    def ended(self, result: Ended, *, as_json: bool = False) -> None:
        """Tell how it ended: the result on standard output, an error on standard error."""
        with self._lock:
            pace = self._paces.pop(result.key, None)
            if self._bars and pace and pace.bar is not None:
                self._bars.remove_task(pace.bar)
            if not self._paces:
                self.close()
        if as_json:
            self._print(result.as_json(), err=False)
        if self._json or result.error:
            level = "error" if result.error else "info"
            line = self._line_of(result.error) if result.error else ""
            text = str(result.error or result)
            self._tell(line, level, "ended", result.key, text, result.as_dict())
        elif self._tells("info"):
            self._print(str(result), err=as_json)

    def close(self) -> None:
        """Take the bars off the terminal."""
        with self._lock:
            if self._timer:
                self._timer.cancel()
            if self._bars:
                self._bars.stop()
            self._timer = self._bars = None

    @staticmethod
    def _line_of(error: ExporterError) -> str:
        begun = isinstance(error, StoppedError) and sys.stderr.isatty()  # the line that shows ^C
        return f"{chr(10) if begun else ''}exporter: {error}"

    def _tells(self, level: str) -> bool:
        return LEVELS.index(level) >= self._threshold

    def _tell(
        self,
        line: str,
        level: str,
        event: str,
        key: str | None,
        message: str,
        values: Mapping[str, object],
    ) -> None:
        if not self._tells(level):
            return
        if self._json:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            entry = {"time": now, "level": level, "event": event, "key": key, "message": message}
            line = json.dumps({**entry, **values, **entry}, default=str)  # in this order
        self._print(line, err=True)

    def _print(self, line: str, *, err: bool) -> None:
        with self._lock, self._bars_away():
            try:
                click.echo(line, err=err)
            except BrokenPipeError:  # a reader that went away is no reason to stop a load
                stream = sys.stderr if err else sys.stdout
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    # -- bars: rich is imported when the first one is shown

    def _begin(self, key: str, now: float) -> _Pace:
        with self._lock:
            pace = _Pace(now, now + (_BAR_EVERY if self._with_bars else _EVERY))
            self._paces[key] = pace
            if self._bars:
                self._draw(self._bars, key, pace)
            elif self._with_bars and self._timer is None:
                # A timer, since the source may think for long before the first row comes.
                self._timer = threading.Timer(_BAR_AFTER, self._show)
                self._timer.daemon = True
                self._timer.start()
            return pace

    def _show(self) -> None:
        from rich.console import Console as Terminal  # noqa: PLC0415  only for a bar
        from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

        columns = [TextColumn("{task.description}", markup=False), BarColumn(bar_width=None)]
        with self._lock:
            if self._timer is None or not self._paces:  # ended meanwhile
                return
            self._bars = Progress(
                *columns,
                TextColumn("{task.fields[told]}", markup=False),
                console=Terminal(stderr=True),
                expand=True,
                transient=True,
                refresh_per_second=5,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            for key, pace in self._paces.items():
                self._draw(self._bars, key, pace)
            self._bars.start()

    @staticmethod
    def _draw(bars: RichProgress, key: str, pace: _Pace) -> None:
        if pace.bar is None:
            pace.bar = bars.add_task(key, total=None, told="")
        known = pace.total if pace.rows and pace.total and pace.total >= pace.rows else None
        told = pace.text(time.monotonic())
        bars.update(pace.bar, total=known, completed=pace.rows, told=told)

    @contextlib.contextmanager
    def _bars_away(self) -> Iterator[None]:
        if not self._bars:
            yield
            return
        self._bars.stop()
        try:
            yield
        finally:
            self._bars.start()
