"""The last run of each definition in OpenMetrics' text, for a node exporter to collect."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import ExporterError
from exporter.state import Result

if TYPE_CHECKING:
    from prometheus_client import Metric

STATUSES = ("ok", "failed", "locked", "interrupted")
_SUCCESS = "exporter_load_last_success_timestamp_seconds"
METRICS = {
    _SUCCESS: "When the last load that ended well did so.",
    "exporter_load_last_run_timestamp_seconds": "When the last load ended.",
    "exporter_load_duration_seconds": "How long the last load took.",
    "exporter_load_rows_read": "Rows that the last load read at the source.",
    "exporter_load_rows_written": "Rows that the last load changed in raw.",
    "exporter_load_bytes": "Bytes that the last load read.",
    "exporter_load_status": "1 for the status of the last load: " + ", ".join(STATUSES) + ".",
}
Samples = dict[str, dict[tuple[str, ...], float]]  # metric → (key,) or (key, status) → value


def write(file: Path, results: list[Result], now: float) -> None:
    """Write the file anew, whole at every moment. Keys of other runs stay, as last successes do.

    Raises ExporterError where prometheus-client is missing, OSError.
    """
    try:
        import prometheus_client.openmetrics.exposition as openmetrics  # noqa: PLC0415
        from prometheus_client import CollectorRegistry  # noqa: PLC0415  only for --metrics-file
        from prometheus_client.registry import Collector  # noqa: PLC0415
    except ImportError:
        raise ExporterError(
            "prometheus-client is not installed: pip install 'dbt-exporter[metrics]'"
        ) from None
    samples = _updated(_read(file), results, now)

    class Ours(Collector):
        def collect(self) -> Iterator[Metric]:
            return _families(samples)

    registry = CollectorRegistry()
    registry.register(Ours())
    # In the same folder, so that the exchange is one step; not *.prom, which would be collected.
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
    for one in results:
        values = (
            now if one.error is None else samples[_SUCCESS].get((one.key,)),
            now,
            round(one.seconds, 3),
            one.totals.rows_read,
            one.totals.rows_written,
            one.totals.bytes,
        )
        for name, value in zip(METRICS, values, strict=False):
            if value is not None:
                samples[name][(one.key,)] = float(value)
        for status in STATUSES:
            samples["exporter_load_status"][(one.key, status)] = float(status == one.status)
    return samples


def _read(file: Path) -> Samples:
    from prometheus_client.openmetrics.parser import (  # noqa: PLC0415
        text_string_to_metric_families,
    )

    samples: Samples = {name: {} for name in METRICS}
    try:
        text = file.read_text(encoding="utf-8")
        for family in text_string_to_metric_families(text):  # type: ignore[no-untyped-call]
            for sample in family.samples:
                if sample.name in samples:
                    samples[sample.name][tuple(sample.labels.values())] = sample.value
    except (FileNotFoundError, ValueError):  # the first one, or not ours: written anew
        return {name: {} for name in METRICS}
    return samples


def _families(samples: Samples) -> Iterator[Metric]:
    from prometheus_client.metrics_core import GaugeMetricFamily  # noqa: PLC0415

    for name, meaning in METRICS.items():
        labels = ["key", "status"] if name == "exporter_load_status" else ["key"]
        family = GaugeMetricFamily(name, meaning, labels=labels)
        for values, value in sorted(samples[name].items()):
            family.add_metric(values, value)
        yield family
