"""Which peers are worth asking, and when a demand may be asked for twice.

Pure: `now` (monotonic seconds) is an argument. Owned by `peers.py`, under its lock.

Rules:

* A peer that failed is down for `down_seconds`, twice as long each time that a probe fails again, up to
  `longest_down_seconds`. It comes back by a probe, never by a reader's request: a dead peer costs the readers
  who were asking it at that moment one retry each, and nobody afterwards.
* A peer that gave wrong bytes is down for `lying_seconds`: that it answers probes says nothing.
* A peer that lost `slow_losses` races against the origin in a row, each with the hedge's time ahead, is slow:
  it is treated as one that failed.
* A peer that refuses a layer is not asked for that layer for `down_seconds`, and is well otherwise.
* Hedges are a bounded part of all requests: when every home is slow because the origin is, asking the
  origin from everywhere would make it slower still.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

from imagefs import errors

_MAX_REFUSALS = 4096


class RefusedError(errors.UnavailableError):
    """The peer is well and does not give this block now; `whole_layer`: nor any other of its layer."""

    def __init__(self, message: str, *, whole_layer: bool) -> None:
        super().__init__(message)
        self.whole_layer = whole_layer


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """See the module. `hedge_share` is the part of requests that may be hedged, `hedge_burst` how many may
    be before any was answered."""

    down_seconds: float = 10.0
    longest_down_seconds: float = 60.0
    lying_seconds: float = 600.0
    slow_losses: int = 3
    hedge_share: float = 0.1
    hedge_burst: int = 8


class Why(enum.Enum):
    """Why a peer is down."""

    FAILED = "failed"
    LIED = "gave wrong bytes"
    SLOW = "slower than the origin"


@dataclasses.dataclass(slots=True)
class _Down:
    why: Why
    until: float
    period_seconds: float
    probing: bool = False


class Health:
    """The state. Not thread-safe: its owner has a lock."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._down: dict[str, _Down] = {}
        self._losses: dict[str, int] = {}
        self._refused: dict[tuple[str, str], float] = {}
        self._hedges = float(policy.hedge_burst)

    def retain(self, members: Iterable[str]) -> None:
        """Forget who is no member any more."""
        kept = set(members)
        self._down = {peer: down for peer, down in self._down.items() if peer in kept}
        self._losses = {peer: count for peer, count in self._losses.items() if peer in kept}

    def down(self) -> dict[str, Why]:
        """Who is not to be asked, and why."""
        return {peer: down.why for peer, down in self._down.items()}

    def refuses(self, peer: str, layer: str, now: float) -> bool:
        """Whether the peer has just refused this layer."""
        return bool(self._refused) and self._refused.get((peer, layer), 0.0) > now

    # -- what was seen -----------------------------------------------------------------------------

    def answered(self, peer: str) -> None:
        """A block came, right, before the origin's."""
        self._losses.pop(peer, None)
        self._hedges = min(self._hedges + self.policy.hedge_share, float(self.policy.hedge_burst))

    def refused(self, peer: str, layer: str, now: float) -> None:
        """The peer is well, and does not serve this layer."""
        if len(self._refused) >= _MAX_REFUSALS:
            self._refused = {key: until for key, until in self._refused.items() if until > now}
        if len(self._refused) < _MAX_REFUSALS:
            self._refused[peer, layer] = now + self.policy.down_seconds

    def failed(self, peer: str, now: float) -> bool:
        """A request failed. Whether this made the peer go down."""
        return self._go_down(peer, Why.FAILED, now, self.policy.down_seconds)

    def lied(self, peer: str, now: float) -> bool:
        """Bytes were wrong. Whether this is news."""
        known = self._down.get(peer)
        if known is not None and known.why is not Why.LIED:
            del self._down[peer]
        return self._go_down(peer, Why.LIED, now, self.policy.lying_seconds)

    def lost_race(self, peer: str, now: float) -> bool:
        """The origin, asked later, answered first. Whether this made the peer go down."""
        losses = self._losses[peer] = self._losses.get(peer, 0) + 1
        if losses < self.policy.slow_losses:
            return False
        return self._go_down(peer, Why.SLOW, now, self.policy.down_seconds)

    def _go_down(self, peer: str, why: Why, now: float, period_seconds: float) -> bool:
        if peer in self._down:
            return False
        self._losses.pop(peer, None)
        self._down[peer] = _Down(why, now + period_seconds, period_seconds)
        return True

    # -- hedging -----------------------------------------------------------------------------------

    def may_hedge(self) -> bool:
        """Take the right to ask the origin as well, if there is one left."""
        if self._hedges < 1.0:
            return False
        self._hedges -= 1.0
        return True

    # -- probing -----------------------------------------------------------------------------------

    def next_probe(self, now: float) -> str | None:
        """A peer whose time is over; the caller tries it and reports by `probed`."""
        for peer, down in self._down.items():
            if not down.probing and down.until <= now:
                down.probing = True
                return peer
        return None

    def next_probe_at(self) -> float | None:
        """When `next_probe` will have one."""
        return min((down.until for down in self._down.values() if not down.probing), default=None)

    def probed(self, peer: str, well: bool, now: float) -> None:
        """What a probe found. A peer that left meanwhile is no news."""
        down = self._down.get(peer)
        if down is None:
            return
        if well:
            del self._down[peer]
            return
        down.probing = False
        down.period_seconds = min(2 * down.period_seconds, self.policy.longest_down_seconds)
        down.until = now + down.period_seconds
