"""The last run of each definition, and the slots, in OpenMetrics' text for a node exporter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from exporter.errors import ExporterError
from exporter.monitoring.slots import Slot
from exporter.state import Result

STATUSES = ("ok", "failed", "locked", "interrupted")
_SUCCESS = "exporter_load_last_success_timestamp_seconds"
METRICS = {
    _SUCCESS: "When the last load that ended well did so.",
    "exporter_load_last_run_timestamp_seconds": "When the last load ended.",
    "exporter_load_duration_seconds": "How long the last load took.",
    "exporter_load_rows_read": "Rows that the last load read at the source.",
    "exporter_load_rows_written": "Rows that the last load changed in raw.",
    "exporter_load_rows_swept": "Rows of them that the cursor had passed over.",
    "exporter_load_bytes": "Bytes that the last load read.",
    "exporter_load_status": "1 for the status of the last load: " + ", ".join(STATUSES) + ".",
}
_READ = "exporter_slot_read_timestamp_seconds"
SLOTS = {
    "exporter_slot_held_back_bytes": "WAL that the source keeps for the slot.",
    "exporter_slot_behind_bytes": "WAL that the slot has and that has not landed.",
    _READ: "When the slot was last read to its end: time() less this is how long ago.",
    "exporter_slot_seconds_since_read": "The same as seconds, when this file was written.",
    "exporter_slot_lost": "1 where the source has removed WAL that the slot needs, else 0.",
}
_LABELS = {
    **dict.fromkeys(METRICS, ("key",)),
    "exporter_load_status": ("key", "status"),
    **dict.fromkeys(SLOTS, ("slot", "database")),
}
Samples = dict[str, dict[tuple[str, ...], float]]  # metric → its labels' values → value


def write(file: Path, results: list[Result], slots: Sequence[Slot] | None, now: float) -> None:
    """Replace the file in one step. Samples of other keys, and of earlier successes, stay.

    ``slots`` are all that this destination reads; None where they could not be asked for: then
    their samples stay, too. Raises ExporterError where prometheus-client is missing, OSError.
    """
    try:
        import prometheus_client.openmetrics.exposition as openmetrics  # noqa: PLC0415
        from prometheus_client import CollectorRegistry, Gauge  # noqa: PLC0415  only for this file
    except ImportError:
        raise ExporterError(
            "prometheus-client is not installed: pip install 'dbt-exporter[metrics]'"
        ) from None
    samples = _updated(_read(file), results, now)
    if slots is not None:
        samples.update(_of_slots(slots))
    registry = CollectorRegistry()
    for name, meaning in {**METRICS, **SLOTS}.items():
        if name in SLOTS and not samples[name]:
            continue  # most projects have none
        gauge = Gauge(name, meaning, _LABELS[name], registry=registry)
        for values, value in sorted(samples[name].items()):
            gauge.labels(*values).set(value)
    # In the same folder, so that replacing is one step; not *.prom, which would be collected.
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}", delete=False) as new:
        try:
            new.write(openmetrics.generate_latest(registry))  # type: ignore[no-untyped-call]
            new.flush()
            os.fchmod(new.fileno(), 0o644)
            os.replace(new.name, file)
        except BaseException:
            os.unlink(new.name)
            raise


def _updated(samples: Samples, results: list[Result], now: float) -> Samples:
    for result in results:
        key, totals = result.key, result.totals
        values = (
            now if result.error is None else samples[_SUCCESS].get((key,)),
            now,
            round(result.seconds, 3),
            totals.rows_read,
            totals.rows_written,
            totals.rows_swept,
            totals.bytes,
        )
        for name, value in zip(METRICS, values, strict=False):
            if value is not None:
                samples[name][(key,)] = float(value)
        for status in STATUSES:
            samples["exporter_load_status"][(key, status)] = float(status == result.status)
    return samples


def _of_slots(slots: Sequence[Slot]) -> Samples:
    samples: Samples = {name: {} for name in SLOTS}
    for slot in slots:
        read_at = slot.known.read_at.timestamp() if slot.known and slot.known.read_at else None
        values = (
            slot.found.held,
            slot.behind,
            read_at,
            slot.known.seconds if slot.known else None,
            bool(slot.found.lost),
        )
        for name, value in zip(SLOTS, values, strict=True):
            if value is not None:
                samples[name][slot.found.name, slot.found.database or ""] = float(value)
    return samples


def _read(file: Path) -> Samples:
    from prometheus_client.openmetrics.parser import (  # noqa: PLC0415
        text_string_to_metric_families,
    )

    samples: Samples = {name: {} for name in _LABELS}
    try:
        text = file.read_text(encoding="utf-8")
        for family in text_string_to_metric_families(text):  # type: ignore[no-untyped-call]
            for sample in family.samples:
                if sample.name in samples:
                    labels = tuple(sample.labels[one] for one in _LABELS[sample.name])
                    samples[sample.name][labels] = sample.value
    except (
        FileNotFoundError,
        KeyError,
        ValueError,
    ):  # not there yet, or not a metrics file: start over
        return {name: {} for name in _LABELS}
    return samples
