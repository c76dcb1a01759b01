"""Draws seconds against rows of the first load, from results.json, for the README."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

# a contestant has the same colour in every panel
COLOURS = {
    "exporter": "tab:blue",
    "exporter, by scan": "tab:cyan",
    "psql pipe": "tab:gray",
    "postgres_fdw": "tab:orange",
    "dlt": "tab:green",
}
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "dbt-exporter"  # the same picture from the same figures
    saved = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, phase in zip(axes, ("first load", "1% changed + 1% new"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for one in saved["results"]:
            if one["phase"] == phase:
                lines.setdefault(one["contestant"], []).append((one["rows"], one["seconds"]))
        for name, points in lines.items():
            xs, ys = zip(*sorted(points), strict=True)
            width = 2.5 if name == "exporter" else 1.2
            axis.plot(xs, ys, marker="o", label=name, linewidth=width, color=COLOURS[name])
        axis.set(xscale="log", yscale="log", title=phase, xlabel="rows of the source")
        axis.grid(visible=True, which="major", alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_ylabel("seconds")
    (ROOT / "docs").mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "benchmark.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
