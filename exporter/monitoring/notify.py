"""Reports how a run of ``exporter load`` ended: to Slack, Sentry, a health check, a metrics file.

What is not set up is not imported. A receiver that fails, or does not answer, costs one line of
warning, and does not affect the load.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit, urlunsplit

from exporter.errors import ExporterError, LockedError, UsageError
from exporter.state import Result
from exporter.terminal import Console

TIMEOUT = 5  # seconds that a receiver has for each step
PATIENCE = 10.0  # seconds that all of them have, a slow name server included
_LISTED = 20  # definitions in a message; those that went well are left out first
_LONG = 1000  # characters of an error in a message
_OUTCOMES = {
    "success": (":white_check_mark:", "ended well"),
    "warning": (":warning:", "ended with a warning"),
    "failure": (":x:", "failed"),
}


@dataclass
class Run:
    """One ``exporter load``, of all its definitions. When its ``with`` block ends, it reports how.

    An error that ends the block is reported, and raised further.
    """

    console: Console
    environment: str | None = None  # of --env
    metrics_file: Path | None = None
    sources: Mapping[str, bool] = field(default_factory=dict)  # see slots.sources_of
    results: list[Result] = field(default_factory=list)
    error: BaseException | None = None
    _began: float = field(default_factory=time.monotonic)
    _start: threading.Thread | None = None

    def __enter__(self) -> Run:
        return self

    def started(self) -> None:
        """Report to the health check that a run has begun; do not wait for it."""
        url = os.environ.get("HEALTHCHECK_URL")
        if url:
            self._start = self._in_background(
                "health check", lambda: _ping(_below(url, "start"), "")
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not isinstance(error, SystemExit):
            self.error = error
        if isinstance(error, UsageError) and sys.stderr.isatty():
            return  # who typed the command sees its error
        receivers = self._receivers()
        if not receivers:
            return
        deadline = time.monotonic() + PATIENCE
        if self._start:
            self._start.join(PATIENCE)  # or its end would come before its start
        threads = {name: self._in_background(name, send) for name, send in receivers.items()}
        for name, thread in threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self._warn(name, f"no answer in {PATIENCE:.0f} s")

    @property
    def outcome(self) -> str:
        """``success``, ``warning`` (a lock was held, or there is a notice) or ``failure``."""
        errors = [error for error in (self.error, *(it.error for it in self.results)) if error]
        if not all(isinstance(error, LockedError) for error in errors):
            return "failure"
        return "warning" if errors or any(it.notices for it in self.results) else "success"

    def text(self) -> str:
        """Return the message: counts, errors, notices. Of a row it names the key at most."""
        import socket  # noqa: PLC0415  only where somebody is told

        seconds = time.monotonic() - self._began
        where = ", ".join(filter(None, (self.environment, socket.gethostname())))
        icon, words = _OUTCOMES[self.outcome]
        lines = [f"{icon} *exporter load {words}* ({where}), {seconds:.1f} s"]
        if self.error:
            lines.append(_quoted(_described(self.error)))
        order = sorted(self.results, key=lambda result: (not result.error, not result.notices))
        for result in order[:_LISTED]:
            lines.append(_line(result))
            notes = (str(result.error or ""), *result.notices)
            lines += [_quoted(note) for note in notes if note]
        if len(order) > _LISTED:
            lines.append(f"… and {len(order) - _LISTED} more")
        return "\n".join(lines)

    def _receivers(self) -> Mapping[str, Callable[[], None]]:
        environ = os.environ
        found: dict[str, Callable[[], None]] = {}
        if environ.get("SLACK_WEBHOOK_URL"):
            found["Slack"] = lambda: _webhook(environ["SLACK_WEBHOOK_URL"], self.text())
        elif environ.get("SLACK_TOKEN"):
            found["Slack"] = lambda: _message(
                environ["SLACK_TOKEN"], environ.get("SLACK_CRON_CHANNEL_ID"), self.text()
            )
        url = environ.get("HEALTHCHECK_URL")
        locked = any(isinstance(result.error, LockedError) for result in self.results)
        if url and self.outcome == "failure":
            found["health check"] = lambda: _ping(_below(url, "fail"), self.text())
        elif url and not locked:  # the run that holds the lock reports how it ends
            found["health check"] = lambda: _ping(url, self.text())
        if environ.get("SENTRY_DSN") and self.outcome == "failure":
            from exporter.monitoring import sentry  # noqa: PLC0415  only where it is set up

            found["Sentry"] = lambda: sentry.send(self.results, self.error, TIMEOUT)
        if self.metrics_file and self.results:
            file = self.metrics_file
            found[str(file)] = lambda: self._write(file)
        return found

    def _write(self, file: Path) -> None:
        from exporter.monitoring import metrics, slots  # noqa: PLC0415  only where it is set up

        silent: list[str] = []
        try:
            overview = slots.current(self.sources, silent.append)
        except ExporterError as error:
            silent.append(str(error))
        known = None if silent else [one for one in overview.slots if one.known]
        metrics.write(file, self.results, known, time.time())

    def _in_background(self, receiver: str, send: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                send()
            except Exception as error:  # noqa: BLE001  of whatever kind: the load goes on
                self._warn(receiver, reason(error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def _warn(self, receiver: str, why: str) -> None:
        self.console.say(f"{receiver} was not told: {why}", "warning", event="notify")


def reason(error: Exception) -> str:
    """Return why a receiver could not be told, without its address, which may be a secret."""
    answer = getattr(error, "response", None)
    if answer is not None:  # Slack's
        status = getattr(answer, "status_code", None) or answer.get("status")
        return str(answer.get("error") or f"HTTP {status}")
    if isinstance(error, ImportError | ExporterError):
        return str(error)
    status = getattr(error, "code", None)
    if status is not None:
        return f"HTTP {status}"
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return f"no answer in {TIMEOUT} s"
    return (cause.strerror if isinstance(cause, OSError) else None) or type(cause).__name__


# -- the text


def _line(result: Result) -> str:
    totals = result.totals
    deleted = f", {totals.rows_deleted:,} deleted" if totals.rows_deleted else ""
    swept = f" ({totals.rows_swept:,} by the sweep)" if totals.rows_swept else ""
    return (
        f"• *{_escaped(result.key)}* {result.status}: {totals.rows_read:,} rows read,"
        f" {totals.rows_written:,} written{swept}{deleted}, {totals.bytes / 1e6:,.1f} MB"
        f" in {result.seconds:.1f} s"
    )


def _described(error: BaseException) -> str:
    if isinstance(error, ExporterError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    # Not its text, which may hold a row.
    return f"unexpected {type(error).__name__}: the log has its traceback"


def _quoted(text: str) -> str:
    short = text if len(text) <= _LONG else f"{text[:_LONG]} …"
    return "\n".join(f"> {_escaped(line.strip())}" for line in short.splitlines())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# -- Slack and the health check


def _message(token: str, channel: str | None, text: str) -> None:
    from slack_sdk import WebClient  # noqa: PLC0415  only where it is set up

    if not channel:
        raise UsageError("SLACK_TOKEN is set, and SLACK_CRON_CHANNEL_ID is not")
    base = os.environ.get("SLACK_API_URL", WebClient.BASE_URL).rstrip("/") + "/"
    client = WebClient(token, base_url=base, timeout=TIMEOUT, retry_handlers=[])
    client.chat_postMessage(channel=channel, text=text, unfurl_links=False)


def _webhook(url: str, text: str) -> None:
    from slack_sdk.webhook import WebhookClient  # noqa: PLC0415  only where it is set up

    answer = WebhookClient(url, timeout=TIMEOUT, retry_handlers=[]).send(text=text)
    if answer.status_code != 200:
        raise ExporterError(f"HTTP {answer.status_code}")


def _below(url: str, name: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _ping(url: str, text: str) -> None:
    from urllib.request import Request, urlopen  # noqa: PLC0415  only where it is set up

    if not url.startswith(("https://", "http://")):
        raise UsageError("HEALTHCHECK_URL is not an http:// or https:// URL")
    with urlopen(Request(url, data=text.encode()), timeout=TIMEOUT):  # noqa: S310
        pass
