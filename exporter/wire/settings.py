"""What every session sets. As pg_dump does, and for the same reasons.

Settings are made by a statement, not as start-up options, which a pooler refuses or drops; and
read back, since a load that reads dates of another order is worse than none.
"""

from __future__ import annotations

import re

# Without these a load would land something else than what is at the source.
REQUIRED = {
    # The text of every value means the same on both sides, whatever the servers default to.
    "client_encoding": "UTF8",
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "bytea_output": "hex",
    "extra_float_digits": "3",
    "lc_monetary": "C",
    "xmloption": "content",
    "xmlbinary": "base64",
    "array_nulls": "on",
    "quote_all_identifiers": "off",
    "standard_conforming_strings": "on",
    # A function or an operator that somebody made in `public` would run as our role, where its
    # arguments fit better than those of PostgreSQL's own.
    "search_path": "pg_catalog",
    # A policy would hide rows in silence: a full refresh would delete them from raw.
    "row_security": "off",
    # `repeatable read` would make sessions that land ranges side by side wait for ever.
    "default_transaction_isolation": "read committed",
}
# The URL's `options` may say otherwise: a load then fails early, or is slower.
PREFERRED = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",  # the snapshot waits while the other side works
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "synchronize_seqscans": "off",  # a table is read in the order in which it was written
    "jit": "off",  # costs more than the short statements of most loads
}
_SINCE = {"idle_session_timeout": 140000, "transaction_timeout": 170000}


def wanted(version: int, options: str) -> dict[str, str]:
    """Return the settings of a session on a server of that version.

    ``options`` are libpq's, such as ``-c lock_timeout=5s``.
    """
    asked = {
        name.lower().replace("-", "_")
        for name in re.findall(r"(?:-c\s*|--)([\w.-]+)\s*=", options.replace("\\", ""))
    }
    preferred = {
        name: value
        for name, value in PREFERRED.items()
        if name not in asked and version >= _SINCE.get(name, 0)
    }
    return REQUIRED | preferred


def statement(settings: dict[str, str]) -> str:
    """Return the statements that set and read back, for one round trip.

    Two rows come: the search path as it was; then the values that hold, and the server's process.
    """
    # Qualified: the path that holds until then may lead to somebody else's set_config.
    made = ", ".join(
        f"pg_catalog.set_config('{name}', '{value}', false)" for name, value in settings.items()
    )
    held = ", ".join(f"current_setting('{name}')" for name in settings)
    return (
        f"select pg_catalog.current_setting('search_path'), {made};"  # noqa: S608
        f" select {held}, pid, backend_start::text from pg_stat_get_activity(pg_backend_pid())"
    )


def refused(settings: dict[str, str], held: list[str]) -> str | None:
    """Return the first setting that did not take effect, with what holds instead."""
    for (name, value), found in zip(settings.items(), held, strict=True):
        if found != value:
            return f"{name} is {found}, and could not be set to {value}"
    return None
