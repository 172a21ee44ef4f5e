"""Capacity that several endpoints share, when there is less than they want: who gets how much. Pure.

Called by `quota` for the endpoints of one machine, or by whoever knows them. Capacity is counted in places of
one class (a GPU, a processor): a replica of an endpoint takes `places` of them. The rules, in their order:

1. *Floors.* An endpoint has its floor before anybody has more. Floors that do not fit are filled as in 3.
2. *Guaranteed first.* What an endpoint wants is granted up to what it was guaranteed, before anybody's best
   effort. Guarantees that do not fit are filled as in 3, by their size.
3. *The rest by weight.* Replica by replica, to whoever has least of it for its weight, among those that want
   more and for whom a replica fits: max-min fairness. What one does not want is the others'. Ties go by name.
4. *Taken back gently.* An endpoint that has more than these rules give it gets notice first, for
   `notice_seconds`, in which it does not grow; then it gives back `step_percent` of what it has too much at
   each decision, at least a replica. Never below what the rules give it, hence never below its floor.
5. *Given only what is free.* What an endpoint still has is nobody else's: a grant grows only into places that
   nobody holds. So all grants together are never more than there is, but for what was there before it shrank.

The grant is the quota of the endpoint's next observation (`observation.Observation.quota`).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Mapping, Sequence

from serving import errors


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """What an endpoint wants and has, in replicas. `wants` is what its autoscaler asks for were there no
    quota; `holds` are those that occupy places, the draining ones too."""

    name: str
    wants: int
    holds: int = 0
    floor: int = 0
    guaranteed: int = 0
    weight: float = 1.0
    places: int = 1

    def __post_init__(self) -> None:
        for name in ("wants", "holds", "floor", "guaranteed"):
            if getattr(self, name) < 0:
                raise errors.DocumentError(f"capacity of {self.name}: {name} must not be negative")
        if self.places < 1:
            raise errors.DocumentError(f"capacity of {self.name}: a replica takes at least one place")
        if not 0 < self.weight < math.inf:
            raise errors.DocumentError(f"capacity of {self.name}: weight must be above 0")


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """How capacity is taken back."""

    notice_seconds: float = 30.0
    step_percent: float = 25.0


@dataclasses.dataclass(frozen=True, slots=True)
class Grant:
    """How many replicas an endpoint may have now. `due` is what the rules give it; `notice_at`: since when it
    has had to expect to lose what it has beyond that."""

    replicas: int
    due: int
    notice_at: float | None = None


def decide(
    places: int, claims: Sequence[Claim], notices: Mapping[str, float], now: float, policy: Policy
) -> dict[str, Grant]:
    """The grants. `notices`: the `notice_at` of the grants before. `now` is any clock that does not go
    back."""
    due = allot(places, claims)
    keeps: dict[str, int] = {}
    since: dict[str, float | None] = {}
    for claim in claims:
        excess = claim.holds - due[claim.name]
        noticed = min(notices.get(claim.name, now), now)
        since[claim.name] = noticed if excess > 0 else None
        keeps[claim.name] = claim.holds - _taken_back(excess, now - noticed, policy)
    free = places - sum(claim.holds * claim.places for claim in claims)

    def room(claim: Claim) -> int:
        return due[claim.name] - claim.holds

    grown = _fill(
        max(0, free),
        [
            (lambda claim: min(room(claim), _guaranteed(claim) - claim.holds), _size),
            (room, lambda claim: claim.weight),
        ],
        claims,
    )
    return {
        claim.name: Grant(keeps[claim.name] + grown[claim.name], due[claim.name], since[claim.name])
        for claim in claims
    }


def allot(places: int, claims: Sequence[Claim]) -> dict[str, int]:
    """What the rules give each, whatever each has now: rules 1 to 3."""
    if len({claim.name for claim in claims}) != len(claims):
        raise errors.DocumentError("capacity: two endpoints have the same name")
    return _fill(
        places,
        [
            (lambda claim: claim.floor, lambda claim: float(max(1, claim.floor))),
            (_guaranteed, _size),
            (lambda claim: max(claim.wants, claim.floor), lambda claim: claim.weight),
        ],
        claims,
    )


_Of = Callable[[Claim], float]


def _guaranteed(claim: Claim) -> int:
    return max(claim.floor, min(claim.wants, claim.guaranteed))


def _size(claim: Claim) -> float:
    return float(max(1, claim.guaranteed))


def _fill(
    places: int, rounds: Sequence[tuple[Callable[[Claim], int], _Of]], claims: Sequence[Claim]
) -> dict[str, int]:
    """Round after round, each up to a bound of its own: always to whoever has least in this round for its
    weight."""
    given = {claim.name: 0 for claim in claims}
    for bound, weight in rounds:
        before = dict(given)
        waiting = [
            (claim.places / weight(claim), claim.name, claim)
            for claim in claims
            if given[claim.name] < bound(claim)
        ]
        heapq.heapify(waiting)
        while waiting:
            _, name, claim = heapq.heappop(waiting)
            if claim.places > places:
                continue  # one that takes less may still fit
            places -= claim.places
            given[name] += 1
            if given[name] < bound(claim):
                had = given[name] - before[name] + 1
                heapq.heappush(waiting, (had * claim.places / weight(claim), name, claim))
    return given


def _taken_back(excess: int, noticed_seconds: float, policy: Policy) -> int:
    if excess <= 0 or noticed_seconds < policy.notice_seconds:
        return 0
    return min(excess, max(1, math.floor(excess * policy.step_percent / 100)))
