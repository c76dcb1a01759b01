"""``python -m exporter`` and the ``exporter`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from exporter.cli import main as command  # noqa: PLC0415  a Ctrl-C may come this early
    except KeyboardInterrupt:
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
