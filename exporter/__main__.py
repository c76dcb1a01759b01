"""``python -m exporter`` and the ``exporter`` command."""

from __future__ import annotations

import atexit
import gc
import os
import sys


def main() -> None:
    """Run the command line."""
    gc.set_threshold(50_000)  # at 700 it looks through the modules, while they load, for nothing
    status: list[object] = []
    atexit.register(_leave, status)  # the first to be registered is the last to run
    try:
        from exporter.commands.shared import main as command  # noqa: PLC0415  a Ctrl-C may come this early
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        command()
    except SystemExit as end:
        status.append(end.code)
        raise


def _leave(status: list[object]) -> None:
    """End at once: taking every module apart costs a sixth of a load that finds nothing new."""
    code = status[0] if status else None
    if not isinstance(code, int):
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # the interpreter's own end tells of it
    os._exit(code)


if __name__ == "__main__":
    main()
