"""Which share of a service's requests goes to which group of its backends. Pure.

Called by `resources`. Shares are weights of *localities*, never of endpoints: with unequal endpoint weights
Envoy's LEAST_REQUEST is a weighted round robin and no longer a choice of two. A group has one version, one
zone and one step of the ramp; within it all backends are alike, and Envoy takes the less busy of two.

Invariants: weights of the groups of a service are above 0 and depend on nothing but the arguments; a draining
backend, or one that its source calls unhealthy, is in no group; a service with a usable backend of a version
that has a share has a group.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping

from serving import service as services

RAMP_STEPS = 10
_SCALE = 100_000


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Backends that are alike, and their weight among the groups of the service."""

    version: str
    zone: str
    step: int
    weight: int
    backends: tuple[services.Backend, ...]


def groups(
    service: services.Service, now: float, zone: str, zone_shares: Mapping[str, float]
) -> tuple[Group, ...]:
    """The groups as an Envoy in `zone` is to see them. `zone_shares`: which part of all Envoys, hence of the
    requests, each zone has."""
    members: dict[tuple[str, str, int], list[services.Backend]] = collections.defaultdict(list)
    for backend in service.backends:
        if not backend.draining and backend.healthy is not False:
            members[backend.version, backend.zone, _step(service, backend, now)].append(backend)
    shares: dict[tuple[str, str, int], float] = {}
    version_shares = _version_shares(service, members)
    for version, version_share in version_shares.items():
        capacities = {key: len(each) * key[2] for key, each in members.items() if key[0] == version}
        by_zone: collections.Counter[str] = collections.Counter()
        for (_, of, _), capacity in capacities.items():
            by_zone[of] += capacity
        total = by_zone.total()
        parts = {of: capacity / total for of, capacity in by_zone.items()}
        if service.prefer_zone:
            parts = spill(parts, zone, zone_shares)
        for key, capacity in capacities.items():
            shares[key] = version_share * parts[key[1]] * capacity / by_zone[key[1]]
    whole = sum(shares.values())
    return tuple(
        Group(*key, max(1, round(share / whole * _SCALE)), tuple(members[key]))
        for key, share in sorted(shares.items())
        if share > 0
    )


def idle(service: services.Service, now: float) -> tuple[Group, ...]:
    """The groups, of weight 0, of versions whose share is said to be 0. They get nothing, and Envoy checks
    their health all the same: a version that is given traffic (back) must not begin as one of unknown
    health."""
    members: dict[tuple[str, str, int], list[services.Backend]] = collections.defaultdict(list)
    for backend in service.backends:
        named_none = service.version_weights.get(backend.version) == 0
        if named_none and not backend.draining and backend.healthy is not False:
            members[backend.version, backend.zone, _step(service, backend, now)].append(backend)
    return tuple(Group(*key, 0, tuple(members[key])) for key in sorted(members))


def spill(capacity: Mapping[str, float], zone: str, zone_shares: Mapping[str, float]) -> dict[str, float]:
    """Which part of the requests of `zone` goes to the backends of each zone: its own as far as they reach
    for all the requests that arise there, the rest to what other zones have to spare. Both mappings sum to
    1."""
    demand = zone_shares.get(zone, 0.0)
    own = capacity.get(zone, 0.0)
    kept = 1.0 if demand <= own else own / demand
    if own == 0.0:
        kept = 0.0
    spare = {
        other: max(0.0, part - zone_shares.get(other, 0.0))
        for other, part in capacity.items()
        if other != zone
    }
    total = sum(spare.values())
    if total <= 0.0:  # nobody has anything to spare: as if there were no zones
        return dict(capacity) if own == 0.0 else {each: float(each == zone) for each in capacity}
    result = {other: (1.0 - kept) * part / total for other, part in spare.items()}
    if zone in capacity:
        result[zone] = kept
    return result


def next_change(service: services.Service, now: float) -> float | None:
    """When the weights change by themselves, because a ramp takes its next step; None: never."""
    ramp = service.settings.ramp_seconds
    times = [
        backend.since + _step(service, backend, now) * ramp / RAMP_STEPS
        for backend in service.backends
        if backend.since is not None and _step(service, backend, now) < RAMP_STEPS
    ]
    return min(times, default=None)


def _step(service: services.Service, backend: services.Backend, now: float) -> int:
    """1 for a backend that has just become ready, RAMP_STEPS for a warm one."""
    ramp = service.settings.ramp_seconds
    if backend.since is None or ramp <= 0:
        return RAMP_STEPS
    return min(RAMP_STEPS, max(1, math.floor((now - backend.since) / ramp * RAMP_STEPS) + 1))


def _version_shares(
    service: services.Service, members: Mapping[tuple[str, str, int], list[services.Backend]]
) -> dict[str, float]:
    if service.version_weights:
        there = {version for version, _, _ in members}
        return {name: float(n) for name, n in service.version_weights.items() if n > 0 and name in there}
    counted: collections.Counter[str] = collections.Counter()
    for (version, _, step), backends in members.items():
        counted[version] += len(backends) * step
    return {version: float(capacity) for version, capacity in counted.items()}
