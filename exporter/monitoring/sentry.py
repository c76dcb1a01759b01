"""Sends the failures of a run to Sentry: errors and where they were raised, no variables' values.

The SDK sends no personal data by default; the option ``send_default_pii`` is deprecated.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from exporter.errors import ExporterError
from exporter.state import Result

if TYPE_CHECKING:
    from sentry_sdk.types import Event, Hint


def send(results: list[Result], error: BaseException | None, timeout: float) -> None:
    """Send one event for each failure. Raises ExporterError where that is not possible."""
    try:
        import sentry_sdk  # noqa: PLC0415  only where it is set up
        from sentry_sdk.transport import HttpTransport  # noqa: PLC0415
    except ImportError:
        raise ExporterError(
            "sentry-sdk is not installed: pip install 'dbt-exporter[sentry]'"
        ) from None
    lost: list[str] = []

    class Transport(HttpTransport):
        def on_dropped_event(self, reason: str) -> None:
            lost.append(reason)

    try:
        sentry_sdk.init(
            release=os.environ.get("SENTRY_RELEASE", f"dbt-exporter@{version('dbt-exporter')}"),
            transport=Transport,
            before_send=_without_content,
            default_integrations=False,  # this process only sends what is given here
            include_local_variables=False,
            max_breadcrumbs=0,
        )
    except sentry_sdk.utils.BadDsn:
        raise ExporterError("SENTRY_DSN is not a DSN") from None
    for result in (result for result in results if result.error):
        with sentry_sdk.new_scope() as scope:
            scope.set_tag("key", result.key)
            scope.set_tag("status", result.status)
            scope.set_context("load", {**result.as_dict(), "command": result.command})
            scope.fingerprint = [result.key, type(result.error).__name__]
            scope.capture_exception(result.error)
    if error:
        sentry_sdk.capture_exception(error)
    begin = time.monotonic()
    sentry_sdk.flush(timeout)
    if time.monotonic() - begin >= timeout:
        raise ExporterError(f"no answer in {timeout:.0f} s")
    if lost:
        raise ExporterError(f"the event was lost: {lost[0]}")


def _without_content(event: Event, hint: Hint) -> Event:
    """Empty the texts of foreign errors: only our own are known to hold no row and no secret."""
    error = hint["exc_info"][1] if "exc_info" in hint else None
    for entry in event.get("exception", {}).get("values", []):
        if not (isinstance(error, ExporterError) and entry["type"] == type(error).__name__):
            entry["value"] = ""
    return event
