"""What was measured: starts, series of starts, and the whole of one benchmark. Pure.

Times are seconds since the start began, by the monotonic clock.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from glowplug.startup.speed import Speed

MOUNTED = "mounted"
FIRST_OUTPUT = "first output"
READY = "ready"
MARKS = (MOUNTED, FIRST_OUTPUT, READY)

CONTAINERD = "containerd"
TUNED = "tuned"
BLOCKS = "blocks"
PACK = "pack"
WARM = "warm"
WHOLE = "whole"
LOCAL = "local"
LAZY = (BLOCKS, PACK, WARM, WHOLE)
MODES = (CONTAINERD, TUNED, *LAZY, LOCAL)
PULLED = (CONTAINERD, TUNED)
COLD = (CONTAINERD, TUNED, BLOCKS, PACK)
"""The modes that bring the image over the link."""
USUAL = tuple(mode for mode in MODES if mode != WHOLE)
"""Unless somebody chooses: `WHOLE` reads all of the image first, and needs its room twice."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the block image, or its boot pack, as the report names it."""

    name: str
    digest: str
    blocks: int
    compressed_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Fetch:
    """One block that came from the origin. `layer` is its place in Measurement.layers."""

    layer: int
    block: int
    demand: bool
    reason: str
    compressed_bytes: int
    wanted_seconds: float
    started_seconds: float
    arrived_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """A start. A mark that could not be seen is missing in `seconds`, but `READY` never is. `flow` is what
    had come over the link at these moments; `waits` counts reads that waited for a block which was not on its
    way, None where nobody counts."""

    began_ns: int
    seconds: Mapping[str, float]
    moved_bytes: int
    requests: int
    flow: tuple[tuple[float, int], ...]
    fetches: tuple[Fetch, ...] = ()
    waits: int | None = None

    @property
    def ready_seconds(self) -> float:
        """Seconds from the command to ready."""
        return self.seconds[READY]


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """All starts of one kind, in run order."""

    mode: str
    label: str
    starts: tuple[Start, ...]

    def median(self, mark: str = READY) -> float | None:
        """Median of the seconds to a mark, None where it was not seen in every start."""
        values = [start.seconds.get(mark) for start in self.starts]
        known = [value for value in values if value is not None]
        return statistics.median(known) if len(known) == len(values) else None

    @property
    def ready_seconds(self) -> float:
        """Median seconds to ready."""
        return statistics.median(start.ready_seconds for start in self.starts)

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest start, seconds to ready."""
        times = [start.ready_seconds for start in self.starts]
        return min(times), max(times)

    @property
    def moved_bytes(self) -> float:
        """Median of the bytes that came over the link."""
        return statistics.median(start.moved_bytes for start in self.starts)

    @property
    def requests(self) -> float:
        """Median of the requests that the registry answered."""
        return statistics.median(start.requests for start in self.starts)

    @property
    def waits(self) -> float | None:
        """Median of the reads that waited for a block which was not on its way."""
        counts = [start.waits for start in self.starts if start.waits is not None]
        return statistics.median(counts) if counts else None

    @property
    def typical(self) -> Start:
        """The start in the middle, the one to draw."""
        return sorted(self.starts, key=lambda start: start.ready_seconds)[len(self.starts) // 2]


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """One image and command on one link."""

    image: str
    command: tuple[str, ...]
    until: str
    speed: Speed
    machine: Mapping[str, str | int]
    source_bytes: int
    """The source image's layers as they are stored, compressed."""
    unpacked_bytes: int
    layers: tuple[Layer, ...]
    """The boot pack first, if there is one, then the layers, bottom first; empty if no mode was lazy."""
    series: tuple[Series, ...]

    def of(self, mode: str) -> Series | None:
        """The first series of a mode."""
        return next((series for series in self.series if series.mode == mode), None)

    def limit_seconds(self, series: Series) -> float | None:
        """The physical limit: the link's time for the bytes that this kind moves, then a warm start of the
        same run. A start that works while bytes arrive can be sooner. None without a warm start, and for
        modes that need no link."""
        warm = self.of(WARM)
        if warm is None or series.mode not in COLD:
            return None
        return self.speed.seconds(series.moved_bytes) + warm.ready_seconds

    def document(self) -> dict[str, Any]:
        """All of it, and what follows from it, for programs."""
        whole = dataclasses.asdict(self)
        for series, values in zip(self.series, whole["series"], strict=True):
            values |= {
                "median_seconds": {mark: series.median(mark) for mark in MARKS},
                "spread_seconds": series.spread,
                "median_moved_bytes": series.moved_bytes,
                "median_requests": series.requests,
                "median_waits": series.waits,
                "limit_seconds": self.limit_seconds(series),
            }
        return whole
