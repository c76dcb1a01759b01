"""Commands as processes that a test watches, stops or types into."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator

from tests.conftest import ROOT, Workplace


def start_load(place: Workplace, *keys: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "exporter", "load", "--json", *keys],
        cwd=place.folder,
        env={**place.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_unlocked(place: Workplace) -> None:
    """Wait until the server has noticed that a killed loader is gone."""
    statement = "select count(*) from pg_stat_activity where application_name = 'dbt-exporter'"
    for _ in range(100):
        if place.query(place.analytics, statement + " and datname = current_database()") == [(0,)]:
            return
        time.sleep(0.05)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def started(place: Workplace, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "exporter", *words],
        cwd=place.folder,
        env={**place.environment, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def on_terminal(
    place: Workplace,
    *words: str,
    act: Callable[[subprocess.Popen[bytes], int, str], None] | None = None,
    **environment: str,
) -> tuple[int, str]:
    """Run a command on a terminal of 80 columns; return its exit status and what came there.

    ``act`` is called with the process, the terminal and what has come so far, again and again.
    """
    ours, theirs = pty.openpty()
    env = {**place.environment, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=place.folder,
        env={**env, "PYTHONPATH": str(ROOT)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  for Ctrl-C
    )
    os.close(theirs)
    text = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        readable, _, _ = select.select([ours], [], [], 0.5)
        if readable:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            text += data
        if act:
            act(process, ours, text.decode(errors="replace"))
        elif process.poll() is not None:
            break
    os.close(ours)
    return process.wait(30), text.decode()


def plain(text: str) -> list[str]:
    """The lines that a terminal was given, redrawn ones included, without control sequences."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
