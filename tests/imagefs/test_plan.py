from __future__ import annotations

import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from imagefs import blockmap, errors, plan, readahead
from imagefs.plan import Failure, Priority

ERROR = errors.UnavailableError("down")
BLOCK_COMPRESSED = 1000


def map_of(blocks: int, compressed: int = BLOCK_COMPRESSED) -> blockmap.BlockMap:
    table = tuple(blockmap.Block(bytes(32), n * compressed, compressed) for n in range(blocks))
    return blockmap.BlockMap(
        block_bytes=65536,
        frame_bytes=65536,
        image_bytes=blocks * 65536,
        blob_bytes=blocks * compressed,
        metadata_offset=0,
        metadata_bytes=4096,
        blob_digest=bytes(32),
        source_digest=bytes(32),
        diff_id=bytes(32),
        chain_id=None,
        compression_level=1,
        libzstd_version=10507,
        root_implied=False,
        blocks=table,
    )


def plan_of(*layers: tuple[str, str], policy: plan.Policy | None = None) -> plan.Plan[str]:
    made: plan.Plan[str] = plan.Plan(policy or plan.Policy())
    for layer, origin in layers:
        made.add_layer(layer, origin, map_of(64))
    return made


def indices(fetch: plan.Fetch | None) -> tuple[int, ...] | None:
    return fetch.indices if fetch else None


def test_priorities_go_in_order_whatever_the_order_of_wanting() -> None:
    queue = plan_of(("a", "o"))
    for index, priority in ((40, Priority.FILL), (30, Priority.READ_AHEAD), (20, Priority.BOOT)):
        queue.want("a", index, priority, 0.0)
    queue.want("a", 10, Priority.DEMAND, 0.0, "reader", 60.0)
    order = []
    while (fetch := queue.next_fetch(1.0)) is not None:
        order.append(fetch.indices)
        queue.arrived("a", fetch.indices[0])
        queue.finished(fetch)
    assert order == [(10,), (20,), (30,), (40,)]


def test_a_demand_raises_a_queued_block_and_takes_the_one_after_it_along() -> None:
    queue = plan_of(("a", "o"))
    for index in range(8):
        queue.want("a", index, Priority.READ_AHEAD, 0.0)
    queue.want("a", 5, Priority.DEMAND, 1.0, "reader", 60.0)
    assert indices(queue.next_fetch(1.0)) == (5, 6)
    assert indices(queue.next_fetch(1.0)) == (0, 1, 2, 3, 4)
    assert indices(queue.next_fetch(1.0)) == (7,)
    answer, _ = queue.arrived("a", 5)
    assert answer.waiters == ("reader",)
    assert (answer.reason, answer.priority) == (Priority.READ_AHEAD, Priority.DEMAND)
    assert answer.wanted_at == 0.0


def test_a_demand_takes_along_no_block_that_is_for_another_reason() -> None:
    queue = plan_of(("a", "o"))
    queue.want("a", 6, Priority.FILL, 0.0)
    queue.want("a", 7, Priority.DEMAND, 0.0, "another", 60.0)
    queue.want("a", 5, Priority.DEMAND, 0.0, "reader", 60.0)
    assert [indices(queue.next_fetch(0.0)) for _ in range(2)] == [(7,), (5,)]


def test_what_a_demand_took_along_gives_way_until_it_is_demanded_itself() -> None:
    queue = plan_of(("a", "o"))
    queue.want("a", 1, Priority.READ_AHEAD, 0.0)
    queue.want("a", 0, Priority.DEMAND, 0.0, "first", 60.0)
    double = queue.next_fetch(0.0)
    queue.want("a", 9, Priority.DEMAND, 0.0, "second", 60.0)
    other = queue.next_fetch(0.0)
    assert double is not None
    assert other is not None
    assert (double.indices, other.indices) == ((0, 1), (9,))
    assert not queue.gives_way(double)
    queue.arrived("a", 0)
    assert queue.gives_way(double)
    queue.want("a", 1, Priority.DEMAND, 0.0, "third", 60.0)
    assert not queue.gives_way(double)


def test_neighbours_share_a_request_up_to_its_bound() -> None:
    policy = plan.Policy(
        connections_per_layer=8,
        request_bytes=2 * BLOCK_COMPRESSED,
        read_ahead_request_bytes=3 * BLOCK_COMPRESSED,
        fill_request_bytes=5 * BLOCK_COMPRESSED,
    )
    queue = plan_of(("a", "o"), policy=policy)
    for index in range(5, 8):
        queue.want("a", index, Priority.BOOT, 0.0)
    assert indices(queue.next_fetch(0.0)) == (5, 6)
    assert indices(queue.next_fetch(0.0)) == (7,)
    for index in range(4):
        queue.want("a", index, Priority.READ_AHEAD, 0.0)
    for index in range(10, 20):
        queue.want("a", index, Priority.FILL, 0.0)
    first = queue.next_fetch(0.0)
    assert first is not None
    assert (first.indices, first.offset, first.length) == ((0, 1, 2), 0, 3 * BLOCK_COMPRESSED)
    assert indices(queue.next_fetch(0.0)) == (3,)
    assert indices(queue.next_fetch(0.0)) == (10, 11, 12, 13, 14)


def test_a_block_larger_than_a_request_still_goes() -> None:
    queue = plan_of(("a", "o"), policy=plan.Policy(fill_request_bytes=10))
    queue.want("a", 0, Priority.FILL, 0.0)
    assert indices(queue.next_fetch(0.0)) == (0,)


def test_limits_per_layer_and_origin_leave_room_for_others_and_for_demands() -> None:
    policy = plan.Policy(
        connections=10,
        connections_per_origin=6,
        connections_per_layer=4,
        demand_connections=1,
        request_bytes=0,
    )
    queue = plan_of(("a", "o"), ("b", "o"), ("c", "p"), policy=policy)
    for layer in ("a", "b", "c"):
        for index in range(20):
            queue.want(layer, index, Priority.BOOT, 0.0)
    started = []
    while (fetch := queue.next_fetch(0.0)) is not None:
        started.append(fetch.layer)
    assert started.count("a") <= 3
    assert started.count("a") + started.count("b") == 5
    assert started.count("c") == 3
    queue.want("a", 19, Priority.DEMAND, 0.0, "reader", 60.0)
    assert indices(queue.next_fetch(0.0)) == (19,), "a connection is kept for demands"


def test_one_connection_is_enough_for_everything() -> None:
    policy = plan.Policy(connections=1, connections_per_origin=1, connections_per_layer=1)
    queue = plan_of(("a", "o"), policy=policy)
    for priority in Priority:
        queue.want("a", 10 * priority, priority, 0.0)
        fetch = queue.next_fetch(0.0)
        assert fetch is not None
        assert queue.next_fetch(0.0) is None
        queue.arrived("a", fetch.indices[0])
        queue.finished(fetch)


def test_fill_is_narrow_and_waits_while_its_origin_fetches_a_demand() -> None:
    policy = plan.Policy(fill_request_bytes=0, fill_connections=2)
    queue = plan_of(("a", "o"), ("b", "p"), policy=policy)
    for index in range(9):
        queue.want("a", index, Priority.FILL, 0.0)
    filling = [queue.next_fetch(0.0) for _ in range(3)]
    assert [indices(fetch) for fetch in filling] == [(0,), (1,), None]
    queue.want("a", 40, Priority.DEMAND, 0.0, "reader", 60.0)
    demand = queue.next_fetch(0.0)
    assert demand is not None
    for fetch in filling[:2]:
        assert fetch is not None
        queue.arrived("a", fetch.indices[0])
        queue.finished(fetch)
    assert queue.next_fetch(0.0) is None
    queue.want("b", 0, Priority.FILL, 0.0)
    other = queue.next_fetch(0.0)
    assert other is not None
    assert other.layer == "b"
    queue.arrived("a", 40)
    queue.finished(demand)
    assert indices(queue.next_fetch(0.0)) == (2,)


def test_origins_and_layers_take_turns() -> None:
    policy = plan.Policy(request_bytes=0)
    queue = plan_of(("a", "o"), ("b", "o"), ("c", "p"), policy=policy)
    for layer in ("a", "b", "c"):
        for index in range(2):
            queue.want(layer, index, Priority.BOOT, 0.0)
    order = [queue.next_fetch(0.0) for _ in range(6)]
    layers = [fetch.layer for fetch in order if fetch]
    assert layers == ["a", "c", "b", "c", "a", "b"]


def test_everyone_who_waits_is_answered_by_one_fetch() -> None:
    queue = plan_of(("a", "o"))
    for number in range(1000):
        queue.want("a", 3, Priority.DEMAND, 0.0, f"reader {number}", 60.0)
    assert indices(queue.next_fetch(0.0)) == (3,)
    queue.want("a", 3, Priority.DEMAND, 0.0, "late", 60.0)
    assert queue.next_fetch(0.0) is None
    answer, _ = queue.arrived("a", 3)
    assert len(set(answer.waiters)) == 1001


def test_an_outage_is_waited_out_by_demands_only_one_fetch_at_a_time() -> None:
    queue = plan_of(("a", "o"))
    queue.want("a", 0, Priority.DEMAND, 0.0, "reader", 60.0)
    queue.want("a", 9, Priority.BOOT, 0.0, "filler")
    demand, fill = queue.next_fetch(0.0), queue.next_fetch(0.0)
    assert demand is not None
    assert fill is not None
    answer, began = queue.failed("a", 9, Failure.UNAVAILABLE, ERROR, 1.0, 0.5)
    assert (answer.waiters, began) == (("filler",), True)
    answer, began = queue.failed("a", 0, Failure.UNAVAILABLE, ERROR, 1.0, 0.5)
    assert (answer.waiters, began) == ((), False)
    queue.finished(demand)
    queue.finished(fill)

    assert queue.next_fetch(1.0) is None
    again_at = queue.next_time(1.0)
    assert again_at is not None
    assert 1.0 < again_at < 60.0
    queue.want("a", 1, Priority.READ_AHEAD, again_at)
    retry = queue.next_fetch(again_at)
    assert retry is not None
    assert (retry.indices, retry.attempt) == ((0,), 1)
    assert queue.next_fetch(again_at) is None, "one at a time while it fails"
    answer, recovered = queue.arrived("a", 0)
    assert (answer.waiters, recovered) == (("reader",), True)
    queue.finished(retry)
    assert indices(queue.next_fetch(again_at)) == (1,)


def test_pauses_grow_to_their_bound_and_a_new_demand_tries_at_once() -> None:
    policy = plan.Policy(retry_seconds=1.0, retry_max_seconds=8.0)
    queue = plan_of(("a", "o"), policy=policy)
    queue.want("a", 0, Priority.DEMAND, 0.0, "reader", 1000.0)
    now = 0.0
    pauses = []
    for _ in range(6):
        fetch = queue.next_fetch(now)
        assert fetch is not None
        queue.failed("a", 0, Failure.UNAVAILABLE, ERROR, now, 1.0)
        queue.finished(fetch)
        at = queue.next_time(now)
        assert at is not None
        pauses.append(at - now)
        now = at
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]

    fetch = queue.next_fetch(now)
    assert fetch is not None
    queue.failed("a", 0, Failure.UNAVAILABLE, ERROR, now, 1.0)
    queue.finished(fetch)
    assert queue.next_fetch(now) is None
    queue.want("a", 1, Priority.DEMAND, now, "another", 2000.0)
    assert queue.next_fetch(now) is not None


def test_retry_after_is_honoured_even_for_a_new_demand() -> None:
    queue = plan_of(("a", "o"))
    queue.want("a", 0, Priority.DEMAND, 0.0, "reader", 60.0)
    fetch = queue.next_fetch(0.0)
    assert fetch is not None
    queue.failed("a", 0, Failure.UNAVAILABLE, ERROR, 0.0, 0.5, retry_after_seconds=20.0)
    queue.finished(fetch)
    queue.want("a", 1, Priority.DEMAND, 1.0, "another", 61.0)
    assert queue.next_fetch(19.9) is None
    assert queue.next_fetch(20.0) is not None


def test_no_retry_after_puts_reads_off_for_good() -> None:
    queue = plan_of(("a", "o"))
    queue.want("a", 0, Priority.DEMAND, 0.0, "reader", 60.0)
    fetch = queue.next_fetch(0.0)
    assert fetch is not None
    queue.failed("a", 0, Failure.UNAVAILABLE, ERROR, 0.0, 0.5, retry_after_seconds=1e9)
    queue.finished(fetch)
    queue.expire(60.0)
    queue.want("a", 1, Priority.DEMAND, 61.0, "a later read", 121.0)
    assert indices(queue.next_fetch(61.0)) == (1,)


def test_dead_origins_cannot_use_up_the_connections() -> None:
    policy = plan.Policy(connections=8, connections_per_origin=8, failing_connections=1)
    queue = plan_of(*[(f"dead {n}", "dead") for n in range(20)], ("alive", "alive"), policy=policy)
    queue.want("dead 0", 0, Priority.DEMAND, 0.0, "r", 60.0)
    fetch = queue.next_fetch(0.0)
    assert fetch is not None
    queue.failed("dead 0", 0, Failure.UNAVAILABLE, ERROR, 0.0, 0.5)
    queue.finished(fetch)
    for number in range(1, 20):
        queue.want(f"dead {number}", 0, Priority.DEMAND, 0.0, "r", 60.0)
    assert queue.next_fetch(0.0) is not None
    assert queue.next_fetch(0.0) is None
    queue.want("alive", 0, Priority.FILL, 0.0)
    alive = queue.next_fetch(0.0)
    assert alive is not None
    assert alive.layer == "alive"


def test_a_block_that_stays_wrong_is_given_up_and_its_layer_is_not_blamed() -> None:
    queue = plan_of(("a", "o"), policy=plan.Policy(corrupt_attempts=2))
    queue.want("a", 0, Priority.DEMAND, 0.0, "reader", 60.0)
    wrong = errors.IntegrityError("wrong")
    for attempt in range(2):
        fetch = queue.next_fetch(0.0)
        assert fetch is not None
        assert fetch.attempt == attempt
        answer, began = queue.failed("a", 0, Failure.CORRUPT, wrong, 0.0, 0.5)
        assert not began
        queue.finished(fetch)
    assert (answer.waiters, answer.error) == (("reader",), wrong)
    assert queue.next_fetch(0.0) is None


def test_a_deadline_ends_the_waiting_and_the_last_one_the_queueing() -> None:
    queue = plan_of(("a", "o"))
    queue.want("a", 0, Priority.DEMAND, 0.0, "first", 60.0)
    fetch = queue.next_fetch(0.0)
    assert fetch is not None
    queue.failed("a", 0, Failure.DENIED, ERROR, 0.0, 0.5)
    queue.finished(fetch)
    queue.want("a", 0, Priority.DEMAND, 0.0, "second", 70.0)
    assert queue.expire(59.9) == []
    assert [a.waiters for a in queue.expire(60.0)] == [("first",)]
    assert [a.waiters for a in queue.expire(70.0)] == [("second",)]
    assert queue.next_fetch(1000.0) is None
    assert queue.next_time(1000.0) is None
    queue.want("a", 0, Priority.DEMAND, 1000.0, "third", 1060.0)
    assert indices(queue.next_fetch(1000.0)) == (0,), "a later request tries again at once"


def test_removing_a_layer_answers_its_waiters_and_forgets_its_queue() -> None:
    queue = plan_of(("a", "o"), ("b", "o"))
    queue.want("a", 0, Priority.DEMAND, 0.0, "running", 60.0)
    running = queue.next_fetch(0.0)
    queue.want("a", 1, Priority.DEMAND, 0.0, "queued", 60.0)
    queue.want("a", 2, Priority.BOOT, 0.0)
    queue.want("b", 0, Priority.BOOT, 0.0)
    answers = queue.remove_layer("a")
    assert sorted(w for answer in answers for w in answer.waiters) == ["queued", "running"]
    assert queue.remove_layer("a") == []
    other = queue.next_fetch(0.0)
    assert other is not None
    assert other.layer == "b"
    assert queue.next_fetch(0.0) is None
    assert running is not None
    assert queue.arrived("a", 0)[0].waiters == ()
    queue.finished(running)


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


def test_metadata_is_followed_by_nothing() -> None:
    queue = plan_of(("a", "o"), policy=plan.Policy(read_ahead=readahead.ReadAheadPolicy(initial_blocks=2)))
    assert list(queue.demanded("a", 0)) == []
    assert list(queue.demanded("a", 1)) == [2, 3]


def test_read_ahead_leaves_most_of_an_origin_to_demands() -> None:
    queue = plan_of(("a", "o"), ("b", "o"), ("c", "p"), policy=plan.Policy(read_ahead_connections=2))
    for layer in ("a", "b", "c"):
        for index in range(0, 10, 2):
            queue.want(layer, index, Priority.READ_AHEAD, 0.0)
    started = [fetch for fetch in (queue.next_fetch(0.0) for _ in range(10)) if fetch]
    assert sorted(fetch.layer for fetch in started) == ["a", "b", "c", "c"]
    for index in range(20, 24):
        queue.want("a", index, Priority.DEMAND, 0.0, f"reader {index}", 60.0)
    assert [indices(queue.next_fetch(0.0)) for _ in range(4)] == [(20,), (21,), (22,), (23,)]
    queue.arrived(started[0].layer, started[0].indices[0])
    queue.finished(started[0])
    again = queue.next_fetch(0.0)
    assert again is not None
    assert again.priority is Priority.READ_AHEAD


def framed_plan(policy: plan.Policy | None = None) -> plan.Plan[str]:
    frames = tuple(blockmap.Frame(bytes(32), BLOCK_COMPRESSED // 4) for _ in range(4))
    whole = map_of(64)
    blocks = tuple(dataclasses.replace(block, frames=frames) for block in whole.blocks)
    made: plan.Plan[str] = plan.Plan(policy or plan.Policy())
    for layer in ("a", "b"):
        made.add_layer(layer, "o", dataclasses.replace(whole, frame_bytes=16384, blocks=blocks))
    return made


def test_a_demanded_block_begins_at_the_frame_of_who_waits_longest() -> None:
    queue = framed_plan()
    queue.want("a", 1, Priority.DEMAND, 0.0, "first", 60.0, 0b1100)
    queue.want("a", 1, Priority.DEMAND, 0.0, "second", 60.0, 0b0001)
    queue.want("a", 2, Priority.READ_AHEAD, 0.0)
    queue.want("b", 1, Priority.DEMAND, 0.0, "whole", 60.0)
    fetches = [queue.next_fetch(0.0) for _ in range(3)]
    assert [f and (f.layer, f.indices, f.first_frame) for f in fetches] == [
        ("a", (1,), 2),
        ("b", (1,), 0),
        ("a", (2,), 0),
    ]


def test_frames_answer_those_whom_they_are_enough_for() -> None:
    queue = framed_plan()
    for waiter, frames in (("2", 0b0100), ("2-3", 0b1100), ("0", 0b0001), ("all", 0)):
        queue.want("a", 1, Priority.DEMAND, 0.0, waiter, 60.0, frames)
    assert queue.awaited_frames("a", 1, 0b1111) == 0, "nothing of it is on its way"
    fetch = queue.next_fetch(1.0)
    assert fetch is not None
    assert queue.awaited_frames("a", 1, 0b0100) == 0b0100
    assert queue.frames_arrived("a", 1, 0b0100, 2.0) == ["2"]
    assert queue.awaited_frames("a", 1, 0b0100) == 0
    assert queue.awaited_frames("a", 1, 0b1100) == 0b1100
    assert queue.frames_arrived("a", 1, 0b1100, 3.0) == ["2-3"]
    answer, _ = queue.arrived("a", 1)
    assert (sorted(answer.waiters), answer.served_at) == (["0", "all"], 2.0)
    assert queue.frames_arrived("a", 1, 0b1111, 4.0) == []
    queue.finished(fetch)


def test_what_nobody_waits_for_any_more_gives_way_to_other_demands_and_to_nothing_else() -> None:
    queue = framed_plan()
    queue.want("a", 1, Priority.DEMAND, 0.0, "one", 60.0, 0b0001)
    rest = queue.next_fetch(0.0)
    queue.want("b", 1, Priority.DEMAND, 0.0, "other", 60.0, 0b0001)
    other = queue.next_fetch(0.0)
    assert rest is not None
    assert other is not None
    assert not queue.gives_way(rest), "somebody waits for it"
    queue.frames_arrived("a", 1, 0b0001, 0.0)
    assert queue.gives_way(rest)
    assert not queue.gives_way(other)
    queue.want("a", 1, Priority.DEMAND, 0.0, "joins", 60.0, 0b1000)
    assert not queue.gives_way(rest)
    queue.frames_arrived("a", 1, 0b1001, 0.0)
    queue.frames_arrived("b", 1, 0b0001, 0.0)
    assert not queue.gives_way(rest), "two rests share the link"
    assert not queue.gives_way(other)
    for fetch in (rest, other):
        queue.arrived(fetch.layer, 1)
        queue.finished(fetch)


def test_what_is_left_gives_way_to_none_that_needs_its_connection() -> None:
    queue = framed_plan(plan.Policy(connections_per_layer=2))
    queue.want("a", 1, Priority.DEMAND, 0.0, "one", 60.0, 0b0001)
    rest = queue.next_fetch(0.0)
    assert rest is not None
    queue.frames_arrived("a", 1, 0b0001, 0.0)
    queue.want("a", 2, Priority.DEMAND, 0.0, "two", 60.0, 0b0001)
    other = queue.next_fetch(0.0)
    assert other is not None
    assert queue.gives_way(rest)
    queue.want("a", 3, Priority.DEMAND, 0.0, "three", 60.0, 0b0001)
    assert queue.next_fetch(0.0) is None
    assert not queue.gives_way(rest)
    queue.arrived("a", 1)
    queue.finished(rest)
    assert indices(queue.next_fetch(0.0)) == (3,)


def test_frames_far_from_the_next_block_ask_for_nothing_of_it() -> None:
    queue = framed_plan(plan.Policy(read_ahead=readahead.ReadAheadPolicy(initial_blocks=2)))
    assert list(queue.demanded("a", 1, 0b0111)) == []
    assert list(queue.demanded("a", 1, 0b1000)) == [2, 3]
    assert list(queue.demanded("a", 1, 0b1111)) == []
    assert list(queue.demanded("a", 9)) == [10, 11]


def test_a_rest_that_fails_is_nobodys_failure() -> None:
    queue = framed_plan()
    queue.want("a", 1, Priority.DEMAND, 0.0, "one", 60.0, 0b0001)
    fetch = queue.next_fetch(0.0)
    assert fetch is not None
    queue.frames_arrived("a", 1, 0b0001, 0.0)
    answer, _ = queue.failed("a", 1, Failure.UNAVAILABLE, ERROR, 0.0, 0.5)
    queue.finished(fetch)
    assert answer.waiters == ()
    assert queue.next_fetch(1000.0) is None
    assert queue.next_time(0.0) is None
