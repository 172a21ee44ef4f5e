"""A replica as everybody sees it, and the seam behind which replicas are made: `Provider`.

Pure values. Providers (`serving/providers/`) make them; the controller, the router's services, the status
page and the autoscaler read them. A provider is level-triggered: `scale` says how many there should be and
may be said again at any time, `observe` says what is there.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from serving.endpoint import Endpoint
    from serving.engine.state import Rations, Spent


class State(enum.Enum):
    """STARTING -> READY -> DRAINING -> gone; FAILED from any of them. A ready replica that stops answering
    its probes is STARTING again: it is there, and gets no traffic."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True)
class Vitals:
    """What an engine says of itself, at a time (`at`, seconds since the epoch). `finished`, `rejected` (429)
    and `busy_seconds` (time in flight, of all requests) are sums since its supervisor began; so are
    `cpu_seconds`, which fall when a process of it ends. `memory` is a part of what it may use, `gpu` of the
    last moments in which its busiest GPU did anything. None is what nobody could say."""

    at: float
    in_flight: int
    queued: int
    finished: int
    rejected: int
    busy_seconds: float
    cpus: float | None = None
    cpu_seconds: float | None = None
    memory: float | None = None
    gpu: float | None = None
    units_in_flight: float = 0.0
    """Model units of the requests in flight and in its queue; 0 where they are not counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Replica:
    """One copy of the engine. Times are seconds since the epoch. `phases` are the parts of its start, in
    order, each with the seconds that it took; `reason` is why it failed, or why it is not ready yet; `vitals`
    what it said of itself last, a second ago or a few."""

    name: str
    version: str
    address: tuple[str, int] | None
    state: State
    created_at: float
    ready_at: float | None = None
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    zone: str = ""
    reason: str | None = None
    vitals: Vitals | None = None


class Provider(Protocol):
    """Makes and ends replicas. One thread calls it (the server's), `observe` and `logs` excepted, which any
    may. Errors: ConfigurationError and DocumentError for what a person must mend (nothing is left behind
    then), UnavailableError for what may pass."""

    def apply(self, endpoint: Endpoint) -> str:
        """Check that replicas of this endpoint can be made here, remember how, and make them the current
        version, whose name is returned. Starts nothing. Idempotent."""

    def observe(self) -> list[Replica]:
        """Every replica of every version, the failed ones until they are removed or replaced."""

    def scale(self, n: int, keep: Collection[str] = (), version: str | None = None) -> None:
        """Have n replicas of a version (default the current): missing ones are started (later, while crashes
        back off), surplus ones drain, not ready before ready and young before old, none that `keep` names."""

    def set_limit(self, n: int) -> None:
        """How many requests each replica, present and future, admits at a time."""

    def drain(self, names: Collection[str]) -> None:
        """End these: DRAINING at once, told to stop after the notice, killed when the drain's time is up."""

    def remove(self, version: str) -> None:
        """Drain what is left of a version and forget it."""

    def logs(self, name: str, lines: int) -> Sequence[str]:
        """The last lines of a replica's log. NotFoundError."""

    def close(self) -> None:
        """Let go of what this process holds. Replicas go on."""


@runtime_checkable
class Rationed(Protocol):
    """A provider whose replicas can be told what tenants may have of them."""

    def ration(self, rations: Mapping[str, Rations]) -> Mapping[str, Mapping[str, Spent]]:
        """Tell each replica, by its name; what each tenant has had there, of the replicas that answered. Any
        thread may call it."""
