"""Requests that wait for a replica, in order of arrival: how many may, and for how long. Pure.

Owned by one `proxy.Proxy`, in its event loop; `now` is monotonic seconds. Every ticket that `enter` gave
leaves exactly once: by `release`, `expire` or `leave`.
"""

from __future__ import annotations

import collections
import dataclasses

from serving import errors


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """`max_held`: requests that wait at a time, more are turned away. `deadline_seconds`: how long each
    may."""

    max_held: int = 1_000
    deadline_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.max_held < 1:
            raise errors.ConfigurationError(f"max_held: {self.max_held} is not at least 1")
        if not self.deadline_seconds > 0:
            raise errors.ConfigurationError(f"deadline: {self.deadline_seconds} s is not above 0")


class Hold:
    """See the module."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Ticket -> deadline. In order of arrival, and so, with one time limit for all, of deadlines.
        self._waiting: collections.OrderedDict[int, float] = collections.OrderedDict()
        self._tickets = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, now: float) -> int | None:
        """A ticket for one more, or None where there is no room."""
        if len(self._waiting) >= self._limits.max_held:
            return None
        self._tickets += 1
        self._waiting[self._tickets] = now + self._limits.deadline_seconds
        return self._tickets

    def enter_again(self, ticket: int, deadline: float) -> None:
        """Back to the front, for one that was released to a replica which could not be reached. Its place is
        its own: it may be one above the limit for that moment."""
        self._waiting[ticket] = deadline
        self._waiting.move_to_end(ticket, last=False)

    def release(self) -> tuple[int, float] | None:
        """The ticket that waited longest, with its deadline; None when nobody waits."""
        return self._waiting.popitem(last=False) if self._waiting else None

    def leave(self, ticket: int) -> None:
        """Who waited is gone. Nothing, where the ticket left already."""
        self._waiting.pop(ticket, None)

    def expire(self, now: float) -> list[int]:
        """The tickets whose deadline has passed."""
        expired = [ticket for ticket, deadline in self._waiting.items() if deadline <= now]
        for ticket in expired:
            del self._waiting[ticket]
        return expired

    def next_deadline(self) -> float | None:
        """When the next one expires, if none leaves before."""
        return min(self._waiting.values(), default=None)
