"""The stream of a slot, and the thread that reads it ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from exporter.wire import connect
from exporter.wire.replication import Following, Slot
from tests.conftest import Workplace
from tests.helpers.changes import define, results
from tests.helpers.processes import until


def test_the_end_is_heard_of_without_the_server(place: Workplace, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The last item lands for long, and the server has ended the stream meanwhile."""
    monkeypatch.setenv("DATABASE_URL_CORE", place.core)
    place.query(place.core, "create table thing (id int primary key)")
    define(place, "thing")
    results(place)
    name = place.query(place.core, "select slot_name from pg_replication_slots where not active")
    ended = "select pg_terminate_backend(active_pid) from pg_replication_slots where active"
    session = connect("DATABASE_URL_CORE", replication=True)
    following = Following(Slot(session, name[0][0], name[0][0], 0), _two)
    found: list[int] = []

    def land() -> None:
        for item in following:
            found.append(item)
            if item == 1:
                until(lambda: place.query(place.core, ended) != [])
                time.sleep(2.5)  # longer than the server is told nothing for

    reader = threading.Thread(target=land, daemon=True)
    reader.start()
    reader.join(20)
    following.stop(session)
    assert found == [1, 2]
    assert not reader.is_alive()


def _two(messages: Iterator[bytes | int]) -> Iterator[int]:
    next(messages)
    yield 1
    yield 2
