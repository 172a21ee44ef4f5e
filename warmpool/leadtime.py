"""How long a node takes from its request until it is warm: learned, from every node that comes. Pure.

Called by `warmpool.outlook` at each look. Provisioning, boot and prefetch are one time here, because the pool
can only wait for all of them. Until enough nodes have come, what the policy says makes up for those that
lack. A node that is on its way for longer than nearly all did counts with its age: what never comes would
otherwise never be learned from.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from warmpool.demand import Floats
from warmpool.observation import COMING, Node
from warmpool.policy import LeadTime

KEPT = 200
"""So many latest nodes: a cloud changes over weeks, not over one burst."""


@dataclasses.dataclass(frozen=True, slots=True)
class Learned:
    """What the latest nodes took, the oldest first, and the moment up to which they were counted."""

    seconds: tuple[float, ...] = ()
    until: float = -math.inf

    def seen(self, nodes: Iterable[Node]) -> Learned:
        """With the nodes that became warm since."""
        new = sorted(
            (node.warm_at, node.warm_at - node.requested_at)
            for node in nodes
            if node.warm_at is not None and node.requested_at is not None and node.warm_at > self.until
        )
        if not new:
            return self
        took = tuple(round(seconds, 1) for _, seconds in new if seconds >= 0)
        return Learned((*self.seconds, *took)[-KEPT:], new[-1][0])


def quantiles(learned: Learned, prior: LeadTime, ages: Sequence[float], points: int) -> Floats:
    """`points` lead times that are equally likely, rising. `ages` is how long the nodes are on their way that
    have not come yet."""
    lacking = max(0, prior.believed_until - len(learned.seconds))
    thought = _lognormal(prior, lacking) if lacking else []
    known = np.sort(np.array([*learned.seconds, *thought]))
    late = [age for age in ages if age > float(np.quantile(known, 0.95))]
    levels = (np.arange(points) + 0.5) / points
    return np.asarray(np.maximum(np.quantile(np.array([*known, *late]), levels), 1.0), float)


def _lognormal(prior: LeadTime, count: int) -> list[float]:
    normal = statistics.NormalDist()
    sigma = math.log(prior.p99_seconds / prior.p50_seconds) / normal.inv_cdf(0.99)
    return [
        prior.p50_seconds * math.exp(sigma * normal.inv_cdf((each + 0.5) / count)) for each in range(count)
    ]


def ages(nodes: Iterable[Node], now: float) -> list[float]:
    """How long the nodes are on their way that have not come yet."""
    return [
        now - node.requested_at for node in nodes if node.state in COMING and node.requested_at is not None
    ]
