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

GRAIN_SECONDS = 0.9
"""Of a bucket. Below the usual second between decisions, so that each has its own."""
KEPT_SECONDS = 64.0
"""In buckets as they came."""
_COARSE_SECONDS = 8.0
"""Of a bucket that is older, where more is kept."""
_PEAKS = 60
"""Entries of a peak at most: its window forgets with the precision of a sixtieth."""
_MEDIAN_OF_CHI_SQUARED = 0.455
_GROWTH_EVIDENCE = 4.5
"""Standard deviations that growth must be worth at the least: several lengths of windows are tried each
second. At 3, steady Poisson load gave three false alarms in nine hours, at 4.5 none."""
_LEAST_RATE = 1e-6
"""A second, from which on ratios of rates mean something, and are numbers."""
_LEAST_RATIOS = 3
"""That a median is taken of."""


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


def appended(history: History, bucket: Bucket, kept_seconds: float = KEPT_SECONDS) -> History:
    """With one bucket more, and without what is older than is kept."""
    if history and history[-1].seconds < GRAIN_SECONDS:
        history, bucket = history[:-1], history[-1].joined(bucket)
    history = (*history, bucket)
    fine = _fine(history)
    return (*_coarse(history[:fine], kept_seconds - KEPT_SECONDS), *history[fine:])


def recent(history: History) -> History:
    """What of it is in buckets as they came."""
    return history[_fine(history) :]


def _fine(history: History) -> int:
    """The first bucket of the last `KEPT_SECONDS`; the newest one is always in them."""
    first = len(history) - 1
    kept = history[first].seconds if history else 0.0
    while first > 0 and kept + history[first - 1].seconds <= KEPT_SECONDS:
        first -= 1
        kept += history[first].seconds
    return max(0, first)


def _coarse(past: History, kept_seconds: float) -> History:
    """What is older, in longer buckets; nothing of it where no more is kept."""
    if kept_seconds <= 0:
        return ()
    while len(past) > 1 and past[-2].seconds < _COARSE_SECONDS:
        past = (*past[:-2], past[-2].joined(past[-1]))
    first = len(past)
    while first and kept_seconds > 0:
        first -= 1
        kept_seconds -= past[first].seconds
    return past[first:]


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """Variance of what arrives in 1, 2, 4, ... buckets, as a multiple of a Poisson process's: 1 for one, more
    where requests come in bursts or count differently. A burst that lasts four seconds is noise among windows
    of eight, and looks like growth among windows of one: so no scale has less than a finer one, nor less than
    the next coarser one."""

    at_scale: tuple[float, ...]

    def over(self, buckets: float) -> float:
        """For windows of that many."""
        scale = max(0, math.ceil(math.log2(buckets)) if buckets > 1 else 0)
        return self.at_scale[min(scale, len(self.at_scale) - 1)]


def spread(history: History) -> Spread:
    """From what three neighbouring windows of a scale differ by beyond a straight line, so that a trend is no
    variance, and by the median, so that a step is none either."""
    sums = list(itertools.accumulate([bucket.arrivals for bucket in history], initial=0.0))
    found: list[float] = []
    length = 1
    while True:
        counts = [after - before for before, after in zip(sums, sums[length:], strict=False)]
        # Windows that overlap by half: more of them, at hardly less information each.
        step = max(1, length // 2)
        ones, others, thirds = counts[::step], counts[length::step], counts[2 * length :: step]
        ratios = [
            (one - 2 * other + third) ** 2 / total
            for one, other, third in zip(ones, others, thirds, strict=False)
            if (total := one + 4 * other + third) > 0
        ]
        if len(ratios) < _LEAST_RATIOS:
            break
        ratios.sort()
        found.append(max([1.0, *found[-1:], ratios[len(ratios) // 2] / _MEDIAN_OF_CHI_SQUARED]))
        length *= 2
    return Spread((*found[1:], found[-1]) if found else (1.0,))


def growth(history: History, evidence: float, lasting_seconds: float) -> tuple[float, float]:
    """By what factor arrivals grow in a second, and for how many seconds they have: the best that is proven.

    A window is cut into four equal parts, and its growth is the least of the three from part to part, so that
    a step, which lies in one part, is none. The three together must exceed chance by `evidence`
    standard deviations, and no fewer than 4.5, with the variance of parts this long, and have lasted
    `lasting_seconds`. (1, 0) where nothing grows.
    """
    best, best_seconds = 1.0, 0.0
    evidence = max(_GROWTH_EVIDENCE, evidence)
    found: Spread | None = None
    arrivals = [bucket.arrivals for bucket in history]
    lasted = [bucket.seconds for bucket in history]
    for part in (1, 2, 4, 8, 16):
        first = len(history) - 4 * part
        if first < 0:
            break
        if sum(lasted[first:]) < lasting_seconds:
            continue
        # The outer two first: mostly they say that nothing grows.
        counts = [sum(arrivals[cut : cut + part]) for cut in (first, len(history) - part)]
        seconds = [sum(lasted[cut : cut + part]) for cut in (first, len(history) - part)]
        rates = [count / span for count, span in zip(counts, seconds, strict=True)]
        if rates[0] < _LEAST_RATE or rates[1] <= rates[0]:
            continue
        rise, chance = math.log(rates[1] / rates[0]), math.sqrt(1 / counts[0] + 1 / counts[1])
        if rise < evidence * chance:  # no spread is below a Poisson process's
            continue
        found = found or spread(history)
        if rise < evidence * chance * math.sqrt(found.over(part)):
            continue
        for place, cut in ((1, first + part), (2, first + 2 * part)):
            seconds.insert(place, sum(lasted[cut : cut + part]))
            rates.insert(place, sum(arrivals[cut : cut + part]) / seconds[place])
        if min(rates) < _LEAST_RATE:
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
        entries, last, first = self.entries, len(self.entries), 0
        while last and entries[last - 1][1] <= value:
            last -= 1
        while first < last and entries[first][0] < stamp - window_seconds:
            first += 1
        # As old as the grain that it lies in: a larger peak of the same seconds forgets at the same moments.
        grain = window_seconds / _PEAKS
        began = math.floor(stamp / grain) * grain
        if first < last and entries[last - 1][0] >= began:
            return self if (first, last) == (0, len(entries)) else Peak(entries[first:last])
        return Peak((*entries[first:last], (began, value)))
