"""The policies that are compared: the seam `Policy`, ours behind it, and those that need few words. Pure.

`hpa` and `knative` have Kubernetes' and Knative's. A policy is made for one run, and remembers.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from serving.autoscaler import decide
from serving.autoscaler.observation import Demand, Instance, Observation
from serving.autoscaler.policy import Policy as Settings
from serving.replica import State as ReplicaState


@dataclasses.dataclass(frozen=True, slots=True)
class Action:
    """`replicas`: how many there should be. `limit`: of the requests that each serves at once; None: as it
    was."""

    replicas: int
    limit: int | None = None


class Policy(Protocol):
    """Asked every `every_seconds` seconds of simulated time."""

    @property
    def name(self) -> str: ...

    @property
    def every_seconds(self) -> int: ...

    def decide(self, observation: Observation, now: float) -> Action: ...


Maker = Callable[[], Policy]


class Ours:
    """`serving.autoscaler.decide`, every second."""

    name = "ours"
    every_seconds = 1

    def __init__(self, settings: Settings, name: str = "ours") -> None:
        self.name = name
        self._state = decide.State.initial(settings)

    def decide(self, observation: Observation, now: float) -> Action:
        """See `Policy`."""
        decision = decide.decide(self._state, observation, now)
        self._state = decision.state
        return Action(decision.replicas, decision.limit)


class Published:
    """The formula that Databricks has described: load every second, a decision every 5 s, up on the mean of
    the last 20 s, down on that of the last 5 min, replicas = ceil(requests in flight / target concurrency).

    Every 30 s the target is retuned within caps: cut by a fifth when requests take half as long again as the
    best half minute so far, or a tenth of what is in flight waits; else raised by a twentieth. How much is
    not published: these steps are ours.
    """

    name = "published"
    every_seconds = 1
    _DECIDE_SECONDS, _UP_SECONDS, _DOWN_SECONDS, _TUNE_SECONDS = 5, 20, 300, 30

    def __init__(self, target: float, minimum: int = 1, least: float = 0.5) -> None:
        """`target` requests in flight on each replica is the upper cap, `least` of it the lower."""
        self._target, self._cap, self._least = target, target, least * target
        self._minimum = minimum
        self._up: collections.deque[float] = collections.deque(maxlen=self._UP_SECONDS)
        self._down: collections.deque[float] = collections.deque(maxlen=self._DOWN_SECONDS)
        self._latency: collections.deque[float] = collections.deque(maxlen=self._TUNE_SECONDS)
        self._waiting: collections.deque[float] = collections.deque(maxlen=self._TUNE_SECONDS)
        self._best = math.inf
        self._replicas: int | None = None

    def decide(self, observation: Observation, now: float) -> Action:
        """See `Policy`. A second without a report is left out of the windows."""
        demand = observation.demand
        if self._replicas is None:
            self._replicas = max(self._minimum, len(there(observation.instances)))
        if demand is not None:
            self._up.append(load(demand))
            self._down.append(load(demand))
            self._waiting.append(demand.queued / demand.in_flight if demand.in_flight else 0.0)
            if demand.service_seconds is not None:
                self._latency.append(demand.service_seconds)
        if round(now) % self._TUNE_SECONDS == 0 and self._latency:
            self._tune()
        if round(now) % self._DECIDE_SECONDS == 0 and self._up:
            up, down = (math.ceil(mean(window) / self._target) for window in (self._up, self._down))
            if up > self._replicas:
                self._replicas = up
            elif max(up, down) < self._replicas:
                self._replicas = max(up, down, self._minimum)
        return Action(self._replicas)

    def _tune(self) -> None:
        latency = mean(self._latency)
        self._best = min(self._best, latency)
        slow = latency > 1.5 * self._best or mean(self._waiting) > 0.1
        self._target = min(self._cap, max(self._least, self._target * (0.8 if slow else 1.05)))


class Constant:
    """So many, always: a static peak."""

    every_seconds = 1

    def __init__(self, replicas: int, name: str = "static peak") -> None:
        self.name = name
        self._action = Action(replicas)

    def decide(self, observation: Observation, now: float) -> Action:
        """See `Policy`."""
        return self._action


class Clairvoyant:
    """Knows the traffic: at each second it asks for what the next `ahead_seconds`, a start's time, will need,
    and no more. The floor that nobody is below who has to start replicas."""

    name = "clairvoyant"
    every_seconds = 1

    def __init__(
        self, in_flight: Sequence[float], target: float, ahead_seconds: int, minimum: int = 1
    ) -> None:
        """`in_flight` at each second if nobody waited; `target` of them on each replica."""
        # The largest of a window that moves, from the end: a queue of indices with falling values.
        largest: collections.deque[int] = collections.deque()
        self._replicas = [minimum] * len(in_flight)
        for second in range(len(in_flight) - 1, -1, -1):
            while largest and in_flight[largest[-1]] <= in_flight[second]:
                largest.pop()
            largest.append(second)
            while largest[0] > second + ahead_seconds:
                largest.popleft()
            self._replicas[second] = max(minimum, math.ceil(in_flight[largest[0]] / target))

    def decide(self, observation: Observation, now: float) -> Action:
        """See `Policy`."""
        return Action(self._replicas[min(round(now), len(self._replicas) - 1)])


def load(demand: Demand) -> float:
    """What the other systems count: in flight at replicas, and held for them."""
    return demand.in_flight + demand.held


def there(instances: Sequence[Instance]) -> list[Instance]:
    """Those that are counted as replicas: starting or ready."""
    return [each for each in instances if each.state in (ReplicaState.STARTING, ReplicaState.READY)]


def ready(instances: Sequence[Instance]) -> list[Instance]:
    """Those that get traffic."""
    return [each for each in instances if each.state is ReplicaState.READY]


def mean(values: Sequence[float] | collections.deque[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)
