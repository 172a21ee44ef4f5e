"""The plan: what goes next, who waits and for how long, what an outage costs."""

from __future__ import annotations

from imagefs import errors, plan, readahead
from imagefs.plan import Failure, Priority
from tests.imagefs.planning import BLOCK_COMPRESSED, ERROR, indices, plan_of


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
