"""The ramp: from rate to rate, until an objective breaks.

Runs in one event loop; each step waits for its last answer before the next begins, so that no step pays for
the one before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable

from serving import errors
from serving.stress import arrivals, judgement, load


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Rates in requests a second: `first`, then each `growth` times the one before, up to `last`."""

    first: float
    last: float
    growth: float = 1.25
    step_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.last:
            raise errors.DocumentError(f"--from {self.first:g} --to {self.last:g}: give 0 < from <= to")
        if not self.growth > 1:
            raise errors.DocumentError(f"--growth {self.growth:g}: must be above 1, or the ramp has no end")
        if not self.step_seconds > 0:
            raise errors.DocumentError(f"--step {self.step_seconds:g} s: must be above 0")

    def rates(self) -> list[float]:
        """Every rate of the ramp, the last one included."""
        found = []
        rate = self.first
        while rate < self.last:
            found.append(rate)
            rate *= self.growth
        return [*found, self.last]


def run(
    shape: Shape,
    sender: load.Sender,
    objectives: judgement.Objectives,
    traffic: arrivals.Trace | arrivals.Tokens,
    seed: int,
    said: Callable[[judgement.Step], None],
) -> list[judgement.Step]:
    """Measure step after step, the one that breaks included; `said` hears each. The same seed gives the same
    schedule."""
    return asyncio.run(_run(shape, sender, objectives, traffic, seed, said))


async def _run(
    shape: Shape,
    sender: load.Sender,
    objectives: judgement.Objectives,
    traffic: arrivals.Trace | arrivals.Tokens,
    seed: int,
    said: Callable[[judgement.Step], None],
) -> list[judgement.Step]:
    numbers = random.Random(seed)  # noqa: S311 - it is a schedule
    replay = arrivals.Replay(traffic) if isinstance(traffic, arrivals.Trace) else None
    steps = []
    for rate in shape.rates():
        if replay is not None:
            schedule = replay.step(rate, shape.step_seconds)
        else:
            assert isinstance(traffic, arrivals.Tokens)
            schedule = arrivals.poisson(rate, shape.step_seconds, traffic, numbers.random)
        samples = await sender.send(schedule)
        step = judgement.summarize(rate, shape.step_seconds, samples, objectives)
        steps.append(step)
        said(step)
        if step.broken:
            break
    return steps
