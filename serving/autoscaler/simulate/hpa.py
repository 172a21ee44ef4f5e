"""Kubernetes' HorizontalPodAutoscaler (autoscaling/v2) with its default behaviour. Pure.

Follows the algorithm of the Kubernetes documentation, "Horizontal Pod Autoscaling", for a Pods metric: the
requests in flight of each pod against a target average value. Its defaults: a sync every 15 s, a tolerance of
10 %, up without a stabilization window by the larger of 100 % and 4 pods in 15 s, down as far as it likes to
the largest recommendation of the last 300 s. Pods that are not ready, when the ready ones ask for more, count
as using nothing; what then lies within the tolerance, or would turn the direction round, is left alone.
"""

from __future__ import annotations

import collections
import math

from serving.autoscaler.observation import Observation
from serving.autoscaler.simulate.policies import Action, ready, there

TOLERANCE = 0.1
SYNC_SECONDS = 15
STABILIZATION_SECONDS = 300.0
UP_PERIOD_SECONDS = 15.0
UP_FACTOR = 2.0
UP_PODS = 4


class HorizontalPodAutoscaler:
    """One autoscaler of one endpoint."""

    name = "hpa"
    every_seconds = SYNC_SECONDS

    def __init__(
        self, target: float, minimum: int = 1, stabilization_seconds: float = STABILIZATION_SECONDS
    ) -> None:
        """`target` is the metric's average value: requests in flight of a pod."""
        self._stabilization_seconds = stabilization_seconds
        self._target, self._minimum = target, minimum
        self._replicas: int | None = None
        self._recommended: collections.deque[tuple[float, int]] = collections.deque()
        self._added: collections.deque[tuple[float, int]] = collections.deque()

    def decide(self, observation: Observation, now: float) -> Action:
        """See `Policy`. Without a metric nothing is done."""
        if self._replicas is None:
            self._replicas = max(self._minimum, len(there(observation.instances)))
        if observation.demand is None:
            return Action(self._replicas)
        size = self._limited(self._stabilized(self._proposed(observation, self._replicas), now), now)
        if size > self._replicas:
            self._added.append((now, size - self._replicas))
        self._replicas = size
        return Action(size)

    def _proposed(self, observation: Observation, current: int) -> int:
        pods = ready(observation.instances)
        unready = len(there(observation.instances)) - len(pods)
        if not pods:
            return current
        used = sum(each.in_flight or 0.0 for each in pods)
        ratio = used / len(pods) / self._target
        if ratio <= 1 or not unready:
            return current if abs(ratio - 1) <= TOLERANCE else math.ceil(ratio * len(pods))
        count = len(pods) + unready
        with_unready = used / count / self._target
        if with_unready <= 1 + TOLERANCE:
            return current
        proposed = math.ceil(with_unready * count)
        return max(proposed, current)

    def _stabilized(self, proposed: int, now: float) -> int:
        """Down only to the largest that was recommended in the window."""
        self._recommended.append((now, proposed))
        while self._recommended[0][0] < now - self._stabilization_seconds:
            self._recommended.popleft()
        assert self._replicas is not None
        if proposed >= self._replicas:
            return proposed
        return min(self._replicas, max(size for _, size in self._recommended))

    def _limited(self, size: int, now: float) -> int:
        """Up by no more than the policies allow, from where the period began."""
        while self._added and self._added[0][0] <= now - UP_PERIOD_SECONDS:
            self._added.popleft()
        assert self._replicas is not None
        began = self._replicas - sum(count for _, count in self._added)
        most = max(began + UP_PODS, math.ceil(began * UP_FACTOR), self._replicas)
        return max(self._minimum, min(size, most))
