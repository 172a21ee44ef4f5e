"""The world that policies are judged in: when nodes are asked for and released, and how long new ones take.
Pure: every draw comes from a seed.

A trace tells rates per bin. The service model makes nodes of them: `ceil(rate / rate_per_node)`, with no
smoothing, so that each change of a bin's number is as many requests or releases, at uniformly random moments
within that bin. Each bin has a random generator of its own, so that another future leaves the past as it was.
In a bin without a number nothing happens, and demand is unknown to policies; what changed meanwhile comes in
the next bin that has one.

Provisioning times are drawn from the quantiles that were measured of real model loads; a boot comes on top,
uniform between its bounds.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from warmpool import demand
from warmpool.demand import Bools, Floats, Record
from warmpool.demand_files import Series

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class LeadModel:
    """Provisioning by its 50th, 90th and 99th percentile in seconds, joined by straight lines from half of
    the first on; no draw is above the last. The bounds of a boot."""

    provisioning_seconds: tuple[float, float, float] = (22.7, 42.0, 51.8)
    boot_seconds: tuple[float, float] = (60.0, 180.0)

    def draw(self, count: int, seed: int) -> Floats:
        """So many lead times, from request to warm."""
        random = np.random.default_rng((seed, 1))
        seconds = (self.provisioning_seconds[0] / 2, *self.provisioning_seconds, self.provisioning_seconds[2])
        provisioning = np.interp(random.uniform(size=count), (0.0, 0.5, 0.9, 0.99, 1.0), seconds)
        return np.asarray(provisioning + random.uniform(*self.boot_seconds, size=count), float)


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """`changes[i]` is +1 (a node is asked for) or -1 (one is released) at `times[i]`; `first` nodes at the
    begin. `known[bin]` says where the trace has a number."""

    name: str
    begin: float
    step_seconds: float
    first: int
    times: Floats
    changes: Ints
    known: Bools

    @property
    def end(self) -> float:
        return self.begin + self.step_seconds * len(self.known)

    def looks(self, begin: float, end: float, every_seconds: float) -> Floats:
        """The moments at which policies look."""
        return np.arange(begin, end, every_seconds, dtype=np.float64)

    def levels(self, at: Floats) -> Floats:
        """Nodes in demand at each moment, seen or not."""
        sums = np.concatenate([[0], np.cumsum(self.changes)])
        return np.asarray(self.first + sums[np.searchsorted(self.times, at, side="right")], float)

    def seen(self, at: Floats) -> Floats:
        """The same as a policy sees it: NaN in a gap."""
        bins = np.clip((at - self.begin) // self.step_seconds, 0, len(self.known) - 1).astype(int)
        return np.where(self.known[bins], self.levels(at), np.nan)

    def record(self, looks: Floats) -> Record:
        """What a policy that looked at these moments remembers."""
        wanted = [None if np.isnan(each) else int(each) for each in self.seen(looks)]
        return demand.record_of(looks.tolist(), wanted)

    def count(self, change: int, begin: Floats, end: Floats) -> Ints:
        """How many nodes are asked for (+1), or released (-1), after `begin` and up to `end`."""
        moments = self.times[self.changes == change]
        return np.asarray(
            np.searchsorted(moments, end, side="right") - np.searchsorted(moments, begin, side="right"),
            np.int64,
        )


def world(series: Series, rate_per_node: float, seed: int) -> World:
    """Demand for nodes, from a series of rates."""
    nodes = np.ceil(series.values / rate_per_node)
    known = ~np.isnan(nodes)
    previous = int(nodes[known][0]) if known.any() else 0
    first = previous
    times: list[Floats] = []
    changes: list[Ints] = []
    for number in np.flatnonzero(known):
        change = int(nodes[number]) - previous
        if change:
            random = np.random.default_rng((seed, 0, int(number)))
            begin = series.begin + number * series.step_seconds
            times.append(np.sort(random.uniform(begin, begin + series.step_seconds, abs(change))))
            changes.append(np.full(abs(change), np.sign(change), np.int64))
            previous += change
    return World(
        series.name,
        series.begin,
        series.step_seconds,
        first,
        np.concatenate(times) if times else np.zeros(0),
        np.concatenate(changes) if changes else np.zeros(0, np.int64),
        known,
    )
