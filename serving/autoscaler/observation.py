"""What an autoscaler sees, and what it says: values. Pure.

Made by whoever watches an endpoint (`serving.autoscaler.signals` from load reports, the simulator from its
own state), read by policies (`serving.autoscaler.decide` and those that it is compared with). An observation
is made about once a second. Load is in requests, or in model units where the endpoint is scaled on them; the
unit is the same in every field of one endpoint.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from serving.replica import State as ReplicaState


@dataclasses.dataclass(frozen=True, slots=True)
class Demand:
    """What an endpoint is asked for, all Envoys and the activator summed.

    `in_flight` is at replicas, in their queues included (`queued` says how much of it waits there, where the
    engines told); `held` waits at the activator; `issued_per_second` went to replicas, `rejected_per_second`
    went nowhere for want of room. `service_seconds` is the mean time in flight of what was finished lately,
    None while nothing was.
    """

    in_flight: float
    held: float = 0.0
    queued: float = 0.0
    issued_per_second: float = 0.0
    rejected_per_second: float = 0.0
    service_seconds: float | None = None


class Instance(NamedTuple):
    """One replica. Times are on the clock of `decide`'s `now`. What nobody reported is None; utilisations
    are parts of what the replica may use, 0 to 1. A tuple, because a simulated day makes ten million of them:
    in a sixth of the time that a frozen dataclass takes."""

    name: str
    state: ReplicaState
    created_at: float
    ready_at: float | None = None
    in_flight: float | None = None
    completed_per_second: float | None = None
    latency_seconds: float | None = None
    queued: float | None = None
    cpu: float | None = None
    gpu: float | None = None
    memory: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """One look. `demand` is None where it is unknown: no report came, or it came too late; an endpoint that
    is absent from a report which arrived has a demand of zeros. `quota` is how many replicas may be had at
    all, None for no such bound."""

    at: float
    demand: Demand | None
    instances: tuple[Instance, ...]
    quota: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Clamp:
    """A rule that changed the number of replicas, and from what to what."""

    rule: str
    before: int
    after: int


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """Why: the signal and its value, the window that it was taken over, the formula with its numbers in it,
    the clamps in their order, and what else is to be said."""

    signal: str
    value: float | None
    window_seconds: float
    formula: str
    clamps: tuple[Clamp, ...] = ()
    note: str = ""
