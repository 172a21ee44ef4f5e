"""Who makes nodes, as the controller sees it: the seam `Provider`, and the value `Machine`. Pure.

A provider is level-triggered: `hold` says how many machines of a class there should be ready for whoever asks
next, and may be said again at any time with the same effect; `observe` says what is there. Nothing is kept in
a provider's memory that a restart would lose: what is held is read from the platform, so that a controller
which dies releases nothing, and its successor finds everything.

Machines are handed over by the platform, not by us: a pod that evicts a placeholder, an Auto Scaling group
whose desired capacity rises. Where nobody else does it, `serve` says how many machines there should be in
use.

One thread calls a provider (the controller's). Errors (`warmpool.errors`), by who acts: ConfigurationError
for what a person must mend; ThrottledError for the whole provider, CapacityError for one class, any other
UnavailableError for what may pass; ConflictError when somebody else was faster. After any of them the same
call may be made again. `tests/warmpool/providers` is the contract as a suite; every implementation runs it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Sequence
from typing import Protocol


class Stage(enum.Enum):
    """REQUESTED -> BOOTING -> UP -> (STANDBY) -> HANDED -> gone; FAILED from any of them but HANDED."""

    REQUESTED = "requested"
    """Asked for; there is no machine yet."""
    BOOTING = "booting"
    """There is a machine, on which nothing can run yet."""
    UP = "up"
    """It runs and is held; whether it is warm is its agent's to say."""
    STANDBY = "standby"
    """Prepared, then stopped or hibernated: its disk is warm, and it starts when it is handed over."""
    HANDED = "handed"
    """Somebody's work runs on it, or may run there any moment."""
    FREE = "free"
    """It runs, and is nobody's: made for work that still waits, or given back by work that is done. The next
    `hold` may find it."""
    LEAVING = "leaving"
    """On its way out; counts for nothing."""
    FAILED = "failed"
    """It will not come, or is broken; `reason` says why. `replace` takes it away."""


HELD = frozenset({Stage.REQUESTED, Stage.BOOTING, Stage.UP, Stage.STANDBY})
"""What `hold` counts."""


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """One node, made or to be made. Times are seconds since the epoch.

    `name` is the request's while the stage is REQUESTED, from then on the machine's own. `since` is when the
    stage began, as far as the platform says so. `requested_at` is when it was asked for, None for a machine
    that was there before it was; `made_at` is its own beginning. `address` is where its agent is reached
    (host or IP, no port), None while that is not known. `admitted`: no gate is between it and who asks."""

    name: str
    node_class: str
    stage: Stage
    since: float
    requested_at: float | None = None
    made_at: float | None = None
    address: str | None = None
    admitted: bool = False
    reason: str = ""


class Provider(Protocol):
    """Makes nodes. See the module."""

    def observe(self) -> Sequence[Machine]:
        """All machines of all classes that this provider was given, by name."""

    def hold(self, node_class: str, count: int, release: Collection[str] = ()) -> None:
        """Have `count` machines held (`HELD`): missing ones are asked for, surplus ones released: those that
        `release` names first, then those that are furthest from being ready, the youngest of them first;
        never one that is handed over. Where the platform chooses for itself, `release` is a wish. An error
        may leave part of it done."""

    def serve(self, node_class: str, count: int) -> None:
        """Have at least `count` machines handed over: held ones that are admitted first. It never takes a
        machine from who has it. Nothing, where takers take by themselves."""

    def admit(self, name: str) -> None:
        """Let whoever asks have this machine. Idempotent. NotFoundError."""

    def replace(self, name: str) -> None:
        """Take a machine away that is broken, failed or too old, so that its place is asked for again by the
        next `hold`. Idempotent; a machine that was handed over meanwhile is left alone."""

    def close(self) -> None:
        """Let go of connections. Machines stay as they are."""


_NEARNESS = {Stage.REQUESTED: 0, Stage.BOOTING: 1, Stage.UP: 2, Stage.STANDBY: 3}


def surplus(held: Sequence[Machine], count: int, release: Collection[str]) -> list[Machine]:
    """Which of these held machines go, so that `count` are left; in `hold`'s order. Where an implementation
    may choose, it chooses by this."""

    def order(machine: Machine) -> tuple[bool, int, bool, float, str]:
        nearness = _NEARNESS.get(machine.stage, 0)
        return (
            machine.name not in release,
            nearness,
            machine.admitted,
            -(machine.made_at or machine.since),
            machine.name,
        )

    return sorted(held, key=order)[: max(0, len(held) - count)]
