"""What the results of a comparison say. Pure.

A policy with one setting is a point: replica-hours against the part of requests that were not served well
(late, rejected, or lost). Over its settings a policy has a frontier: the points that no other of its points
is better than in both. Nothing is interpolated between points: where a frontier has no point, it has none.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """One run, in figures. `reversals`: how often the number of replicas wanted turned, within any 10 min."""

    scenario: str
    policy: str
    parameters: str
    default: bool
    requests: int
    late: int
    rejected: int
    lost: int
    replica_hours: float
    p50_seconds: float
    p99_seconds: float
    peak_replicas: int
    reversals: int

    @property
    def unserved(self) -> float:
        """The part of requests that were late, rejected or lost."""
        return (self.late + self.rejected + self.lost) / max(1, self.requests)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Ours against another policy. `hours_ratio`: the fewest replica-hours of ours that serve no worse than
    the other's default point, as a part of that point's; `unserved_ratio`: the smallest unserved part of ours
    that costs no more. None: ours has no such point. `above`: points of the other's frontier that no point of
    ours is at least equal to in both, as text."""

    scenario: str
    other: str
    hours: float
    unserved: float
    hours_ratio: float | None
    unserved_ratio: float | None
    frontier: int
    above: tuple[str, ...]

    @property
    def met(self) -> bool:
        """Fewer replica-hours at equal lateness, or half the late requests at equal hours."""
        fewer = self.hours_ratio is not None and self.hours_ratio < 1
        half = self.unserved_ratio is not None and self.unserved_ratio <= 0.5
        return fewer or half


def frontier(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """By replica-hours, ascending."""
    found: list[Outcome] = []
    for each in sorted(outcomes, key=lambda one: (one.replica_hours, one.unserved)):
        if not found or each.unserved < found[-1].unserved:
            found.append(each)
    return found


def verdict(ours: Sequence[Outcome], others: Sequence[Outcome]) -> Verdict:
    """`others` are one policy's, one of them its default."""
    (default,) = (each for each in others if each.default)
    as_good = [each.replica_hours for each in ours if each.unserved <= default.unserved]
    as_cheap = [each.unserved for each in ours if each.replica_hours <= default.replica_hours]
    theirs = frontier(others)
    above = tuple(
        f"{each.parameters}: {each.replica_hours:.1f} h, {each.unserved:.3%}"
        for each in theirs
        if not any(own.replica_hours <= each.replica_hours and own.unserved <= each.unserved for own in ours)
    )
    return Verdict(
        scenario=default.scenario,
        other=default.policy,
        hours=default.replica_hours,
        unserved=default.unserved,
        hours_ratio=min(as_good) / default.replica_hours if as_good and default.replica_hours else None,
        unserved_ratio=_ratio(min(as_cheap), default.unserved) if as_cheap else None,
        frontier=len(theirs),
        above=above,
    )


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return 1.0 if not part else float("inf")


def most_reversals(wanted: Sequence[int], window_seconds: int = 600) -> int:
    """Of a series with one value a second: the most changes of direction in any such window, as who looks at
    that window alone sees them."""
    moves = [(at, later - earlier) for at, (earlier, later) in enumerate(itertools.pairwise(wanted), 1)]
    moves = [(at, change) for at, change in moves if change]
    turns = [
        0,
        *itertools.accumulate((one > 0) != (other > 0) for (_, one), (_, other) in itertools.pairwise(moves)),
    ]
    most = last = 0
    for first, (began, _) in enumerate(moves):
        while last + 1 < len(moves) and moves[last + 1][0] < began + window_seconds:
            last += 1
        most = max(most, turns[last] - turns[first])
    return most
