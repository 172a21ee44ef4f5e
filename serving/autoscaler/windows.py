"""What is remembered of the last minutes: counts in buckets, and the largest of a long window. Pure.

Used by `serving.autoscaler.horizontal`. Both have a bounded length, whatever the cadence of decisions: a
value that comes sooner than a grain after the last one joins its bucket. Stamps are on the clock of observed
time (`State.seen_seconds`), which stands still while nothing is known: so what nobody saw ages nothing, and
neither a clock that jumps nor a restart empties a window.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

GRAIN_SECONDS = 0.9
"""Of a bucket. Below the usual second between decisions, so that each has its own."""
KEPT_SECONDS = 64.0
_PEAKS = 60
"""Entries of a peak at most: its window forgets with the precision of a sixtieth."""
_MEDIAN_OF_CHI_SQUARED = 0.455


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """A piece of observed time. `arrivals` is what came, wherever it went; `served` what went to replicas
    and, half counted each, what of it stayed there; `busy_seconds` the time in service summed over requests
    (both 0 while replicas were crowded, because service takes longer then)."""

    seconds: float
    arrivals: float
    in_service: float
    served: float
    busy_seconds: float

    def joined(self, other: Bucket) -> Bucket:
        """Both as one, this one's time first."""
        seconds = self.seconds + other.seconds
        return Bucket(
            seconds,
            self.arrivals + other.arrivals,
            (self.in_service * self.seconds + other.in_service * other.seconds) / seconds if seconds else 0.0,
            self.served + other.served,
            self.busy_seconds + other.busy_seconds,
        )


History = tuple[Bucket, ...]
"""Oldest first."""


def appended(history: History, bucket: Bucket) -> History:
    """With one bucket more, and without what is older than is kept."""
    if history and history[-1].seconds < GRAIN_SECONDS:
        history, bucket = history[:-1], history[-1].joined(bucket)
    kept = bucket.seconds
    first = len(history)
    while first and kept + history[first - 1].seconds <= KEPT_SECONDS:
        first -= 1
        kept += history[first].seconds
    return (*history[first:], bucket)


def newest(history: History) -> Iterator[Bucket]:
    """The last second or so, the last two, four, ..., all: each as one bucket."""
    whole = Bucket(0.0, 0.0, 0.0, 0.0, 0.0)
    wanted, said = GRAIN_SECONDS, True
    for bucket in reversed(history):
        whole, said = bucket.joined(whole), False
        if whole.seconds >= wanted:
            yield whole
            wanted, said = 2 * whole.seconds, True
    if not said:
        yield whole


def dispersion(history: History) -> float:
    """Variance of what arrives, as a multiple of a Poisson process's: 1 for one, more where requests come in
    bursts or count differently. From neighbouring buckets, so that a trend is no variance, and by the
    median, so that a step is none either."""
    ratios = sorted(
        (later.arrivals - earlier.arrivals) ** 2 / total
        for earlier, later in itertools.pairwise(history)
        if (total := earlier.arrivals + later.arrivals) > 0
    )
    return max(1.0, ratios[len(ratios) // 2] / _MEDIAN_OF_CHI_SQUARED) if ratios else 1.0


def growth(history: History, evidence: float, spread: float) -> tuple[float, float]:
    """By what factor arrivals grow in a second, and for how many seconds they have: the best that is proven.

    A window is cut into four equal parts, and its growth is the least of the three from part to part, so that
    a step, which lies in one part, is none. The three together must exceed chance by `evidence` standard
    deviations, with variances `spread` times Poisson's. (1, 0) where nothing grows.
    """
    best, best_seconds = 1.0, 0.0
    for part in (1, 2, 4, 8, 16):
        if 4 * part > len(history):
            break
        parts = [history[-(k + 1) * part : len(history) - k * part] for k in (3, 2, 1, 0)]
        counts = [sum(each.arrivals for each in one) for one in parts]
        seconds = [sum(each.seconds for each in one) for one in parts]
        rates = [count / span for count, span in zip(counts, seconds, strict=True)]
        if min(rates) <= 0:
            continue
        chance = math.sqrt(spread * (1 / counts[0] + 1 / counts[3]))
        if math.log(rates[3] / rates[0]) < evidence * chance:
            continue
        least = min(later / earlier for earlier, later in itertools.pairwise(rates))
        factor = least ** (1 / (sum(seconds) / 4))
        if factor > best:
            best, best_seconds = factor, sum(seconds)
    return best, best_seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Peak:
    """The largest value of a window that moves: (stamp, value), stamps rising, values falling."""

    entries: tuple[tuple[float, float], ...] = ()

    @property
    def value(self) -> float:
        """The largest; 0 of nothing."""
        return self.entries[0][1] if self.entries else 0.0

    def pushed(self, stamp: float, value: float, window_seconds: float) -> Peak:
        """With a value more, and without what is older than the window."""
        kept: Sequence[tuple[float, float]] = self.entries
        while kept and kept[-1][1] <= value:
            kept = kept[:-1]
        grain = window_seconds / _PEAKS
        # A smaller value soon after a larger one adds nothing until that one is forgotten, a grain from now.
        if not kept or stamp - kept[-1][0] >= grain:
            kept = (*kept, (stamp, value))
        first = 0
        while kept[first][0] < stamp - window_seconds:
            first += 1
        return Peak(tuple(kept[first:]))
