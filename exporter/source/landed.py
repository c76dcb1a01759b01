"""Whether a slot still sends the history that has landed, and from where it goes on.

A source that was restored, or has failed over, may have other commits at the positions that were
read: they would be passed over, and those that it has lost would stay in raw.
"""

from __future__ import annotations

from collections.abc import Iterator

from exporter.source import pgoutput


class Parted(Exception):  # noqa: N818  no error: the load makes the slot anew
    """The source does not have the commit that landed last."""


def position_of(commit: bytes | None) -> int:
    """Return the position behind a commit, 0 where there was none."""
    return int.from_bytes(commit[:8], "big") if commit else 0


def unlanded(
    messages: Iterator[bytes | int], begin: int, commit: bytes | None
) -> Iterator[bytes | int]:
    """Yield what follows the commit that landed last; of what is before it, descriptions alone.

    The messages are those from ``begin`` on. Raises Parted where the commit does not come.
    """
    place = position_of(commit)
    return _behind(messages, place, commit) if place > begin else messages


def _behind(
    messages: Iterator[bytes | int], place: int, commit: bytes | None
) -> Iterator[bytes | int]:
    for message in messages:
        if isinstance(message, int):
            if message >= place:
                raise Parted
        elif message[0] == pgoutput.RELATION:
            yield message
        elif message[0] == pgoutput.COMMIT and pgoutput.committed(message) >= place:
            if pgoutput.commit_of(message) != commit:
                raise Parted
            yield from messages
            return
