"""Routing where replicas remember prompts: what stickiness saves in work, and costs in balance. Pure, seeded.

`kernel` simulates days with a fixed work for each request. Here the work of a request depends on where it
goes: a replica keeps blocks of prompts, least recently used first to go, and what a request's prompt has in
common with them is cached (`units.cost` says what that saves). So this one is a small simulation of its own,
of a fixed number of replicas, for thousands of requests: routing is what it compares, not scaling.

A replica shares its capacity, a second of work a second, evenly among the requests that it serves, as
batching engines do; beyond `limit` they wait in its queue, first come, first served. Routers see what Envoy
sees, requests in flight, or what they are expected to cost (`by_units`); with `sticky`, Envoy's consistent
hash with bounded load is asked with the session's key, and a replica that holds more than `balance` times the
mean is passed over for the next in the key's own order.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import heapq
import random
from collections.abc import Sequence

from serving.autoscaler import units
from serving.autoscaler.units import Coefficients


class Way(enum.Enum):
    """How a request's replica is chosen."""

    RANDOM = "random"
    P2C = "p2c"
    FULL_SCAN = "full scan"
    STICKY = "sticky"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """`blocks` identify the prompt's pieces of `block_tokens` each, the same for the same beginning."""

    at_seconds: float
    session: int
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Fleet:
    """What serves them."""

    replicas: int
    cost: Coefficients
    limit: int = 64
    cache_blocks: int = 1_000
    block_tokens: int = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """A way to route. `by_units`: load is cost in flight, not requests."""

    way: Way
    by_units: bool = False
    balance: float = 1.25


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """By request, in the order of arrival. `alone_seconds` is what it takes with nothing cached and nobody
    else there; `work_seconds` in all is what replicas did."""

    latency_seconds: tuple[float, ...]
    alone_seconds: tuple[float, ...]
    cached_part: float
    work_seconds: float
    span_seconds: float

    def slowdowns(self) -> list[float]:
        """Latency over time alone, ascending: below 1 is what the cache saved."""
        return sorted(took / own for took, own in zip(self.latency_seconds, self.alone_seconds, strict=True))


class _Replica:
    """One queue, one cache, and the clock of shared service: every request in service gains `1/n` a
    second."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._cache: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._serving: list[tuple[float, int]] = []
        """Heap of the virtual time at which each is done, and which it is."""
        self._queue: collections.deque[int] = collections.deque()
        self._virtual = self._at = 0.0
        self.requests = 0
        self.units = 0.0
        self.version = 0

    def next_end(self) -> float | None:
        """When the first of those in service is done, if nobody comes or goes."""
        if not self._serving:
            return None
        return self._at + max(0.0, self._serving[0][0] - self._virtual) * len(self._serving)

    def enter(self, number: int, now: float) -> None:
        self._queue.append(number)
        self._pass(now)

    def end(self, now: float) -> int:
        """The request that is done."""
        self._pass(now)
        self._virtual = max(self._virtual, self._serving[0][0])
        return heapq.heappop(self._serving)[1]

    def start(self) -> int | None:
        """Who is to be served next, if there is room."""
        room = len(self._serving) < self._fleet.limit
        return self._queue.popleft() if self._queue and room else None

    def serve(self, number: int, work: float) -> None:
        heapq.heappush(self._serving, (self._virtual + work, number))
        self.version += 1

    def recall(self, blocks: Sequence[int]) -> int:
        """How many blocks, from the first on, are remembered; all are from now on."""
        known = 0
        for block in blocks:
            if block not in self._cache:
                break
            known += 1
        for block in reversed(blocks):  # a prompt's beginning outlives its end
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) > self._fleet.cache_blocks:
            self._cache.popitem(last=False)
        return known

    def _pass(self, now: float) -> None:
        if self._serving:
            self._virtual += (now - self._at) / len(self._serving)
        self._at = now


def run(requests: Sequence[Request], fleet: Fleet, rule: Rule, seed: int) -> Outcome:
    """Every request, to its end. They are in the order of their arrival."""
    return _Run(requests, fleet, rule, seed).outcome()


class _Run:
    def __init__(self, requests: Sequence[Request], fleet: Fleet, rule: Rule, seed: int) -> None:
        self._requests, self._fleet, self._rule = requests, fleet, rule
        self._chance = random.Random(seed)  # noqa: S311
        self._replicas = [_Replica(fleet) for _ in range(fleet.replicas)]
        self._alone = [units.cost(fleet.cost, each.input_tokens, each.output_tokens) for each in requests]
        self._ends: list[tuple[float, int, int]] = []
        """Heap of when each replica's next one is done, and the version of it that this holds for."""
        self._home: dict[int, int] = {}
        self._latency = [0.0] * len(requests)
        self._cached_tokens = 0.0
        self._work = 0.0

    def outcome(self) -> Outcome:
        for number, request in enumerate(self._requests):
            self._until(request.at_seconds)
            place = self._choose(request, self._alone[number])
            replica = self._replicas[place]
            self._home[number] = place
            replica.requests += 1
            replica.units += self._alone[number]
            replica.enter(number, request.at_seconds)
            self._fill(place)
        last = self._until(float("inf"))
        return Outcome(
            tuple(self._latency),
            tuple(self._alone),
            self._cached_tokens / max(1, sum(each.input_tokens for each in self._requests)),
            self._work,
            last,
        )

    def _until(self, now: float) -> float:
        """All that ends before `now`; when the last of it did."""
        last = 0.0
        while self._ends and self._ends[0][0] <= now:
            at, place, version = heapq.heappop(self._ends)
            replica = self._replicas[place]
            if version != replica.version:
                continue
            number = replica.end(at)
            replica.requests -= 1
            replica.units -= self._alone[number]
            replica.version += 1
            self._latency[number] = at - self._requests[number].at_seconds
            last = at
            self._fill(place)
        return last

    def _fill(self, place: int) -> None:
        replica = self._replicas[place]
        while (number := replica.start()) is not None:
            request = self._requests[number]
            cached = min(request.input_tokens, replica.recall(request.blocks) * self._fleet.block_tokens)
            work = units.cost(self._fleet.cost, request.input_tokens, request.output_tokens, cached)
            self._cached_tokens += cached
            self._work += work
            replica.serve(number, work)
        end = replica.next_end()
        if end is not None:
            heapq.heappush(self._ends, (end, place, replica.version))

    # -- routing -------------------------------------------------------------------------------------

    def _choose(self, request: Request, cost: float) -> int:
        count = len(self._replicas)
        match self._rule.way:
            case Way.RANDOM:
                return self._chance.randrange(count)
            case Way.P2C:
                return min(self._chance.randrange(count), self._chance.randrange(count), key=self._load)
            case Way.FULL_SCAN:
                begin = self._chance.randrange(count)
                return min(((begin + step) % count for step in range(count)), key=self._load)
            case Way.STICKY:
                return self._sticky(request.session, cost)

    def _sticky(self, session: int, cost: float) -> int:
        """Envoy's table is the same thing with less arithmetic: an order of all replicas for each key."""
        order = sorted(
            range(len(self._replicas)),
            key=lambda place: random.Random(session * 1_000_003 + place).random(),  # noqa: S311
        )
        own = cost if self._rule.by_units else 1.0
        mean = (sum(map(self._load, order)) + own) / len(order)
        within = (place for place in order if self._load(place) + own <= self._rule.balance * mean)
        idle = (place for place in order if self._load(place) <= 0)
        return next(within, next(idle, order[0]))

    def _load(self, place: int) -> float:
        replica = self._replicas[place]
        return replica.units if self._rule.by_units else replica.requests
