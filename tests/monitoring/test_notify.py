"""How a load ended, as Slack, Sentry, a health check and a node exporter get to know it."""

from __future__ import annotations

import gzip
import json
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psycopg
import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics

from exporter.config.project import definitions
from exporter.monitoring import metrics, sentry
from exporter.state.position import lock_number
from exporter.state.runs import Result
from tests.conftest import Workplace
from tests.helpers.processes import on_terminal, started, until
from tests.helpers.tables import SLOW, slow_table

TOKEN = "xoxb-the-token"
GONE = SLOW.replace("name: slow", "name: gone").replace("key: Slow", "key: Gone")
GONE = GONE.replace("table: slow", "table: gone")


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """A server that keeps what it is sent. ``status`` 0: it never answers."""

    url: str = ""
    status: int = 200
    slack: dict[str, object] = field(default_factory=lambda: {"ok": True})
    requests: list[Request] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        return [one.path for one in self.requests]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "SLACK_TOKEN": TOKEN,
            "SLACK_CRON_CHANNEL_ID": "C123",
            "SLACK_API_URL": f"{self.url}/api",
            "HEALTHCHECK_URL": f"{self.url}/ping/the-secret",
            "SENTRY_DSN": self.url.replace("http://", "http://the-key@") + "/42",
        }

    @property
    def messages(self) -> list[str]:
        """What Slack was sent, its token and channel checked."""
        found = [one for one in self.requests if one.path == "/api/chat.postMessage"]
        for one in found:
            assert one.headers["authorization"] == f"Bearer {TOKEN}"
        sent = [json.loads(one.body) for one in found]
        assert all(one["channel"] == "C123" for one in sent)
        return [one["text"] for one in sent]

    @property
    def events(self) -> list[dict[str, object]]:
        """What Sentry was sent: an envelope's lines are its head, an item's head, the item."""
        found = [one for one in self.requests if one.path == "/api/42/envelope/"]
        return [json.loads(one.body.splitlines()[2]) for one in found]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    own = Receiver()
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            headers = {name.lower(): value for name, value in self.headers.items()}
            own.requests.append(Request(self.command, self.path, headers, body))
            if own.status == 0:
                over.wait(60)
                return
            self.send_response(own.status)
            self.end_headers()
            answer = json.dumps(own.slack) if self.path.startswith("/api/chat") else "ok"
            self.wfile.write(answer.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    own.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield own
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_load_that_ends_well(place: Workplace, receiver: Receiver) -> None:
    slow_table(place, 8)
    place.load(**receiver.environment)
    message = receiver.messages[0]
    assert len(receiver.messages) == 1
    assert message.startswith(":white_check_mark: *exporter load ended well* (")
    assert "*Slow* ok: 8 rows read, 8 written, 0.0 MB in 0." in message
    assert [one for one in receiver.paths if "ping" in one] == [
        "/ping/the-secret/start",
        "/ping/the-secret",
    ]
    assert receiver.events == []


def test_one_message_of_a_run_that_failed(place: Workplace, receiver: Receiver) -> None:
    slow_table(place, 8)
    place.define(SLOW, GONE)
    done = place.run("exporter", "load", "--env", "night", **receiver.environment)
    assert done.returncode == 2  # .env.night is not there: told all the same
    assert "*exporter load failed* (night, " in receiver.messages[0]
    (place.folder / ".env.night").write_text("")
    done = place.run("exporter", "load", "--env", "night", **receiver.environment)
    assert done.returncode == 1
    assert len(receiver.messages) == 2
    message = receiver.messages[1]
    assert message.startswith(":x: *exporter load failed* (night, ")
    assert message.index("*Gone* failed") < message.index("*Slow* ok: 8 rows read")
    assert 'the source database has no table public."gone"' in message
    assert receiver.paths.count("/ping/the-secret/fail") == 2
    event = receiver.events[-1]
    assert event["tags"] == {"key": "Gone", "status": "failed"}
    raised = event["exception"]["values"][-1]  # type: ignore[index]
    assert raised["type"] == "SourceError"
    assert "no table" in raised["value"]
    frames = raised["stacktrace"]["frames"]
    assert frames[-1]["module"].startswith("exporter.")
    assert not any("vars" in frame for frame in frames)


def test_no_row_and_no_secret_is_sent(place: Workplace, receiver: Receiver) -> None:
    slow_table(place, 8)
    place.define(SLOW.replace("pg_sleep(0.01)::text", "pad"))
    place.load()
    place.query(place.core, "insert into slow values (9, now(), 'confidential')")
    check = "alter table analytics_raw.slow add check (nap <> 'confidential')"
    place.query(place.analytics, check)
    done = place.run("exporter", "load", **receiver.environment)
    assert done.returncode == 1
    assert "row id=9" in receiver.messages[-1]
    login = "postgresql://reader:the-password@127.0.0.1:1/core"
    done = place.run("exporter", "load", **{**receiver.environment, "DATABASE_URL_CORE": login})
    assert done.returncode == 1
    assert "refused" in receiver.messages[-1]
    assert len(receiver.events) == 2
    sent = b"\n".join(one.body for one in receiver.requests) + done.stderr.encode()
    assert b"confidential" not in sent
    assert b"the-password" not in sent


def test_warnings(place: Workplace, receiver: Receiver) -> None:
    slow_table(place, 8)
    place.load()
    place.query(place.core, "alter table slow add note text")
    place.define(SLOW.replace("columns: [id, at, ", "columns: [id, at, note, "))
    place.load(**receiver.environment)
    assert receiver.messages[0].startswith(":warning: *exporter load ended with a warning*")
    assert "> new column note text" in receiver.messages[0]
    assert receiver.paths.count("/ping/the-secret") == 1
    number = lock_number(definitions(place.folder)[0].destination)
    with psycopg.connect(place.analytics) as other:
        other.execute("select pg_advisory_lock(%s)", (number,))
        done = place.run("exporter", "load", **receiver.environment)
    assert done.returncode == 3
    assert receiver.messages[1].startswith(":warning:")
    assert "another run holds the lock" in receiver.messages[1]
    # The run that holds the lock tells how it ends; this one has begun, and tells no end.
    assert receiver.paths[-1].startswith(("/api/", "/ping/the-secret/start"))
    assert receiver.paths.count("/ping/the-secret") == 1
    assert receiver.events == []


def test_a_webhook_wins_and_a_health_check_keeps_its_query(
    place: Workplace, receiver: Receiver
) -> None:
    slow_table(place, 8)
    webhook, health = f"{receiver.url}/services/T0/B0", f"{receiver.url}/ping?create=1"
    place.load(**receiver.environment | {"SLACK_WEBHOOK_URL": webhook, "HEALTHCHECK_URL": health})
    assert sorted(receiver.paths) == ["/ping/start?create=1", "/ping?create=1", "/services/T0/B0"]
    sent = next(one for one in receiver.requests if "services" in one.path)
    assert "ended well" in json.loads(sent.body)["text"]


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("down", "Connection refused"),
        ("500", "HTTP 500"),
        ("hangs", "no answer in"),
        ("token", "invalid_auth"),
    ],
)
def test_a_receiver_that_fails_changes_nothing(
    place: Workplace, receiver: Receiver, trouble: str, why: str
) -> None:
    slow_table(place, 8)
    environment = receiver.environment
    if trouble == "down":
        environment = Receiver(url="http://127.0.0.1:1").environment
    elif trouble == "token":
        receiver.slack = {"ok": False, "error": "invalid_auth"}
    else:
        receiver.status = 500 if trouble == "500" else 0
    begin = time.monotonic()
    done = place.run("exporter", "load", **environment)
    assert time.monotonic() - begin < 15
    assert done.returncode == 0
    assert place.query(place.analytics, "select count(*) from analytics_raw.slow") == [(8,)]
    lines = done.stderr.splitlines()
    assert f"exporter: Slack was not told: {why}" in "\n".join(lines)
    expected = ["Slack"] if trouble == "token" else ["Slack", "health check", "health check"]
    told = sorted(line.split(": ")[1].removesuffix(" was not told") for line in lines)
    assert told == expected, lines
    for secret in (TOKEN, "the-secret", "the-key", "127.0.0.1"):
        assert secret not in done.stderr


@pytest.mark.parametrize(("status", "why"), [(429, "status_429"), (500, "status_500"), (0, "no")])
def test_sentry_that_fails(place: Workplace, receiver: Receiver, status: int, why: str) -> None:
    place.define(GONE)
    receiver.status = status
    dsn = receiver.environment["SENTRY_DSN"]
    begin = time.monotonic()
    done = place.run("exporter", "load", SENTRY_DSN=dsn)
    assert time.monotonic() - begin < 15
    assert done.returncode == 1
    assert "exporter: Sentry was not told: " in done.stderr
    assert why in done.stderr
    assert "the-key" not in done.stderr


def test_what_is_missing_or_wrong_is_told(place: Workplace) -> None:
    place.define(GONE)
    (place.folder / "sentry_sdk.py").write_text("raise ImportError")
    (place.folder / "prometheus_client.py").write_text("raise ImportError")
    done = place.run(
        "exporter", "load", "--metrics-file", "x.prom",
        SENTRY_DSN="http://key@127.0.0.1:1/42", SLACK_TOKEN="x", HEALTHCHECK_URL="file:///etc/hosts",
    )  # fmt: skip
    assert done.returncode == 1
    for line in (
        "Sentry was not told: sentry-sdk is not installed: pip install 'dbt-exporter[sentry]'",
        "x.prom was not told: prometheus-client is not installed: pip install"
        " 'dbt-exporter[metrics]'",
        "Slack was not told: SLACK_TOKEN is set, and SLACK_CRON_CHANNEL_ID is not",
        "health check was not told: HEALTHCHECK_URL is not an http:// or https:// URL",
    ):
        assert f"exporter: {line}" in done.stderr
    (place.folder / "sentry_sdk.py").unlink()
    done = place.run("exporter", "load", SENTRY_DSN="nonsense")
    assert "Sentry was not told: SENTRY_DSN is not a DSN" in done.stderr


def test_an_unexpected_error_goes_to_sentry_without_its_text(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENTRY_DSN", receiver.environment["SENTRY_DSN"])
    row = "confidential"
    try:
        int(row)
    except ValueError as error:
        sentry.send([], error, 5)
    (event,) = receiver.events
    raised = event["exception"]["values"][0]  # type: ignore[index]
    assert (raised["type"], raised["value"]) == ("ValueError", "")
    assert not any("vars" in frame for frame in raised["stacktrace"]["frames"])


def test_a_run_that_is_stopped(place: Workplace, receiver: Receiver) -> None:
    slow_table(place, 400)
    with started(place, "load", BATCH_SIZE="10", **receiver.environment) as process:
        until(lambda: "/ping/the-secret/start" in receiver.paths)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 143
    assert "*exporter load failed*" in receiver.messages[0]
    assert "Slow: interrupted by SIGTERM" in receiver.messages[0]
    assert receiver.paths[-1] != "/ping/the-secret"
    assert "/ping/the-secret/fail" in receiver.paths


def test_a_wrong_call_is_told_where_nobody_sees_it(place: Workplace, receiver: Receiver) -> None:
    slow_table(place, 8)
    assert place.run("exporter", "load", "Nope", **receiver.environment).returncode == 2
    assert "no definition has the key Nope" in receiver.messages[0]
    status, _ = on_terminal(place, "exporter", "load", "Nope", **receiver.environment)
    assert (status, len(receiver.messages)) == (2, 1)


def test_metrics(place: Workplace) -> None:
    slow_table(place, 8)
    file = place.folder / "exporter.prom"
    words = ("exporter", "load", "--metrics-file", str(file))
    begin = time.time()
    assert place.run(*words).returncode == 0
    first = file.read_text()
    assert first.endswith("# EOF\n")
    for parse in (
        parser.text_string_to_metric_families,
        openmetrics.text_string_to_metric_families,
    ):
        values = _values(parse(first))
        assert (
            begin <= values["exporter_load_last_success_timestamp_seconds", "Slow"] <= time.time()
        )
        assert values["exporter_load_rows_read", "Slow"] == 8
        assert values["exporter_load_rows_written", "Slow"] == 8
        assert values["exporter_load_bytes", "Slow"] > 100
        assert 0 < values["exporter_load_duration_seconds", "Slow"] < 60
        states = {one: values["exporter_load_status", "Slow", one] for one in metrics.STATUSES}
        assert states == {"ok": 1, "failed": 0, "locked": 0, "interrupted": 0}
    place.define(SLOW, GONE)
    place.query(place.core, "drop table slow")
    assert place.run(*words).returncode == 1
    later = _values(openmetrics.text_string_to_metric_families(file.read_text()))
    success = "exporter_load_last_success_timestamp_seconds"
    assert later[success, "Slow"] == values[success, "Slow"]
    assert (success, "Gone") not in later
    last = "exporter_load_last_run_timestamp_seconds"
    assert later[last, "Slow"] > values[last, "Slow"]
    assert later["exporter_load_status", "Gone", "failed"] == 1
    place.run(*words, "Gone")  # another line of the crontab: its keys join the file
    assert (
        _values(openmetrics.text_string_to_metric_families(file.read_text())).keys() == later.keys()
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert sorted(one for one in os.listdir(place.folder) if "prom" in one) == ["exporter.prom"]
    done = place.run("exporter", "load", "--metrics-file", "/nowhere/x.prom")
    assert "exporter: /nowhere/x.prom was not told: No such file or directory" in done.stderr


def test_a_metrics_file_is_whole_at_every_moment(place: Workplace) -> None:
    file = place.folder / "exporter.prom"
    over = threading.Event()
    seen = []

    def read() -> None:
        while not over.is_set():
            if file.exists():
                seen.append(file.read_text().endswith("# EOF\n"))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(60):
            metrics.write(file, [Result(f"key {number % 50}")], None, time.time())
    finally:
        over.set()
        reader.join()
    assert len(seen) > 5
    assert all(seen)


def _values(families: object) -> dict[tuple[str, ...], float]:
    samples = (sample for family in families for sample in family.samples)  # type: ignore[attr-defined]
    return {(one.name, *one.labels.values()): one.value for one in samples}
