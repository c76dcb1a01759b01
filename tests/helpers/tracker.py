"""A web service on this machine: issues page by page, for who has the token; once it is down."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

TOKEN = "s3cr3t-token"


class Tracker(ThreadingHTTPServer):
    """What it has, what it was asked, and how often it still answers that it is down."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.issues: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.down = 1

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Tracker
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        tracker, parts = self.server, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "who are you?"})
        if len(tracker.asked) == 1 and tracker.down:  # in the middle of the pages
            tracker.down -= 1
            return self._answer(503, {"error": "come again"}, {"Retry-After": "1"})
        since, first = query.get("changed_since", ""), int(query.get("first", "0"))
        tracker.asked.append(since)
        found = [one for one in tracker.issues if one["changed_at"] >= since[:19]]
        found.sort(key=lambda one: (one["changed_at"], one["id"]))
        size = int(query["per_page"])
        headers = {}
        if len(found) > first + size:
            following = urlencode({**query, "first": first + size})
            headers["Link"] = f'<{tracker.address}{parts.path}?{following}>; rel="next"'
        return self._answer(200, found[first : first + size], headers)

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def running_tracker() -> Iterator[Tracker]:
    with Tracker() as tracker:
        thread = threading.Thread(target=tracker.serve_forever, daemon=True)
        thread.start()
        yield tracker
        tracker.shutdown()
        thread.join()
