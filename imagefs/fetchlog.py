"""What the fetcher did: the latest events, for the waterfall, and counters. Any thread; bounded memory."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Mapping
from typing import Any

from imagefs import plan


@dataclasses.dataclass(frozen=True, slots=True)
class FetchEvent:
    """One block's way. `number` grows from event to event, also over a restart of the process: whoever has
    seen one can ask for what came after. Times are time.monotonic_ns(): `arrived_ns` when the block was here,
    whole, `served_ns` when the first who waited had what they waited for, some frames or all. `reason` is why
    it was first wanted ("demand", "boot", "read_ahead", "fill"), `priority` how urgent it was in the end.
    `outcome`: "origin", "peer", "cache" or "failed". `compressed_bytes` is 0 for what cost the origin
    nothing."""

    number: int
    map_digest: str
    block: int
    priority: plan.Priority
    reason: str
    wanted_ns: int
    started_ns: int
    served_ns: int
    arrived_ns: int
    compressed_bytes: int
    outcome: str


@dataclasses.dataclass(frozen=True, slots=True)
class FetchStats:
    """Counters since start. `coalesced_blocks` came in the same request as a neighbour; `fetched_bytes` are
    compressed; `failed_blocks` counts tries, `expired_reads` readers that got an error at their deadline,
    `failed_reads` all demanded blocks whose readers got an error; `demand_misses` are blocks that a reader
    waited for and that had to come from elsewhere; a demand for a frame of a boot pack that was on its way
    anyway counts as `boot_waits` instead. `frame_answers` are reads that got some frames of a block before
    the rest of it came. `boot_bytes` of `fetched_bytes` were boot packs. `queued` blocks wait, by priority.
    `peer_` is what this node got from others (bytes uncompressed; a hedge is a demand for which the origin
    was asked as well), `served_` what it gave to them."""

    cache_hits: int
    cache_bytes: int
    zero_hits: int
    origin_requests: int
    fetched_blocks: int
    fetched_bytes: int
    uncompressed_bytes: int
    coalesced_blocks: int
    failed_blocks: int
    corrupt_blocks: int
    expired_reads: int
    failed_reads: int
    demand_misses: int
    boot_waits: int
    frame_answers: int
    boot_bytes: int
    peer_requests: int
    peer_blocks: int
    peer_bytes: int
    peer_failures: int
    peer_hedges: int
    served_blocks: int
    served_bytes: int
    threads: int
    queued: Mapping[str, int]


class FetchLog:
    """See the module."""

    def __init__(self, events: int) -> None:
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        self._events: collections.deque[FetchEvent] = collections.deque(maxlen=events)
        # No log makes an event a nanosecond: a later one begins above this one's last number.
        self._numbers = itertools.count(time.monotonic_ns())

    def count(self, **counts: int) -> None:
        """Add to counters, by their names in FetchStats."""
        with self._lock:
            self._counts.update(counts)

    def note(self, answer: plan.Answer[Any], outcome: str, compressed_bytes: int) -> None:
        """A block that went through the plan."""
        demanded = answer.priority is plan.Priority.DEMAND
        arrived_ns = time.monotonic_ns()
        with self._lock:
            event = FetchEvent(
                number=next(self._numbers),
                map_digest=answer.layer,
                block=answer.index,
                priority=answer.priority,
                reason=answer.reason.name.lower(),
                wanted_ns=int(answer.wanted_at * 1e9),
                started_ns=int(answer.started_at * 1e9),
                served_ns=arrived_ns if answer.served_at is None else int(answer.served_at * 1e9),
                arrived_ns=arrived_ns,
                compressed_bytes=compressed_bytes if outcome == "origin" else 0,
                outcome=outcome,
            )
            self._events.append(event)
            if demanded and outcome == "failed":
                self._counts["failed_reads"] += 1
            elif demanded and outcome != "cache":
                awaited = answer.reason is plan.Priority.BOOT
                self._counts["boot_waits" if awaited else "demand_misses"] += 1
            if answer.reason is plan.Priority.BOOT:
                self._counts["boot_bytes"] += event.compressed_bytes

    def note_hit(
        self, map_digest: str, block: int, priority: plan.Priority, wanted_at: float, length_bytes: int
    ) -> None:
        """A block of `length_bytes` that was cached when it was asked for, at `wanted_at` (monotonic
        seconds)."""
        wanted_ns = int(wanted_at * 1e9)
        reason = priority.name.lower()
        arrived_ns = time.monotonic_ns()
        with self._lock:
            number = next(self._numbers)
            self._events.append(
                FetchEvent(
                    number=number,
                    map_digest=map_digest,
                    block=block,
                    priority=priority,
                    reason=reason,
                    wanted_ns=wanted_ns,
                    started_ns=wanted_ns,
                    served_ns=arrived_ns,
                    arrived_ns=arrived_ns,
                    compressed_bytes=0,
                    outcome="cache",
                )
            )
            self._counts["cache_hits"] += 1
            self._counts["cache_bytes"] += length_bytes

    def events(self, after: int = 0) -> list[FetchEvent]:
        """The latest events with numbers above `after`, oldest first."""
        with self._lock:
            newer = itertools.takewhile(lambda event: event.number > after, reversed(self._events))
            return list(newer)[::-1]

    def stats(self, threads: int, queued: Mapping[str, int]) -> FetchStats:
        """The counters, how many threads there are, and what waits."""
        names = {field.name for field in dataclasses.fields(FetchStats)} - {"threads", "queued"}
        with self._lock:
            counts = {name: self._counts[name] for name in names}
        return FetchStats(**counts, threads=threads, queued=queued)
