"""A model of first loads by many workers, from what one of them took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """A first load: its seconds; those of its ranges, and the CPU seconds that they took."""

    seconds: float
    copied: float
    source: float
    destination: float
    loaders: float
    client: float
    size: int
    ranges: int


@dataclass(frozen=True)
class Model:
    """What a byte and a range cost, from a run of one worker."""

    alone: float  # bytes a second of one worker while the others have nothing to do
    source: float  # CPU seconds a byte
    destination: float
    loader: float
    client: float  # CPU seconds a range
    commit: float  # seconds a range, one after the other
    size: float  # bytes of a range

    @classmethod
    def of(cls, run: Run, commit: float) -> Model:
        return cls(
            run.size / run.copied,
            run.source / run.size,
            run.destination / run.size,
            run.loaders / run.size,
            run.client / run.ranges,
            commit,
            run.size / run.ranges,
        )

    def shared(self, workers: int, cores: int) -> float:
        """Bytes a second where all parts share these cores."""
        work = self.source + self.destination + self.loader + self.client / self.size
        return min(workers * self.alone, cores / work)

    def apart(self, workers: int, site: Site) -> dict[str, float]:
        """Bytes a second that each part can do; the smallest is what is to be had."""
        return {
            "the workers": workers * self.alone,
            "source, CPU": site.cores / self.source,
            "source, network": site.network,
            "destination, CPU": site.cores / self.destination,
            "destination, disk": site.disk / 2,  # pages and WAL
            "commits in order": self.size / self.commit,
            "client": self.size / self.client,
        }


@dataclass(frozen=True)
class Site:
    """Each database's machine."""

    name: str
    cores: int
    network: float  # bytes a second
    disk: float  # bytes a second, written


SITES = (
    Site("8 cores, 10 Gbit/s, 1 GB/s of disk", 8, 1.1e9, 1e9),
    Site("64 cores, 25 Gbit/s, 4 GB/s of disk", 64, 2.8e9, 4e9),
)
