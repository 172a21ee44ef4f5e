"""What the fetcher did: the latest events, for the waterfall, and counters. Any thread; bounded memory."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from typing import Any

from imagefs import plan


@dataclasses.dataclass(frozen=True, slots=True)
class FetchEvent:
    """One block's way. Times are time.monotonic_ns(). `reason` is why it was first wanted ("demand", "boot",
    "read_ahead", "fill"), `priority` how urgent it was in the end. `outcome`: "origin", "cache" or "failed".
    `compressed_bytes` is 0 for what cost the origin nothing."""

    map_digest: str
    block: int
    priority: plan.Priority
    reason: str
    wanted_ns: int
    started_ns: int
    arrived_ns: int
    compressed_bytes: int
    outcome: str


@dataclasses.dataclass(frozen=True, slots=True)
class FetchStats:
    """Counters since start. `coalesced_blocks` came in the same request as a neighbour; `fetched_bytes` are
    compressed; `failed_blocks` counts tries, `expired_reads` readers that got an error at their deadline."""

    cache_hits: int
    zero_hits: int
    origin_requests: int
    fetched_blocks: int
    fetched_bytes: int
    uncompressed_bytes: int
    coalesced_blocks: int
    failed_blocks: int
    corrupt_blocks: int
    expired_reads: int
    threads: int


class FetchLog:
    """See the module."""

    def __init__(self, events: int) -> None:
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        self._events: collections.deque[FetchEvent] = collections.deque(maxlen=events)

    def count(self, **counts: int) -> None:
        """Add to counters, by their names in FetchStats."""
        with self._lock:
            self._counts.update(counts)

    def note(self, answer: plan.Answer[Any], outcome: str, compressed_bytes: int) -> None:
        """A block that went through the plan."""
        event = FetchEvent(
            map_digest=answer.layer,
            block=answer.index,
            priority=answer.priority,
            reason=answer.reason.name.lower(),
            wanted_ns=int(answer.wanted_at * 1e9),
            started_ns=int(answer.started_at * 1e9),
            arrived_ns=time.monotonic_ns(),
            compressed_bytes=compressed_bytes if outcome == "origin" else 0,
            outcome=outcome,
        )
        with self._lock:
            self._events.append(event)

    def note_hit(self, map_digest: str, block: int, priority: plan.Priority, wanted_at: float) -> None:
        """A block that was cached when it was asked for, at `wanted_at` (monotonic seconds)."""
        wanted_ns = int(wanted_at * 1e9)
        reason = priority.name.lower()
        event = FetchEvent(
            map_digest, block, priority, reason, wanted_ns, wanted_ns, time.monotonic_ns(), 0, "cache"
        )
        with self._lock:
            self._events.append(event)
            self._counts["cache_hits"] += 1

    def events(self) -> list[FetchEvent]:
        """The latest events, oldest first."""
        with self._lock:
            return list(self._events)

    def stats(self, threads: int) -> FetchStats:
        """The counters, and how many threads there are."""
        names = {field.name for field in dataclasses.fields(FetchStats)} - {"threads"}
        with self._lock:
            return FetchStats(**{name: self._counts[name] for name in names}, threads=threads)
