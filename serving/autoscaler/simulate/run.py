"""One policy against one traffic: the loop of simulated seconds.

Each second: the requests up to it (`kernel`), one observation as the real signals would make it, perhaps late
or missing; the policy's answer; replicas start, for a time that is drawn, and drain, as a provider has them:
not ready before ready, young before old. What was is recorded for each second. Deterministic: the same
arguments give the same result.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from serving.autoscaler import observation as observations
from serving.autoscaler.simulate import fleet as fleets
from serving.autoscaler.simulate import kernel
from serving.autoscaler.simulate.fleet import DRAINING, READY, STARTING, Fleet, Floats, Integers, Rules
from serving.autoscaler.simulate.policies import Policy
from serving.autoscaler.simulate.traffic import Arrivals, Traffic
from serving.replica import State as ReplicaState

_P99 = 2.3263478740408408
"""The standard normal distribution's."""
_STATES = {
    STARTING: ReplicaState.STARTING,
    READY: ReplicaState.READY,
    DRAINING: ReplicaState.DRAINING,
}
LATENCY_WINDOW_SECONDS = 10
SETTLE_SECONDS = 60
"""Nobody decides before: an endpoint that has just been filled shows no load that a policy would ever see."""


@dataclasses.dataclass(frozen=True, slots=True)
class Starts:
    """How long a replica starts: lognormal by its median and 99th percentile; the same twice: always that."""

    p50_seconds: float
    p99_seconds: float

    def draw(self, random: np.random.Generator) -> float:
        """One start's seconds."""
        spread = math.log(self.p99_seconds / self.p50_seconds) / _P99
        return self.p50_seconds * math.exp(spread * random.standard_normal())


@dataclasses.dataclass(frozen=True, slots=True)
class Faults:
    """Replicas fail, each on the average once in `failure_seconds` of being ready; reports of load come
    `late_seconds` late, and a part of `missing` not at all."""

    failure_seconds: float = math.inf
    late_seconds: int = 0
    missing: float = 0.0


NO_FAULTS = Faults()


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """What is simulated. It begins with `initial` ready replicas, and keeps them until a policy is asked.
    `slots` requests are what a replica serves well, and the limit that a run begins with; `speed[n]` is each
    one's of n, up to the largest limit that a policy may set."""

    slots: int
    speed: Floats
    rules: Rules
    starts: Starts
    most: int
    initial: int = 1
    faults: Faults = NO_FAULTS


@dataclasses.dataclass(frozen=True)
class Series:
    """For each second: what came, what became of it in that second, and what there was at its end."""

    arrived: Integers
    finished: Integers
    late: Integers
    rejected: Integers
    lost: Integers
    in_flight: Integers
    queued: Integers
    held: Integers
    starting: Integers
    ready: Integers
    draining: Integers
    wanted: Integers
    limit: Integers
    histograms: Integers  # [windows of LATENCY_WINDOW_SECONDS, BUCKETS]


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of it. `waited` requests had to wait at a replica, for `wait_seconds` together."""

    traffic: str
    policy: str
    seed: int
    series: Series
    waited: int
    wait_seconds: float

    @property
    def arrived(self) -> int:
        """Requests that came."""
        return int(self.series.arrived.sum())

    @property
    def unserved(self) -> int:
        """Requests that were late, rejected or lost with their replica."""
        each = self.series
        return int(each.late.sum() + each.rejected.sum() + each.lost.sum())

    @property
    def unserved_part(self) -> float:
        """Of those that came."""
        return self.unserved / max(1, self.arrived)

    @property
    def rejected_part(self) -> float:
        """Of those that came."""
        return int(self.series.rejected.sum()) / max(1, self.arrived)

    @property
    def replica_hours(self) -> float:
        """Everything that holds an accelerator: starting and draining, too."""
        each = self.series
        return float((each.starting + each.ready + each.draining).sum()) / 3_600


def simulate(endpoint: Endpoint, traffic: Traffic, policy: Policy, seed: int) -> Result:
    """The whole of the traffic."""
    return _Run(endpoint, traffic, policy, seed).result()


class _Run:
    def __init__(self, endpoint: Endpoint, traffic: Traffic, policy: Policy, seed: int) -> None:
        self._endpoint, self._traffic, self._policy, self._seed = endpoint, traffic, policy, seed
        # Room for those that drain beside as many new ones as there may be.
        self._fleet = fleets.empty(2 * endpoint.most + 8, endpoint.speed, endpoint.rules, seed)
        self._random = np.random.default_rng([seed, 4])
        self._names = [""] * self._fleet.rows.size
        self._made = 0
        # Reports on their way; the one that arrives now is the first.
        self._reports: collections.deque[observations.Demand | None] = collections.deque(
            [None] * endpoint.faults.late_seconds, endpoint.faults.late_seconds + 1
        )

    def result(self) -> Result:
        endpoint, policy, fleet = self._endpoint, self._policy, self._fleet
        for _ in range(endpoint.initial):
            self._start(0.0, 0.0)
        wanted = endpoint.initial
        record = _Record(self._traffic.seconds)
        feed = _Feed(self._traffic.blocks(self._seed))
        for second in range(self._traffic.seconds):
            now = float(second + 1)
            feed.advance(fleet, now)
            self._reports.append(self._report(record.note(fleet, second)))
            if second >= SETTLE_SECONDS and (second + 1) % policy.every_seconds == 0:
                found = observations.Observation(now, self._reports[0], self._instances(), endpoint.most)
                action = policy.decide(found, now)
                wanted = min(action.replicas, endpoint.most)
                if action.limit is not None and action.limit != fleet.whole["limit"][0]:
                    kernel.set_limit(fleet, max(1, min(action.limit, endpoint.speed.size - 1)), now)
            self._scale(wanted, now)
            record.decided(fleet, second, wanted)
        return Result(
            traffic=self._traffic.name,
            policy=policy.name,
            seed=self._seed,
            series=record.series(),
            waited=int(fleet.whole["waited"][0]),
            wait_seconds=float(fleet.whole["wait_seconds"][0]),
        )

    def _start(self, now: float, seconds: float) -> None:
        row = int(np.argmin(self._fleet.rows["state"]))
        if self._fleet.rows["state"][row] != fleets.ABSENT:
            return  # so many are draining that there is no room: the next second tries again
        lives = self._endpoint.faults.failure_seconds
        fails_at = math.inf if math.isinf(lives) else now + seconds + self._random.exponential(lives)
        kernel.create(self._fleet, row, now, now + seconds, fails_at)
        self._made += 1
        self._names[row] = f"replica-{self._made}"

    def _scale(self, wanted: int, now: float) -> None:
        rows = self._fleet.rows
        state = rows["state"]
        there = int(np.count_nonzero((state == STARTING) | (state == READY)))
        for _ in range(wanted - there):
            self._start(now, self._endpoint.starts.draw(self._random))
        if there > wanted:
            found = np.flatnonzero((state == STARTING) | (state == READY))
            order = np.lexsort((-rows["created_at"][found], state[found]))
            for row in found[order[: there - wanted]]:
                kernel.drain(self._fleet, int(row))

    def _report(self, seen: _Seen) -> observations.Demand | None:
        faults = self._endpoint.faults
        if faults.missing and self._random.random() < faults.missing:
            return None
        done = int(self._fleet.rows["done"].sum())
        return observations.Demand(
            in_flight=seen.in_flight,
            held=seen.held,
            queued=seen.queued,
            issued_per_second=seen.issued,
            rejected_per_second=seen.rejected,
            service_seconds=float(self._fleet.rows["done_seconds"].sum()) / done if done else None,
        )

    def _instances(self) -> tuple[observations.Instance, ...]:
        rows = self._fleet.rows
        found = np.flatnonzero(rows["state"])
        there = rows[found]
        states, done = there["state"].tolist(), there["done"].tolist()
        ready_at, waiting = there["ready_at"].tolist(), there["waiting"].astype(np.float64)
        seconds = (there["done_seconds"] / np.maximum(there["done"], 1)).tolist()
        unknown = itertools.repeat(None)
        columns = (
            [self._names[row] for row in found.tolist()],
            [_STATES[state] for state in states],
            there["created_at"].tolist(),
            [None if state == STARTING else at for state, at in zip(states, ready_at, strict=True)],
            (there["serving"] + waiting).tolist(),
            there["done"].astype(np.float64).tolist(),
            [mean if number else None for number, mean in zip(done, seconds, strict=True)],
            waiting.tolist(),
            unknown,  # cpu
            unknown,  # gpu
            unknown,  # memory
        )
        return tuple(map(observations.Instance._make, zip(*columns, strict=False)))


class _Feed:
    """Blocks of arrivals, given to the kernel second by second."""

    def __init__(self, blocks: Iterator[Arrivals]) -> None:
        self._blocks = blocks
        self._block: Arrivals | None = next(blocks, None)
        self._first = 0

    def advance(self, fleet: Fleet, until: float) -> None:
        """Everything before that moment."""
        while self._block is not None:
            at, work, key = self._block
            self._first = kernel.advance(fleet, at, work, key, self._first, until)
            if self._first < at.size:
                return
            self._block, self._first = next(self._blocks, None), 0
            # The block's last arrival may lie long before `until`, and the next one begins before it, too.
        kernel.advance(fleet, *_NOTHING, 0, until)


_NOTHING = Arrivals(np.zeros(0), np.zeros(0), np.zeros(0, np.int64))


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    """One second, as a load report tells it."""

    in_flight: int
    queued: int
    held: int
    issued: int
    rejected: int


class _Record:
    """The series, as they grow."""

    _TOTALS = ("arrived", "finished", "late", "rejected", "lost")

    def __init__(self, seconds: int) -> None:
        names = [each.name for each in dataclasses.fields(Series) if each.name != "histograms"]
        self._columns = {name: np.zeros(seconds, np.int64) for name in names}
        windows = -(-seconds // LATENCY_WINDOW_SECONDS)
        self._histograms = np.zeros((windows, fleets.BUCKETS), np.int64)
        self._before = dict.fromkeys((*self._TOTALS, "issued"), 0)

    def note(self, fleet: Fleet, second: int) -> _Seen:
        """What happened up to the end of this second, before anybody decides."""
        whole, rows, columns = fleet.whole[0], fleet.rows, self._columns
        fresh = {}
        for name, before in self._before.items():
            total = int(whole[name])
            fresh[name], self._before[name] = total - before, total
        for name in self._TOTALS:
            columns[name][second] = fresh[name]
        queued = int(rows["waiting"].sum())
        in_flight = int(rows["serving"].sum()) + queued
        columns["in_flight"][second], columns["queued"][second] = in_flight, queued
        columns["held"][second] = held = int(whole["held"])
        columns["limit"][second] = whole["limit"]
        self._histograms[second // LATENCY_WINDOW_SECONDS] += fleet.histogram
        fleet.histogram[:] = 0
        return _Seen(in_flight, queued, held, fresh["issued"], fresh["rejected"])

    def decided(self, fleet: Fleet, second: int, wanted: int) -> None:
        """What was decided at its end, and what is there now."""
        counted = np.bincount(fleet.rows["state"], minlength=DRAINING + 1)
        for state, name in ((STARTING, "starting"), (READY, "ready"), (DRAINING, "draining")):
            self._columns[name][second] = counted[state]
        self._columns["wanted"][second] = wanted
        fleet.rows["done"] = 0
        fleet.rows["done_seconds"] = 0.0

    def series(self) -> Series:
        """All of it."""
        return Series(**self._columns, histograms=self._histograms)
