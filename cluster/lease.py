"""Who leads: a Lease's fields, and when it may be taken. Pure.

Called by `leader`. Nobody's wall clock is compared with another's: a lease has run out when whoever wants it
has seen it unchanged for its whole duration, by a clock of their own that only goes forward. The holder stops
leading earlier than that by its own clock, counted from before it asked, so that two never lead at once as
long as clocks run at about the same speed.

Spec: coordination.k8s.io/v1 Lease.
"""

from __future__ import annotations

import dataclasses

from cluster import objects
from cluster.objects import Body, Object

_LEAST_SECONDS, _MOST_SECONDS = 1, 3_600


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """`duration_seconds` without a sign of the holder and others take over; `deadline_seconds` after its last
    renewal began the holder no longer leads; `retry_seconds` between attempts, and renewals."""

    duration_seconds: int = 15
    deadline_seconds: float = 10.0
    retry_seconds: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.retry_seconds < self.deadline_seconds < self.duration_seconds:
            raise ValueError("a lease needs 0 < retry_seconds < deadline_seconds < duration_seconds")


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What stands in a Lease. `version` is the object's; `transitions` grows with each new holder."""

    holder: str
    duration_seconds: int
    acquired_at: float
    transitions: int
    version: str


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """A version of the lease, and when (by the seer's clock) it was first seen."""

    version: str
    at: float


def parse(found: Object) -> Record:
    """Whatever somebody wrote there: what makes no sense counts as not said."""
    duration = found.number("spec", "leaseDurationSeconds")
    return Record(
        holder=found.text("spec", "holderIdentity"),
        duration_seconds=min(max(duration, _LEAST_SECONDS), _MOST_SECONDS),
        acquired_at=objects.seconds(found.at("spec", "acquireTime")) or 0.0,
        transitions=max(0, found.number("spec", "leaseTransitions")),
        version=found.meta.version,
    )


def looked(record: Record, before: Seen | None, now: float) -> Seen:
    """What is known of the lease after a look at it."""
    if before is not None and before.version == record.version:
        return before
    return Seen(record.version, now)


def may_hold(record: Record, seen: Seen, identity: str, now: float) -> bool:
    """Whether `identity` may write itself into the lease."""
    if record.holder in ("", identity):
        return True
    return now - seen.at > record.duration_seconds


def claim(record: Record | None, identity: str, timing: Timing, wall: float) -> Body:
    """The spec of the lease as `identity` takes or renews it. `wall`: seconds since the epoch, for people."""
    renewed = record is not None and record.holder == identity
    transitions = 0 if record is None else record.transitions + (0 if renewed else 1)
    acquired_at = record.acquired_at if record is not None and renewed else wall
    return {
        "holderIdentity": identity,
        "leaseDurationSeconds": timing.duration_seconds,
        "acquireTime": objects.micro_time(acquired_at),
        "renewTime": objects.micro_time(wall),
        "leaseTransitions": transitions,
    }
