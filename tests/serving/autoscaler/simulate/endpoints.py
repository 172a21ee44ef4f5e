"""Fleets of a fixed size under arrivals that are given, for tests of the simulator itself."""

from __future__ import annotations

import math

import numpy as np

from serving.autoscaler.simulate import fleet as fleets
from serving.autoscaler.simulate import kernel
from serving.autoscaler.simulate.fleet import Fleet, Floats, Rules


def fixed(replicas: int, rules: Rules, speed: Floats | None = None, seed: int = 1) -> Fleet:
    """So many replicas, ready from the beginning."""
    made = fleets.empty(replicas, np.ones(rules.limit + 1) if speed is None else speed, rules, seed)
    for row in range(replicas):
        kernel.create(made, row, 0.0, 0.0, math.inf)
    return made


def poisson(per_second: float, size: int, seed: int) -> Floats:
    """Moments of a Poisson process."""
    return np.cumsum(np.random.default_rng([seed, 1]).exponential(1 / per_second, size))


def drive(fleet: Fleet, at: Floats, work: Floats) -> None:
    """All arrivals, and then until nothing is left."""
    keys = np.zeros(at.size, np.int64)
    assert kernel.advance(fleet, at, work, keys, 0, math.inf) == at.size


def total(fleet: Fleet, name: str) -> float:
    """One of the totals."""
    return float(fleet.whole[name][0])


def left(fleet: Fleet) -> int:
    """Requests that are still there."""
    return int(fleet.rows["serving"].sum() + fleet.rows["waiting"].sum() + fleet.whole["held"][0])
