"""The plan as a state machine: whatever is wanted, given up and answered, its invariants hold."""

from __future__ import annotations

import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from imagefs import plan
from imagefs.plan import Failure, Priority
from tests.imagefs.planning import BLOCK_COMPRESSED, ERROR, map_of

ORIGINS = {"a": "o", "b": "o", "c": "p"}
BLOCKS = 5


@dataclasses.dataclass
class Waiting:
    layer: str
    index: int
    deadline: float | None
    frames: int


class Planning(RuleBasedStateMachine):
    """Random wanting, fetching, failing, removing; every answer is checked against who waits."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = plan.Policy(
            connections=6,
            connections_per_origin=4,
            connections_per_layer=3,
            demand_connections=1,
            failing_connections=1,
            request_bytes=3 * BLOCK_COMPRESSED,
            read_ahead_request_bytes=2 * BLOCK_COMPRESSED,
            fill_request_bytes=4 * BLOCK_COMPRESSED,
        )
        self.plan: plan.Plan[int] = plan.Plan(self.policy)
        self.now = 0.0
        self.number = 0
        self.waiting: dict[int, Waiting] = {}
        self.running: list[plan.Fetch] = []
        self.attached: set[str] = set()

    def settle(self, waiters: tuple[int, ...], layer: str, index: int) -> None:
        for waiter in waiters:
            who = self.waiting.pop(waiter)  # KeyError: answered twice
            assert (who.layer, who.index) == (layer, index)

    @rule(layer=st.sampled_from(sorted(ORIGINS)))
    def attach(self, layer: str) -> None:
        self.plan.add_layer(layer, ORIGINS[layer], map_of(BLOCKS))
        self.attached.add(layer)

    @rule(layer=st.sampled_from(sorted(ORIGINS)))
    def detach(self, layer: str) -> None:
        for answer in self.plan.remove_layer(layer):
            self.settle(answer.waiters, answer.layer, answer.index)
        self.attached.discard(layer)
        assert not [w for w in self.waiting.values() if w.layer == layer]

    @precondition(lambda self: self.attached)
    @rule(
        data=st.data(),
        index=st.integers(0, BLOCKS - 1),
        priority=st.sampled_from(Priority),
        waits=st.booleans(),
        frames=st.integers(0, 15),
    )
    def want(self, data: st.DataObject, index: int, priority: Priority, waits: bool, frames: int) -> None:
        layer = data.draw(st.sampled_from(sorted(self.attached)))
        if priority is Priority.DEMAND or waits:
            self.number += 1
            deadline = self.now + 60.0 if priority is Priority.DEMAND else None
            self.waiting[self.number] = Waiting(layer, index, deadline, frames)
            self.plan.want(layer, index, priority, self.now, self.number, deadline, frames)
        else:
            self.plan.want(layer, index, priority, self.now)

    @rule()
    def start(self) -> None:
        fetch = self.plan.next_fetch(self.now)
        if fetch is None:
            return
        assert fetch.layer in self.attached
        assert list(fetch.indices) == list(range(fetch.indices[0], fetch.indices[-1] + 1))
        assert fetch.length == len(fetch.indices) * BLOCK_COMPRESSED
        if fetch.priority is Priority.DEMAND:
            assert len(fetch.indices) <= 2
        busy = {(other.layer, index) for other in self.running for index in other.indices}
        assert not busy & {(fetch.layer, index) for index in fetch.indices}, "fetched twice at a time"
        self.running.append(fetch)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), frames=st.integers(1, 15))
    def frames_come(self, data: st.DataObject, frames: int) -> None:
        fetch = data.draw(st.sampled_from(self.running))
        index = data.draw(st.sampled_from(fetch.indices))
        enough = {
            number
            for number, who in self.waiting.items()
            if (who.layer, who.index) == (fetch.layer, index) and who.frames and not who.frames & ~frames
        }
        served = self.plan.frames_arrived(fetch.layer, index, frames, self.now)
        assert set(served) == enough
        self.settle(tuple(served), fetch.layer, index)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), failure=st.sampled_from([None, None, *Failure]))
    def end(self, data: st.DataObject, failure: Failure | None) -> None:
        fetch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        for index in fetch.indices:
            if failure is None:
                answer, _ = self.plan.arrived(fetch.layer, index)
                self.settle(answer.waiters, fetch.layer, index)
                left = [w for w in self.waiting.values() if (w.layer, w.index) == (fetch.layer, index)]
                assert not left
            else:
                answer, _ = self.plan.failed(fetch.layer, index, failure, ERROR, self.now, 0.5)
                self.settle(answer.waiters, fetch.layer, index)
        self.plan.finished(fetch)

    @rule(seconds=st.sampled_from([0.0, 0.3, 5.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for answer in self.plan.expire(self.now):
            self.settle(answer.waiters, answer.layer, answer.index)
        assert all(w.deadline is None or w.deadline > self.now for w in self.waiting.values())

    @invariant()
    def limits_hold(self) -> None:
        assert len(self.running) <= self.policy.connections
        for layer, origin in ORIGINS.items():
            assert sum(f.layer == layer for f in self.running) <= self.policy.connections_per_layer
            assert sum(f.origin == origin for f in self.running) <= self.policy.connections_per_origin
        others = [f for f in self.running if f.priority is not Priority.DEMAND]
        assert len(others) <= self.policy.connections - self.policy.demand_connections

    def teardown(self) -> None:
        """Whatever happened, an origin that answers drains the queue, demands first."""
        self.now += 10.0
        for _ in range(10_000):
            while self.running:
                fetch = self.running.pop()
                for index in fetch.indices:
                    self.settle(self.plan.arrived(fetch.layer, index)[0].waiters, fetch.layer, index)
                self.plan.finished(fetch)
            fetch = self.plan.next_fetch(self.now)
            if fetch is None:
                break
            self.running.append(fetch)
        assert not [w for w in self.waiting.values() if w.deadline is None or w.deadline > self.now]
        assert self.plan.next_fetch(self.now) is None


Planning.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestPlanning = Planning.TestCase
