"""Traffic: when which request comes, and for how much work. NumPy, seeded; nothing is opened here.

`Traffic` is the seam: what `run` replays. Work is seconds of service on an idle replica. Arrivals come in
blocks of some seconds, so that a day of a thousand requests a second is never in memory as a whole; the same
seed gives the same arrivals, whoever asks. A key stands for a client's session, for routing that is sticky.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from serving.autoscaler.simulate.compiled import compiled
from serving.autoscaler.simulate.fleet import Floats, Integers

_BLOCK_REQUESTS = 2_000_000
_SESSIONS = 50_000


class Arrivals(NamedTuple):
    """Requests in order of time."""

    at: Floats  # seconds since the traffic began
    work: Floats
    key: Integers


class Traffic(Protocol):
    """Something that asks an endpoint for `seconds`."""

    @property
    def name(self) -> str: ...

    @property
    def seconds(self) -> int: ...

    def blocks(self, seed: int) -> Iterator[Arrivals]:
        """Every arrival, each block later than the one before."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lognormal:
    """Work of a mean and a coefficient of variation; `cv` 0: always the mean."""

    mean_seconds: float
    cv: float = 1.0

    def draw(self, random: np.random.Generator, size: int) -> Floats:
        """The work of so many requests."""
        variance = math.log1p(self.cv**2)
        location = math.log(self.mean_seconds) - variance / 2
        return np.exp(location + math.sqrt(variance) * random.standard_normal(size))


@dataclasses.dataclass(frozen=True, slots=True)
class Exponential:
    """Work as textbooks have it."""

    mean_seconds: float

    def draw(self, random: np.random.Generator, size: int) -> Floats:
        """The work of so many requests."""
        return self.mean_seconds * random.standard_exponential(size)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenCost:
    """Work of a request to a language model: a fixed part, its prompt, and what it generates. The defaults
    are an accelerator that reads 10,000 tokens a second and writes 50 to each stream."""

    fixed_seconds: float = 0.05
    input_seconds: float = 0.0001
    output_seconds: float = 0.02

    def work(self, inputs: Integers, outputs: Integers) -> Floats:
        """Of each request."""
        return self.fixed_seconds + self.input_seconds * inputs + self.output_seconds * outputs


@dataclasses.dataclass(frozen=True, slots=True)
class Burstiness:
    """The rate is multiplied by a random factor of mean 1 that changes slowly: an Ornstein-Uhlenbeck process
    in its logarithm. `cv` is the factor's, `seconds` the time in which it forgets."""

    cv: float = 0.0
    seconds: float = 30.0

    def factors(self, random: np.random.Generator, size: int) -> Floats:
        """One for each second."""
        if not self.cv:
            return np.ones(size)
        variance = math.log1p(self.cv**2)
        keep = math.exp(-1.0 / self.seconds)
        noise = math.sqrt(variance) * random.standard_normal(size)
        return np.exp(_remembering(noise, keep) - variance / 2)


STEADY = Burstiness()


@compiled
def _remembering(noise: Floats, keep: float) -> Floats:
    found = np.empty_like(noise)
    fresh = math.sqrt(1.0 - keep * keep)
    last = noise[0] if noise.size else 0.0
    for index in range(noise.size):
        last = keep * last + fresh * noise[index] if index else noise[0]
        found[index] = last
    return found


@dataclasses.dataclass(frozen=True)
class Rates:
    """Poisson arrivals of a rate that is given at some moments, and linear between them: arrivals inside the
    bins are seeded, and no policy sees the rate."""

    name: str
    at_seconds: Floats
    per_second: Floats
    work: Lognormal | Exponential
    burstiness: Burstiness = STEADY

    @property
    def seconds(self) -> int:
        """Up to the last moment that has a rate."""
        return int(self.at_seconds[-1] - self.at_seconds[0])

    def blocks(self, seed: int) -> Iterator[Arrivals]:
        """See `Traffic`."""
        moments = np.arange(self.seconds + 1, dtype=np.float64)
        rates = np.interp(moments + self.at_seconds[0], self.at_seconds, self.per_second)
        middle = (rates[1:] + rates[:-1]) / 2
        middle *= self.burstiness.factors(np.random.default_rng([seed, 1]), self.seconds)
        expected = np.concatenate(([0.0], np.cumsum(middle)))
        first, number = 0, 0
        while first < self.seconds:
            last = int(np.searchsorted(expected, expected[first] + _BLOCK_REQUESTS))
            last = min(self.seconds, max(last, first + 1))
            random = np.random.default_rng([seed, 2, number])
            begin, end = expected[first], expected[last]
            size = int(random.poisson(end - begin))
            # Order statistics of a uniform sample: sums of exponentials, scaled; no sort.
            sums = np.cumsum(random.standard_exponential(size + 1))
            places = begin + sums[:-1] * ((end - begin) / sums[-1])
            at = np.interp(places, expected[first : last + 1], moments[first : last + 1])
            yield Arrivals(at, self.work.draw(random, size), random.integers(0, _SESSIONS, size))
            first, number = last, number + 1


@dataclasses.dataclass(frozen=True)
class Replay:
    """Requests as they were, so many copies of each: copies come up to `jitter_seconds` before or after, so
    that bursts longer than that stay, and no request of the trace is left out. The session is the original
    request's."""

    name: str
    at_seconds: Floats
    work: Floats
    copies: int = 1
    jitter_seconds: float = 2.0

    @property
    def seconds(self) -> int:
        """Until the last request came."""
        return math.ceil(float(self.at_seconds[-1])) if self.at_seconds.size else 0

    def blocks(self, seed: int) -> Iterator[Arrivals]:
        """See `Traffic`. One block: traces are short."""
        random = np.random.default_rng([seed, 3])
        at = np.repeat(self.at_seconds, self.copies)
        key = np.repeat(np.arange(self.at_seconds.size), self.copies)
        if self.copies > 1:
            at = at + random.uniform(-self.jitter_seconds, self.jitter_seconds, at.size)
            # What the jitter moves over an end of the trace is mirrored there.
            at = np.abs(at)
            at = np.where(at > self.seconds, 2 * self.seconds - at, at)
        order = np.argsort(at, kind="stable")
        yield Arrivals(at[order], np.repeat(self.work, self.copies)[order], key[order])


def shape(
    name: str,
    points: Sequence[tuple[float, float]],
    work: Lognormal | Exponential,
    burstiness: Burstiness = STEADY,
    exponential: bool = False,
) -> Rates:
    """Rates through (second, requests a second), linear between them, or exponential."""
    seconds = np.array([second for second, _ in points], np.float64)
    rates = np.array([rate for _, rate in points], np.float64)
    if exponential:
        every = np.arange(seconds[0], seconds[-1] + 0.25, 0.25)
        rates, seconds = np.exp(np.interp(every, seconds, np.log(rates))), every
    return Rates(name, seconds, rates, work, burstiness)


def diurnal(
    name: str,
    mean_per_second: float,
    swing: float,
    seconds: int,
    work: Lognormal | Exponential,
    burstiness: Burstiness = STEADY,
) -> Rates:
    """A day as a cosine, from its low at the beginning: the mean times 1 -/+ `swing`."""
    moments = np.arange(0, seconds + 1, 60, dtype=np.float64)
    rates = mean_per_second * (1 - swing * np.cos(2 * np.pi * moments / 86_400))
    return Rates(name, moments, rates, work, burstiness)


def in_flight(traffic: Traffic, seed: int) -> Floats:
    """What a policy cannot know: requests in flight at each whole second if none ever waited."""
    change = np.zeros(traffic.seconds + 2)
    for block in traffic.blocks(seed):
        for moments, sign in ((block.at, 1.0), (block.at + block.work, -1.0)):
            seconds = np.minimum(np.ceil(moments), traffic.seconds + 1).astype(np.int64)
            counted = np.bincount(seconds)
            change[: counted.size] += sign * counted
    return np.cumsum(change)[: traffic.seconds + 1]
