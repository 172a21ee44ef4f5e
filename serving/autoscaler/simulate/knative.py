"""Knative Serving's pod autoscaler (KPA) with its default settings. Pure.

Follows Knative's documentation of `config-autoscaler`, and the algorithm that it describes: every 2 s the
mean concurrency over a stable window of 60 s and over a panic window of 6 s is divided by the target, which
is 70 % of what a container takes. Where the panic window asks for twice of what is ready, the revision
panics: for a stable window it follows the panic window, and never down. A step up is at most a thousandfold
of what is ready, a step down at most to half of it. Scale to zero after a grace of 30 s.

Not simulated: its activator in the request path. Here as everywhere in the comparison the queue is at the
replicas; `target-burst-capacity`, which only decides on that path, has no part in the size.
"""

from __future__ import annotations

import collections
import math

from serving.autoscaler.observation import Observation
from serving.autoscaler.simulate.policies import Action, load, mean, ready, there

TICK_SECONDS = 2
STABLE_SECONDS = 60
PANIC_THRESHOLD = 2.0
MAX_UP_RATE = 1_000.0
MAX_DOWN_RATE = 2.0
UTILIZATION = 0.7
ZERO_GRACE_SECONDS = 30.0


class KnativePodAutoscaler:
    """One autoscaler of one revision."""

    name = "kpa"
    every_seconds = 1

    def __init__(
        self,
        concurrency: float,
        minimum: int = 1,
        utilization: float = UTILIZATION,
        stable_seconds: int = STABLE_SECONDS,
    ) -> None:
        """`concurrency` is the container's, the target `utilization` of it. The panic window is a tenth of
        the stable one."""
        self._target = concurrency * utilization
        self._minimum = minimum
        self._stable: collections.deque[float] = collections.deque(maxlen=stable_seconds)
        self._panic: collections.deque[float] = collections.deque(maxlen=stable_seconds // 10)
        self._stable_seconds = stable_seconds
        self._panics_since: float | None = None
        self._most_in_panic = 0
        self._idle_since: float | None = None
        self._replicas: int | None = None

    def decide(self, observation: Observation, now: float) -> Action:
        """See `Policy`. Samples every second; a size every tick. Seconds without a report are left out."""
        if self._replicas is None:
            self._replicas = len(there(observation.instances))
        if observation.demand is not None:
            self._stable.append(load(observation.demand))
            self._panic.append(load(observation.demand))
        if round(now) % TICK_SECONDS == 0 and self._stable:
            self._replicas = self._not_zero_yet(self._size(len(ready(observation.instances)), now), now)
        return Action(self._replicas)

    def _size(self, ready_now: int, now: float) -> int:
        ready_pods = max(1, ready_now)
        most = math.ceil(MAX_UP_RATE * ready_pods)
        least = math.floor(ready_pods / MAX_DOWN_RATE)
        stable_wanted = math.ceil(mean(self._stable) / self._target)
        panic_wanted = math.ceil(mean(self._panic) / self._target)
        stable = min(max(stable_wanted, least), most)
        panic = min(max(panic_wanted, least), most)
        over = panic_wanted / ready_pods >= PANIC_THRESHOLD
        if over:
            self._panics_since = now
        elif self._panics_since is not None and now - self._panics_since > self._stable_seconds:
            self._panics_since, self._most_in_panic = None, 0
        if self._panics_since is None:
            return stable
        self._most_in_panic = max(self._most_in_panic, ready_now, stable, panic)
        return self._most_in_panic

    def _not_zero_yet(self, size: int, now: float) -> int:
        if size:
            self._idle_since = None
            return max(size, self._minimum)
        self._idle_since = now if self._idle_since is None else self._idle_since
        return self._minimum if now - self._idle_since >= ZERO_GRACE_SECONDS else max(1, self._minimum)
