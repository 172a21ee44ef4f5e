"""How much a replica does with so many requests in service: three shapes that engines have. Pure.

What the learned limit is proven on, and service models for the simulator. A profile is a curve, and by
Little's law one curve is both: n in service that leave at `rate(n)` a second take `latency(n)` = n / rate(n).

    cpu_bound       rate rises to the number of cores, then stays; more in service only wait longer
    batch_friendly  a step takes a fixed time and a bit for each request (decoding on a GPU): the rate always
                    rises, less and less, and so does the latency; an objective says where to stop
    memory_bound    rate rises up to what fits, then falls: paging, preemption, work that is done again
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """A curve. `rate` takes a number in service, 0 or more, and gives completions a second."""

    name: str
    rate: Callable[[float], float]

    def latency(self, in_service: float) -> float:
        """Seconds that each of so many takes."""
        return in_service / self.rate(in_service)


def cpu_bound(cores: float, service_seconds: float) -> Profile:
    """`service_seconds` is a request alone on a core."""
    return Profile("cpu-bound", lambda n: min(n, cores) / service_seconds)


def batch_friendly(step_seconds: float, request_seconds: float, steps: float) -> Profile:
    """A request is `steps` steps; one with n in it takes `step_seconds` + n * `request_seconds`."""
    return Profile("batch-friendly", lambda n: n / (steps * (step_seconds + n * request_seconds)))


def memory_bound(fits: float, service_seconds: float, thrashing: float) -> Profile:
    """Up to `fits` each takes `service_seconds`. Beyond, the rate is divided by 1 + `thrashing` times the
    part that is too much."""

    def rate(n: float) -> float:
        return min(n, fits) / service_seconds / (1 + thrashing * max(0.0, n / fits - 1))

    return Profile("memory-bound", rate)
