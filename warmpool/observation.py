"""What the warm pool sees, and what it says: values. Pure.

Made by the controller from a provider and the sources of demand (the back-test makes them from its own
state), read by `warmpool.decide`. An observation is made every few seconds to a minute; nothing in it is a
difference to the last one, so a look that fails, or comes twice, loses nothing. Times are seconds on one
clock, the one of `decide`'s `now`; it must survive a restart (seconds since the epoch).

A node belongs to the pool from its request until it is handed over, let go or gone:

    REQUESTED -> BOOTING -> WARMING -> WARM -> HANDED
         \\__________\\_________\\________\\----> LEAVING       FAILED from any state, with a reason

HANDED nodes work for who took them. One that comes back (its work was released, it is still warm) is WARM
again, with `warm_at` as it was.
"""

from __future__ import annotations

import dataclasses
import enum


class NodeState(enum.Enum):
    """Where a node of the pool is in its life."""

    REQUESTED = "requested"  # asked of the provider, no machine yet
    BOOTING = "booting"  # a machine, not a node yet
    WARMING = "warming"  # a node, its agent lacks images
    WARM = "warm"  # to be had in seconds
    HANDED = "handed"
    LEAVING = "leaving"
    FAILED = "failed"  # broken, stale, too old, or does not come: to be replaced


COMING = frozenset({NodeState.REQUESTED, NodeState.BOOTING, NodeState.WARMING})


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One node of the pool. `since` is when its state began. `requested_at`, `booted_at` and `warm_at` teach
    how long nodes take; None where it has not happened, or nobody knows when. `reason` says why it failed or
    leaves."""

    name: str
    state: NodeState
    since: float
    requested_at: float | None = None
    booted_at: float | None = None
    warm_at: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """One node class as it is now.

    `wanted` is how many nodes real work has or waits for (pods running or pending, replicas desired), pool
    nodes not counted; None is a gap: the source did not answer, which is not a demand of zero. Every rise of
    it is that many requests for nodes, every fall that many released.
    `quota` is how many more nodes the provider would give, None for no known bound. `blocked_until` is set
    while requests are held back (an error, throttling, no capacity), with the provider's words in `blocked`.
    """

    node_class: str
    wanted: int | None
    nodes: tuple[Node, ...]
    quota: int | None = None
    blocked_until: float | None = None
    blocked: str = ""

    def count(self, *states: NodeState) -> int:
        return sum(node.state in states for node in self.nodes)


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """One look at every pool. A class that the policy names and that is absent here is left alone."""

    at: float
    pools: tuple[Pool, ...]


class Mode(enum.Enum):
    """What the size of a pool comes from."""

    FORECAST = "forecast"
    REACTIVE = "reactive"  # short history, or the circuit breaker: from what was asked for lately
    HOLD = "hold"  # demand is unknown: nothing is let go, nothing is asked for but replacements


@dataclasses.dataclass(frozen=True, slots=True)
class Clamp:
    """A rule that changed the size of a pool, and from what to what."""

    rule: str
    before: int
    after: int


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """Why a pool has its size. `expected` is how many nodes are thought to be asked for within the lead
    time (its median), `quantile` how sure the size is to cover them; `model` is the forecast's; `breaker`
    says why the circuit breaker is open, "" while it is closed; `note` is what else is to be said, in
    words."""

    mode: Mode
    model: str
    lead_seconds: float
    expected: float
    quantile: float
    clamps: tuple[Clamp, ...] = ()
    breaker: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class PoolDecision:
    """What is to be done about one class, now. `size` is how many nodes should be warm or coming; `request`
    is how many to ask the provider for; `release` names nodes of the pool to let go, the most useless first
    (never HANDED ones); `replace` names FAILED nodes to remove, whose successors `request` counts already."""

    node_class: str
    size: int
    request: int
    release: tuple[str, ...]
    replace: tuple[str, ...]
    explanation: Explanation


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """One decision for every pool observed, in the observation's order."""

    at: float
    pools: tuple[PoolDecision, ...]
