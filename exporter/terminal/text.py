"""Figures and tables as people read them, in plain text."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

_RED, _GREEN, _YELLOW = 31, 32, 33
_COLOURS = {
    **dict.fromkeys(("ok", "pass", "running"), _GREEN),
    **dict.fromkeys(("warn", "never", "locked"), _YELLOW),
    **dict.fromkeys(("fail", "failed", "interrupted", "died", "error"), _RED),
}
_UNITS = ((86400 * 2, 86400, "d"), (3600 * 2, 3600, "h"), (60 * 2, 60, "m"), (0, 1, "s"))
_SHORTEST = 8  # a column is not cut below this, however narrow the terminal is


def number(value: float) -> str:
    """Return a count in five characters or so: ``12,345``, ``123k``, ``4.5M``."""
    if value < 100_000:
        return f"{round(value):,}"
    for size, unit in ((1e6, "k"), (1e9, "M"), (1e12, "G")):
        if value < size:
            return f"{value / size * 1000:.3g}{unit}"
    return f"{value:.2g}"


def duration(seconds: float) -> str:
    """Return a time to one unit: ``45s``, ``12m``, ``5h``, ``3d``."""
    return next(f"{seconds // size:.0f}{unit}" for least, size, unit in _UNITS if seconds >= least)


def wrapped(line: str, width: int | None, first: str = "", others: str = "") -> list[str]:
    """Return lines of at most ``width`` or 80 characters, indented by ``first`` and ``others``."""
    return textwrap.wrap(
        " ".join(line.split()),
        width or 80,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def width() -> int | None:
    """Return the terminal's width; None in a pipe, where a reader needs every line whole."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def coloured(text: str, word: str) -> str:
    """Return the text in the colour that a word such as ``failed`` has."""
    colour = _COLOURS.get(word)
    return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[str] = (),
    width: int | None = None,
) -> list[str]:
    """Return lines of aligned columns; those named in ``right`` are aligned to the right.

    Where a line would be longer than ``width``, the widest column is cut.
    """
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    while width and sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > _SHORTEST:
        widths[widths.index(max(widths))] -= 1
    rights = [name in set(right) for name in head]

    def cell(text: str, size: int, at_right: bool) -> str:
        text = text if len(text) <= size else text[: size - 1] + "…"
        padded = text.rjust(size) if at_right else text.ljust(size)
        return coloured(padded, text.partition(" ")[0])

    return ["  ".join(map(cell, line, widths, rights)).rstrip() for line in lines]
