"""What a command reports while it runs: lines, JSON objects or progress bars, on standard error.

A ``Console`` may be called from several threads.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import click

from exporter.errors import ExporterError, StoppedError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LEVELS = ("debug", "info", "warning", "error")
_EVERY = 5.0  # seconds between two lines about the progress of one load
_BAR_AFTER = 0.5  # seconds of work before a bar is worth showing
_BAR_EVERY = 0.1

# How far a load is: rows and bytes read since it began, and all its rows where that is estimated.
Progress = Callable[[int, int, "float | None"], None]


class Say(Protocol):
    """Reports something about one definition; the values go into the JSON object."""

    def __call__(
        self, text: str, level: str = "warning", event: str = "notice", **values: object
    ) -> None:
        """Report it. A warning is something that a person should look at."""


class Ended(Protocol):
    """The result of a command for one definition; ``str()`` gives the text for people."""

    key: str
    error: ExporterError | None

    def as_dict(self) -> dict[str, object]:
        """Return the object of ``--json`` and of the log in JSON."""


class _Entry(NamedTuple):
    """The fields that every JSON object of the log has, beside its time."""

    level: str
    event: str
    key: str | None
    message: str


@dataclass
class _Pace:
    """How fast one load goes. ``due``: when to report it again."""

    began: float
    due: float
    rows: int = 0
    size: int = 0
    total: float | None = None
    bar: TaskID | None = None

    def values(self, now: float) -> dict[str, Any]:
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
        speed = f"{self.rows:,} rows, {values['bytes_per_second'] / 1e6:,.1f} MB/s"
        left = values["seconds_left"]
        return speed if left is None else f"{speed}, {timedelta(seconds=left)} left"


class Console:
    """Where a command reports what happens; anything below ``level`` is dropped."""

    def __init__(self, *, as_json: bool = False, level: str = "info") -> None:
        self._json = as_json
        self._threshold = LEVELS.index(level)
        terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        self._with_bars = terminal and not as_json and self._shows("info")
        self._every = _BAR_EVERY if self._with_bars else _EVERY
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
        """Report something, about the definition ``key`` if there is one."""
        line = f"{key}: {text}" if key else text
        self._report(f"exporter: {line}", _Entry(level, event, key, text), values)

    def error(self, error: ExporterError) -> None:
        """Report an error."""
        values = {"kind": type(error).__name__, "hint": error.hint}
        self._report(self._line_of(error), _Entry("error", "error", None, error.message), values)

    def progress(self, key: str, rows: int, size: int, total: float | None) -> None:
        """Report how far the load of a definition is. Cheap enough to call at every block."""
        now = time.monotonic()
        pace = self._paces.get(key) or self._begin(key, now)
        pace.rows, pace.size, pace.total = rows, size, total
        if now < pace.due:
            return
        with self._lock:
            pace.due = now + self._every
            if not self._with_bars:
                text = pace.text(now)
                entry = _Entry("info", "progress", key, text)
                self._report(f"exporter: {key}: {text}", entry, pace.values(now))
            elif self._bars:
                self._draw(self._bars, key, pace)

    def ended(self, result: Ended, *, as_json: bool = False) -> None:
        """Print the result on standard output, its error on standard error."""
        with self._lock:
            pace = self._paces.pop(result.key, None)
            if self._bars and pace and pace.bar is not None:
                self._bars.remove_task(pace.bar)
            if not self._paces:
                self.close()
        if as_json:
            self._print(json.dumps(result.as_dict()), err=False)
        if self._json or result.error:
            line = self._line_of(result.error) if result.error else ""
            level = "error" if result.error else "info"
            entry = _Entry(level, "ended", result.key, str(result.error or result))
            self._report(line, entry, result.as_dict())
        elif self._shows("info"):
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
        # After Ctrl-C the terminal's line already shows ^C: the message goes below it.
        start = "\n" if isinstance(error, StoppedError) and sys.stderr.isatty() else ""
        return f"{start}exporter: {error}"

    def _shows(self, level: str) -> bool:
        return LEVELS.index(level) >= self._threshold

    def _report(self, line: str, entry: _Entry, values: Mapping[str, object]) -> None:
        """Print the line, or the entry with its values as JSON."""
        if not self._shows(entry.level):
            return
        if self._json:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            fields = {"time": now, **entry._asdict()}
            line = json.dumps({**fields, **values, **fields}, default=str)  # fields first, and kept
        self._print(line, err=True)

    def _print(self, line: str, *, err: bool) -> None:
        with self._lock:
            if self._bars:  # a line in the middle of a bar would be torn
                self._bars.stop()
            try:
                click.echo(line, err=err)
            except BrokenPipeError:  # a reader that went away is no reason to stop a load
                stream = sys.stderr if err else sys.stdout
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            finally:
                if self._bars:
                    self._bars.start()

    # -- bars: rich is imported when the first one is shown

    def _begin(self, key: str, now: float) -> _Pace:
        with self._lock:
            pace = self._paces[key] = _Pace(now, now + self._every)
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

        with self._lock:
            if self._timer is None or not self._paces:  # ended meanwhile
                return
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[speed]}", markup=False),
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
            pace.bar = bars.add_task(key, total=None, speed="")
        known = pace.total if pace.rows and pace.total and pace.total >= pace.rows else None
        speed = pace.text(time.monotonic())
        bars.update(pace.bar, total=known, completed=pace.rows, speed=speed)
