"""What a person sees and presses: lines, bars and tables out, Ctrl-C and SIGTERM in."""

from exporter.terminal.console import Console, Progress, Say

__all__ = ["Console", "Progress", "Say"]
