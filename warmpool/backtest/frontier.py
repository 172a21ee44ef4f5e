"""Hit rate against idle time: the frontier of a policy, and what it costs to reach a hit rate. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One setting of a policy, and what came of it. Waits are in seconds, over all requests."""

    label: str
    hit_rate: float
    idle_hours: float
    booting_hours: float
    started: int
    worse: int
    mean_wait_seconds: float
    p99_wait_seconds: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both, by idle time."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda each: (each.idle_hours, -each.hit_rate)):
        if not kept or point.hit_rate > kept[-1].hit_rate:
            kept.append(point)
    return kept


def idle_hours_at(points: Sequence[Point], hit_rate: float) -> float | None:
    """Idle node-hours that reach this hit rate: between two settings of the frontier, as if one were used for
    a part of the time and the other for the rest. None if no setting reaches it."""
    before: Point | None = None
    for point in frontier(points):
        if point.hit_rate >= hit_rate:
            if before is None:
                return point.idle_hours
            part = (hit_rate - before.hit_rate) / (point.hit_rate - before.hit_rate)
            return before.idle_hours + part * (point.idle_hours - before.idle_hours)
        before = point
    return None
