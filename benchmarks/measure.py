"""What a command costs: seconds, its own CPU, its peak memory, and the WAL that it causes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg


@dataclass(frozen=True)
class Cost:
    """``seconds`` of wall and of CPU, ``memory`` and ``wal`` in bytes."""

    seconds: float
    cpu: float
    memory: int
    wal: int


def cost_of(command: list[str], environment: dict[str, str], server: str) -> Cost:
    """Run a command and measure it. Raises RuntimeError with its output if it fails.

    CPU and memory are those of the command and of what it starts, not the servers'.
    """
    before = wal_position(server)
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    peaks = [0]
    watch = threading.Thread(target=_watch, args=(process, peaks))
    watch.start()
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    watch.join()
    process.stdout.close()
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{said.decode(errors='replace')[-3000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, max(peaks), wal_position(server) - before)


def _watch(process: subprocess.Popen[bytes], peaks: list[int]) -> None:
    # The kernel's ru_maxrss begins with what the measuring process itself had when it forked.
    while process.returncode is None:
        peaks.append(max((_peak(pid) for pid in _family(process.pid)), default=0))
        peaks[:] = [max(peaks)]
        time.sleep(0.01)


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _family(int(child))


def _peak(pid: int) -> int:
    """Return the most memory that a process has had, in bytes; 0 where it cannot be told."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def wal_position(server: str) -> int:
    with psycopg.connect(server, autocommit=True) as connection:
        row = connection.execute(
            "select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"
        ).fetchone()
    assert row is not None
    return int(row[0])
