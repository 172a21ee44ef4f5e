"""How many nodes are worth holding: the newsvendor's question, asked of each node. Pure.

Requests come as a Poisson process of an uncertain rate (gamma), so the number within a lead time is negative
binomial. A node asked for now is ready one lead time L from now. Were it the k-th that is held or coming, it
is of use at that moment only if exactly k - 1 requests have come by then and one more comes; it is idle if at
most k - 1 have come. So in each second

    it saves    miss cost * rate given k - 1 requests * P(N(L) = k - 1)
    it costs    idle cost * P(N(L) <= k - 1)

and the k-th node is worth holding while the first is at least the second. That a burst's first requests raise
the rate of those that follow is in "rate given k - 1 requests". Both sides are averaged over the distribution
of lead times. Among all ways to choose sizes over time this one has, by Lagrange's rule, the fewest misses
for its idle time, as far as the distribution is right: sweeping the ratio of the costs draws the frontier.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from warmpool.demand import Floats


def sides(rates: Floats, dispersions: Floats, leads: Floats, most: int) -> tuple[Floats, Floats]:
    """For each rate (requests a second, and its dispersion), what the first, second ... node up to `most`
    saves, in misses a second, and how probably it is idle; each (rates, most). `leads` are equally likely
    lead times in seconds."""
    shape = dispersions[:, None]
    saved = np.zeros((len(rates), most))
    idle = np.zeros((len(rates), most))
    if most:
        for lead in leads:
            mean = np.maximum(rates[:, None] * lead, 1e-12)
            chance = _chances(mean, shape, most)
            rate = (shape + np.arange(most)) / (shape / np.maximum(rates[:, None], 1e-12) + lead)
            saved += rate * chance
            idle += np.cumsum(chance, axis=1)
    return saved / len(leads), idle / len(leads)


def worth_holding(saved: Floats, idle: Floats, idle_per_miss: float) -> npt.NDArray[np.int64]:
    """For each row of `sides`, the last node that saves at least what it costs. `idle_per_miss` is the cost
    of an idle second of a node over the cost of a miss."""
    most = saved.shape[1]
    if not most:
        return np.zeros(len(saved), np.int64)
    worth = saved >= idle_per_miss * idle
    return np.where(worth.any(axis=1), most - np.argmax(worth[:, ::-1], axis=1), 0)


def _chances(mean: Floats, shape: Floats, most: int) -> Floats:
    """P(N = 0 .. most - 1) of negative binomials, in logarithms so that large means do not vanish."""
    grows = np.arange(1, most)
    terms = np.log((shape + grows - 1) / grows) + np.log(mean / (shape + mean))
    first = shape * np.log(shape / (shape + mean))
    return np.asarray(np.exp(np.concatenate([first, first + np.cumsum(terms, axis=1)], axis=1)), float)


def covered(rate: float, dispersion: float, leads: Floats, size: int) -> float:
    """How probable it is that no more than `size` nodes are asked for within a lead time."""
    mean = np.maximum(rate * leads, 1e-12)[:, None]
    return float(_chances(mean, np.full((1, 1), dispersion), size + 1).sum(axis=1).mean())
