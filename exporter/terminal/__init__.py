"""What a person sees and types: lines, progress bars and tables, Ctrl-C and SIGTERM.

Results, errors and figures come in; text on standard output and standard error goes out. A signal
becomes a KeyboardInterrupt.
"""

from exporter.terminal.console import Console, Progress, Say

__all__ = ["Console", "Progress", "Say"]
