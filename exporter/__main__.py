"""``python -m exporter`` and the ``exporter`` command."""

from __future__ import annotations

import atexit
import gc
import os
import sys


def main() -> None:
    """Run the command line."""
    gc.set_threshold(50_000)  # at 700 it collects, to no use, again and again while modules load
    status: list[object] = []
    atexit.register(_leave, status)  # the first to be registered is the last to run
    try:
        from exporter.commands.shared import main as command  # noqa: PLC0415  Ctrl-C may come early

        command()
    except KeyboardInterrupt:  # during the import, or before click is ready for it
        sys.exit(130)
    except SystemExit as end:
        status.append(end.code)
        raise


def _leave(status: list[object]) -> None:
    """End at once: Python's own clean-up costs a sixth of a load that finds nothing new."""
    code = status[0] if status else None
    if not isinstance(code, int):
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # the interpreter reports it when it ends
    os._exit(code)


if __name__ == "__main__":
    main()
