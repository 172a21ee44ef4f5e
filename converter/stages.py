"""What each stage of a conversion costs: bytes, seconds and processor seconds, summed over its threads.

One `Meter` per image, made by the pipeline and printed with the report. Each thread, or piece of work in a
pool, holds a `Laps` of its own, a stopwatch that is in one stage at a time, so that a stage's time excludes
that of the stages which it calls. Two clocks are read per piece of 1 MiB, not per entry: always on.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
import time
from collections.abc import Iterator
from typing import Final


class Stage(enum.Enum):
    """In the order in which bytes go through them. READ and UPLOAD wait for an origin, WRITE for the spool
    folder's disk; the others compute."""

    READ = "read"
    SOURCE_DIGEST = "source_digest"
    INFLATE = "inflate"
    TAR_DIGEST = "tar_digest"
    TREE = "tree"
    BLOCK_DIGEST = "block_digest"
    COMPRESS = "compress"
    WRITE = "write"
    BLOB_DIGEST = "blob_digest"
    UPLOAD = "upload"


@dataclasses.dataclass(frozen=True, slots=True)
class Times:
    """One stage. `bytes` is what came out of it, but what went into it where it digests or compresses.
    `busy_seconds` counts its threads' time but for what they wait for one another, so that it exceeds the
    conversion's where several are at work, and includes waiting for a processor; `processor_seconds` does
    not, and `mb_per_second` (10^6 bytes) is per processor second."""

    stage: str
    bytes: int
    busy_seconds: float
    processor_seconds: float
    mb_per_second: float


class Meter:
    """Sums. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = {stage: [0.0, 0.0, 0.0] for stage in Stage}

    def laps(self) -> Laps:
        """A stopwatch for one thread."""
        return Laps(self)

    def add(self, laps: dict[Stage, list[float]]) -> None:
        """Bytes, seconds and processor seconds by stage."""
        with self._lock:
            for stage, values in laps.items():
                self._sums[stage] = [a + b for a, b in zip(self._sums[stage], values, strict=True)]

    def times(self) -> tuple[Times, ...]:
        """Every stage that anything went through."""
        with self._lock:
            return tuple(
                Times(stage.value, int(count), busy, processor, count / 1e6 / max(processor, 1e-9))
                for stage, (count, busy, processor) in self._sums.items()
                if count
            )


class Laps:
    """One thread's stopwatch. The sums count once it was left (`with`)."""

    def __init__(self, meter: Meter) -> None:
        self.meter: Final = meter
        self._sums: dict[Stage, list[float]] = {}
        self._stage: Stage | None = None
        self._at = 0.0
        self._processor_at = 0.0

    def enter(self, stage: Stage | None, byte_count: int = 0) -> Stage | None:
        """Go over to a stage, or to none; returns the one before, through which `byte_count` went."""
        before = self._stage
        now, processor_now = time.monotonic(), time.thread_time()
        if before is not None:
            sums = self._sums.setdefault(before, [0.0, 0.0, 0.0])
            sums[0] += byte_count
            sums[1] += now - self._at
            sums[2] += processor_now - self._processor_at
        self._stage, self._at, self._processor_at = stage, now, processor_now
        return before

    def through(self, stage: Stage, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The pieces; what the iterator does for them, other stages' iterators apart, is the stage's."""
        while True:
            around = self.enter(stage)
            piece = next(pieces, None)
            self.enter(around, 0 if piece is None else len(piece))
            if piece is None:
                return
            yield piece

    def __enter__(self) -> Laps:
        return self

    def __exit__(self, *exc: object) -> None:
        self.enter(None)
        self.meter.add(self._sums)
