"""What to fetch next, and why: the one queue of everything that somebody waits for or will want.

Pure: no I/O, clock or randomness; `now` (monotonic seconds) and jitter are arguments. Called by
`fetcher.py` under its lock. The unit is a block of a layer, named (layer, index).

Rules:

* Demand goes before boot, boot before read-ahead, read-ahead before fill. A request for a queued block
  raises its priority. A demanded block takes along the one after it, if that is to be read ahead: behind it
  on the same connection, a guess takes nothing from the demand, and a request less is made. Others take their
  queued neighbours along, up to `request_bytes` of their priority in one request.
* A block is in at most one fetch at a time, however many want it. Every waiter is answered exactly once:
  by `frames_arrived`, `arrived`, `failed`, `expire` or `remove_layer`.
* Who waits for frames of a block is answered as soon as those are there. The fetch of a demanded block begins
  at the first frame that is wanted, and brings those before it last: it ends with the whole block, always.
* Fetches in flight are limited per layer and per origin, so that an origin or blob that hangs holds its own
  share and no more; some connections are for demands only. Layers and origins take turns.
* A waiter with a deadline waits out failures until then, while its layer is tried again, one fetch at a time,
  with growing pauses. Waiters without one, and blocks that nobody waits for, end with the first failure.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import heapq
import itertools
from typing import Generic, TypeVar

from imagefs import blockmap, framemask, readahead, waiting
from imagefs.fetchpolicy import Policy as Policy

K = TypeVar("K")
W = TypeVar("W")
"""A waiter: opaque here, given back when its block was answered."""


class Priority(enum.IntEnum):
    """Lower goes first."""

    DEMAND = 0
    BOOT = 1
    READ_AHEAD = 2
    FILL = 3


class Failure(enum.Enum):
    """What a failed fetch means for those who wait."""

    UNAVAILABLE = "unavailable"  # tried again until the deadline
    DENIED = "denied"  # the same, slowly: credentials may be renewed
    CORRUPT = "corrupt"  # this block again, a bounded number of times
    FINAL = "final"  # no use to try again


@dataclasses.dataclass(frozen=True, slots=True)
class Fetch:
    """One request to make: `indices` ascending and neighbours, together blob bytes offset..offset+length.
    `first_frame` is the frame of the first block to begin with. `attempt` counts the earlier tries of the
    first block, so that a retry can ask another copy."""

    layer: str
    origin: str
    indices: tuple[int, ...]
    offset: int
    length: int
    priority: Priority
    attempt: int
    first_frame: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Answer(Generic[W]):
    """What became of one block: who gets the answer now, why the block was first wanted, with what priority
    in the end, and when (monotonic seconds). `served_at` is when the first reader had the frames it waited
    for, None if that was not before all of the block. `error` is the last failure, None if there was none."""

    layer: str
    index: int
    waiters: tuple[W, ...]
    reason: Priority
    priority: Priority
    wanted_at: float
    started_at: float
    error: Exception | None
    served_at: float | None = None


@dataclasses.dataclass(slots=True)
class _Job(Generic[W]):
    layer: str
    index: int
    reason: Priority
    priority: Priority
    wanted_at: float
    started_at: float = 0.0
    running: bool = False
    attempts: int = 0
    corrupt: int = 0
    error: Exception | None = None
    served_at: float | None = None
    waiting: waiting.Waiting[W] = dataclasses.field(default_factory=waiting.Waiting)


class _Layer:
    """Queues of one layer, and how its origin treats it."""

    def __init__(self, origin: str, block_map: blockmap.BlockMap, policy: Policy) -> None:
        self.origin = origin
        self.block_map = block_map
        # Ordered dicts, for removal from the middle: what was queued first goes first.
        self.queues: tuple[collections.OrderedDict[int, None], ...] = tuple(
            collections.OrderedDict() for _ in Priority
        )
        self.read_ahead = readahead.ReadAhead(policy.read_ahead, len(block_map.blocks))
        self.metadata_blocks = frozenset(block_map.metadata_blocks())
        self.failures = 0
        self.retry_at = 0.0
        self.not_before = 0.0  # the origin's own wish (Retry-After): a new demand does not shorten it


class Plan(Generic[W]):
    """The state. Not thread-safe: its owner has a lock."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._request_bounds = {
            Priority.BOOT: policy.request_bytes,
            Priority.READ_AHEAD: policy.read_ahead_request_bytes,
            Priority.FILL: policy.fill_request_bytes,
        }
        self._layers: dict[str, _Layer] = {}
        # Origin -> its layers with something queued; both in order of whose turn it is.
        self._turns: collections.OrderedDict[str, collections.OrderedDict[str, None]] = (
            collections.OrderedDict()
        )
        self._jobs: dict[tuple[str, int], _Job[W]] = {}
        self._in_flight = 0
        self._in_flight_by_origin: collections.Counter[str] = collections.Counter()
        self._in_flight_by_kind: collections.Counter[tuple[str, Priority]] = collections.Counter()
        self._in_flight_by_layer: collections.Counter[str] = collections.Counter()
        self._failing_origins: set[str] = set()
        # The blocks of demand fetches in flight, by origin: they give way to one another. By the fetch's id,
        # because the block may be on its way again before the connection of its last fetch is free.
        self._demanded: dict[str, dict[int, tuple[_Job[W], ...]]] = {}
        self._numbers = itertools.count()
        self._deadlines: list[tuple[float, int, tuple[str, int]]] = []
        self._patient = 0

    # -- layers ------------------------------------------------------------------------------------

    def add_layer(self, layer: str, origin: str, block_map: blockmap.BlockMap) -> None:
        """Make a layer known; its fetches count against `origin`."""
        if layer not in self._layers:
            self._layers[layer] = _Layer(origin, block_map, self._policy)

    def remove_layer(self, layer: str) -> list[Answer[W]]:
        """Drop what is queued; answers for its blocks, those in flight included, whose bytes are then for
        nobody but the cache."""
        state = self._layers.pop(layer, None)
        if state is None:
            return []
        self._leave_turns(state.origin, layer)
        answers = []
        for key in [key for key in self._jobs if key[0] == layer]:
            job = self._jobs[key]
            answers.append(self._answer(job))
            if not job.running:
                del self._jobs[key]
        return answers

    def queued(self) -> dict[Priority, int]:
        """Blocks that wait for a connection, by priority."""
        return {
            priority: sum(len(layer.queues[priority]) for layer in self._layers.values())
            for priority in Priority
        }

    # -- wanting -----------------------------------------------------------------------------------

    def want(
        self,
        layer: str,
        index: int,
        priority: Priority,
        now: float,
        waiter: W | None = None,
        deadline: float | None = None,
        frames: int = framemask.WHOLE,
    ) -> None:
        """Ask for a block of a known layer. `waiter` is answered once: as soon as `frames` of it are here, by
        `expire` from `deadline` on."""
        state = self._layers[layer]
        key = (layer, index)
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = _Job(layer, index, priority, priority, now)
            self._enqueue(state, job)
        elif priority < job.priority:
            if not job.running:
                del state.queues[job.priority][index]
            job.priority = priority
            if not job.running:
                self._enqueue(state, job)
        if waiter is not None and deadline is not None:
            number = next(self._numbers)
            job.waiting.add_patient(number, waiter, frames)
            self._patient += 1
            self._add_deadline(deadline, number, key)
        elif waiter is not None:
            job.waiting.add_impatient(waiter, frames, demands=priority is Priority.DEMAND)
        if priority is Priority.DEMAND and not self._in_flight_by_layer[layer]:
            state.retry_at = state.not_before

    def demanded(self, layer: str, index: int, frames: int = framemask.WHOLE) -> range:
        """Note that a block, or frames of it, were demanded, cached or not; the blocks worth wanting at
        READ_AHEAD. Metadata says nothing about which data will be wanted, and a mount asks for all of it by
        itself: with three layers, nine blocks came along that nobody had asked for. Nor do frames say
        anything about the next block before they are near it: a miss of frames costs less, so that a wrong
        guess weighs more. With `import torch` replayed on a model of the link (frames of 512 KiB), asking for
        the next block in the last quarter, and not at once, took 2.08 s in place of 2.24 at 1 Gbit/s, 14.1 in
        place of 14.8 at 100 Mbit/s with 50 ms; only at 1 Gbit/s with 10 ms was it slower, 2.83 s in place of
        2.60. Whole blocks: 2.48, 16.6 and 3.05 s."""
        state = self._layers[layer]
        if index in state.metadata_blocks:
            return range(0)
        count = len(state.block_map.blocks[index].frames)
        if frames != framemask.WHOLE and 4 * frames.bit_length() <= 3 * count:
            return range(0)
        return state.read_ahead.demanded(index)

    # -- fetching ----------------------------------------------------------------------------------

    def next_fetch(self, now: float) -> Fetch | None:
        """The fetch to start now, or None. The caller reports each of its blocks once, by `arrived` or
        `failed`, then calls `finished`."""
        for priority in Priority:
            layer = self._ready(priority, now)
            if layer is not None:
                return self._start(layer, priority, now)
        return None

    def awaited_frames(self, layer: str, index: int, decoded: int) -> int:
        """What those wait for who can do with some of the `decoded` frames of a running block."""
        job = self._jobs.get((layer, index))
        return job.waiting.within(decoded) if job is not None and job.running else 0

    def frames_arrived(self, layer: str, index: int, frames: int, now: float) -> list[W]:
        """These frames of a running block came and were verified. Whoever wanted no more than those."""
        job = self._jobs.get((layer, index))
        if job is None or not job.running:
            return []
        patient = job.waiting.patient
        served = job.waiting.take_served(frames)
        self._patient -= patient - job.waiting.patient
        if served and job.served_at is None:
            job.served_at = now
        return served

    def arrived(self, layer: str, index: int) -> tuple[Answer[W], bool]:
        """A running block came and was verified. The answer, and whether an outage of its layer ended."""
        state = self._layers.get(layer)
        recovered = False
        if state is not None:
            recovered = state.failures > 0
            state.failures = 0
            state.retry_at = state.not_before = 0.0
            self._failing_origins.discard(state.origin)
        return self._answer(self._jobs.pop((layer, index))), recovered

    def failed(
        self,
        layer: str,
        index: int,
        failure: Failure,
        error: Exception,
        now: float,
        jitter: float,
        retry_after_seconds: float | None = None,
    ) -> tuple[Answer[W], bool]:
        """A running block did not come. The answer `error` to whoever waits no longer, and whether an outage
        of its layer began. `jitter` is random, 0 to 1."""
        job = self._jobs[layer, index]
        state = self._layers.get(layer)
        job.running = False
        job.error = error
        job.attempts += 1
        job.corrupt += failure is Failure.CORRUPT
        began = False
        if state is not None and failure in (Failure.UNAVAILABLE, Failure.DENIED):
            began = state.failures == 0
            self._back_off(state, failure, now, jitter, retry_after_seconds)
        hopeless = failure is Failure.FINAL or job.corrupt >= self._policy.corrupt_attempts
        if state is None or hopeless or not job.waiting.patient:
            del self._jobs[layer, index]
            return self._answer(job), began
        self._enqueue(state, job)
        return self._describe(job, job.waiting.take_impatient()), began

    def finished(self, fetch: Fetch) -> None:
        """The connection of `fetch` is free again."""
        self._in_flight -= 1
        _decrement(self._in_flight_by_origin, fetch.origin)
        _decrement(self._in_flight_by_kind, (fetch.origin, fetch.priority))
        _decrement(self._in_flight_by_layer, fetch.layer)
        if fetch.priority is Priority.DEMAND:
            demanded = self._demanded[fetch.origin]
            del demanded[id(fetch)]
            if not demanded:
                del self._demanded[fetch.origin]

    def gives_way(self, fetch: Fetch) -> bool:
        """Whether a running fetch should take no more bytes for now: no reader waits for what it brings, but
        one does for a demand in flight at its origin. That holds for fills, and for what is left of a
        demanded block when its readers have the frames that they wanted: unless another demand has no
        connection, which this one will give back the sooner the better."""
        demanded = self._demanded.get(fetch.origin)
        if fetch.priority not in (Priority.DEMAND, Priority.FILL) or not demanded:
            return False
        own = (self._jobs.get((fetch.layer, index)) for index in fetch.indices)
        if any(job is not None and job.waiting.demanded() for job in own):
            return False
        if fetch.priority is Priority.FILL:
            return True
        queued = (self._layers[layer] for layer in self._turns.get(fetch.origin, ()))
        if any(state.queues[Priority.DEMAND] for state in queued):
            return False
        return any(job.waiting.demanded() for jobs in demanded.values() for job in jobs)

    # -- time --------------------------------------------------------------------------------------

    def next_time(self, now: float) -> float | None:
        """When time alone next changes something: a deadline passes, or a pause ends."""
        self._drop_answered_deadlines()
        moments = [self._deadlines[0][0]] if self._deadlines else []
        for layers in self._turns.values():
            moments += [self._layers[name].retry_at for name in layers if self._layers[name].retry_at > now]
        return min(moments, default=None)

    def is_paused(self, layer: str, now: float) -> bool:
        """Whether time alone will let a known layer's fetches start again."""
        return self._layers[layer].retry_at > now

    def expire(self, now: float) -> list[Answer[W]]:
        """Answers for the waiters whose deadline has passed."""
        answers = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number, key = heapq.heappop(self._deadlines)
            job = self._jobs.get(key)
            if job is None or not job.waiting.is_patient(number):
                continue
            if job.running or job.waiting.patient > 1:
                self._patient -= 1
                answers.append(self._describe(job, (job.waiting.take_patient(number),)))
                continue
            # Nobody patient is left: the block leaves the queue, with whoever else wants it.
            answers.append(self._answer(self._jobs.pop(key)))
            state = self._layers[job.layer]
            del state.queues[job.priority][job.index]
            if not any(state.queues):
                self._leave_turns(state.origin, job.layer)
        return answers

    # -- inside ------------------------------------------------------------------------------------

    def _enqueue(self, state: _Layer, job: _Job[W]) -> None:
        state.queues[job.priority][job.index] = None
        self._turns.setdefault(state.origin, collections.OrderedDict()).setdefault(job.layer, None)

    def _leave_turns(self, origin: str, layer: str) -> None:
        layers = self._turns.get(origin)
        if layers is not None:
            layers.pop(layer, None)
            if not layers:
                del self._turns[origin]

    def _ready(self, priority: Priority, now: float) -> str | None:
        """The layer whose turn it is among those that may start a fetch of this priority."""
        policy = self._policy
        reserved = 0 if priority is Priority.DEMAND else policy.demand_connections
        if self._in_flight >= max(1, policy.connections - reserved):
            return None
        for origin, layers in self._turns.items():
            limit = max(1, policy.connections_per_origin - reserved)
            if origin in self._failing_origins:
                limit = policy.failing_connections
            if self._in_flight_by_origin[origin] >= limit or not self._may_start(origin, priority):
                continue
            for layer in layers:
                state = self._layers[layer]
                limit = 1 if state.failures else max(1, policy.connections_per_layer - reserved)
                if (
                    state.queues[priority]
                    and state.retry_at <= now
                    and self._in_flight_by_layer[layer] < limit
                ):
                    return layer
        return None

    def _may_start(self, origin: str, priority: Priority) -> bool:
        """What is fetched on a guess shares the link with demands: it keeps out of their way."""
        in_flight = self._in_flight_by_kind
        if priority is Priority.READ_AHEAD:
            return in_flight[origin, priority] < self._policy.read_ahead_connections
        return priority is not Priority.FILL or (
            in_flight[origin, priority] < self._policy.fill_connections
            and not in_flight[origin, Priority.DEMAND]
        )

    def _start(self, layer: str, priority: Priority, now: float) -> Fetch:
        state = self._layers[layer]
        queue = state.queues[priority]
        blocks = state.block_map.blocks
        first = next(iter(queue))
        end = first + 1
        length = blocks[first].compressed_bytes
        if priority is not Priority.DEMAND:
            bound = self._request_bounds[priority]
            while end in queue and length + blocks[end].compressed_bytes <= bound:
                length += blocks[end].compressed_bytes
                end += 1
        elif end in state.queues[Priority.READ_AHEAD] and not (blocks[first].frames or state.failures):
            length += blocks[end].compressed_bytes
            end += 1
        jobs = tuple(self._jobs[layer, index] for index in range(first, end))
        for job in jobs:
            del state.queues[job.priority][job.index]
            job.running = True
            job.started_at = now
        self._turns[state.origin].move_to_end(layer)
        self._turns.move_to_end(state.origin)
        if not any(state.queues):
            self._leave_turns(state.origin, layer)
        self._in_flight += 1
        self._in_flight_by_origin[state.origin] += 1
        self._in_flight_by_kind[state.origin, priority] += 1
        self._in_flight_by_layer[layer] += 1
        first_frame = 0
        if priority is Priority.DEMAND and blocks[first].frames:
            first_frame = jobs[0].waiting.first_frame()
        fetch = Fetch(
            layer,
            state.origin,
            tuple(range(first, end)),
            blocks[first].offset,
            length,
            priority,
            jobs[0].attempts,
            first_frame,
        )
        if priority is Priority.DEMAND:
            self._demanded.setdefault(state.origin, {})[id(fetch)] = jobs
        return fetch

    def _back_off(
        self, state: _Layer, failure: Failure, now: float, jitter: float, retry_after_seconds: float | None
    ) -> None:
        policy = self._policy
        self._failing_origins.add(state.origin)
        pause = policy.retry_seconds * 2.0 ** min(state.failures, 16)
        pause = min(pause, policy.retry_max_seconds)
        if failure is Failure.DENIED:
            pause = max(pause, policy.denied_retry_seconds)
        state.failures += 1
        state.retry_at = now + pause * (0.5 + 0.5 * jitter)
        if retry_after_seconds is not None:
            state.not_before = now + min(retry_after_seconds, policy.retry_after_max_seconds)
            state.retry_at = max(state.retry_at, state.not_before)

    def _answer(self, job: _Job[W]) -> Answer[W]:
        """The answer for everyone who waits for `job`, none of whom waits afterwards."""
        self._patient -= job.waiting.patient
        return self._describe(job, job.waiting.take_all())

    def _describe(self, job: _Job[W], waiters: tuple[W, ...]) -> Answer[W]:
        return Answer(
            job.layer,
            job.index,
            waiters,
            job.reason,
            job.priority,
            job.wanted_at,
            job.started_at,
            job.error,
            job.served_at,
        )

    def _add_deadline(self, deadline: float, number: int, key: tuple[str, int]) -> None:
        heapq.heappush(self._deadlines, (deadline, number, key))
        if len(self._deadlines) > 2 * self._patient + 64:
            # Most waiters are answered long before their deadline.
            self._deadlines = [entry for entry in self._deadlines if self._waits(entry)]
            heapq.heapify(self._deadlines)

    def _drop_answered_deadlines(self) -> None:
        while self._deadlines and not self._waits(self._deadlines[0]):
            heapq.heappop(self._deadlines)

    def _waits(self, entry: tuple[float, int, tuple[str, int]]) -> bool:
        job = self._jobs.get(entry[2])
        return job is not None and job.waiting.is_patient(entry[1])


def _decrement(counter: collections.Counter[K], key: K) -> None:
    """A counter's zeros would pile up with layers that came and went."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
