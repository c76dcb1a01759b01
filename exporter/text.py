"""Figures and tables as people read them, in plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_COLOURS = {"red": 31, "green": 32, "yellow": 33}
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


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[str] = (),
    width: int | None = None,
    colours: dict[str, str] | None = None,
) -> list[str]:
    """Return lines with their columns aligned, those named in ``right`` on the right.

    Where a line would be longer than ``width``, the widest column is cut. ``colours`` are by the
    first word of a cell.
    """
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    while width and sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > _SHORTEST:
        widths[widths.index(max(widths))] -= 1
    rights = [name in set(right) for name in head]

    def cell(text: str, size: int, at_right: bool) -> str:
        text = text if len(text) <= size else text[: size - 1] + "…"
        padded = text.rjust(size) if at_right else text.ljust(size)
        colour = _COLOURS.get((colours or {}).get(text.partition(" ")[0], ""))
        return f"\x1b[{colour}m{padded}\x1b[0m" if colour else padded

    return [
        "  ".join(cell(*one) for one in zip(line, widths, rights, strict=True)).rstrip()
        for line in lines
    ]
