"""How long a decision of the autoscaler takes: `python -m e2e.autoscaler`. Nothing is asserted.

Decisions on made-up seconds of an endpoint under a Poisson-like load, everything on: the limit is learned and
the time of day forecast. What is printed is the median and the 99th percentile of the wall time of `decide`,
for several numbers of replicas.
"""

from __future__ import annotations

import random
import statistics
import time

from serving.autoscaler.decide import State, decide
from serving.autoscaler.observation import Demand, Instance, Observation
from serving.autoscaler.policy import Policy
from serving.replica import State as ReplicaState

_SIZES = (1, 10, 100, 1_000)
_SECONDS = 600
_BEGIN = 1_700_000_000.0
_IN_FLIGHT = 8.0


def main() -> None:
    """Measure and print."""
    for size in _SIZES:
        taken = sorted(_measured(size))
        p99 = taken[len(taken) * 99 // 100]
        print(f"{size:5} replicas: {1e3 * statistics.median(taken):.3f} ms, p99 {1e3 * p99:.3f} ms")


def _measured(size: int) -> list[float]:
    chance = random.Random(size)
    policy = Policy(minimum=1, maximum=2 * size, target=_IN_FLIGHT, limit=16, learn_limit=True)
    state, taken = State.initial(policy), []
    for second in range(_SECONDS):
        now = _BEGIN + second
        observation = _second(size, now, chance)
        before = time.perf_counter()
        state = decide(state, observation, now).state
        taken.append(time.perf_counter() - before)
    return taken


def _second(size: int, now: float, chance: random.Random) -> Observation:
    mean = size * _IN_FLIGHT
    issued = max(0.0, chance.gauss(mean, mean**0.5))
    instances = tuple(
        Instance(
            f"r{number}",
            ReplicaState.READY,
            created_at=_BEGIN - 5_000 - number,
            ready_at=_BEGIN - 4_970 - number,
            in_flight=float(chance.randint(1, 16)),
            completed_per_second=_IN_FLIGHT,
            queued=0.0,
            cpu=0.5,
            memory=0.5,
        )
        for number in range(size)
    )
    return Observation(now, Demand(mean, issued_per_second=issued, service_seconds=1.0), instances)


if __name__ == "__main__":
    main()
