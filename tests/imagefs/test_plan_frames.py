"""The plan where a miss waits for frames of a block."""

from __future__ import annotations

import dataclasses

from imagefs import blockmap, plan, readahead
from imagefs.plan import Failure, Priority
from tests.imagefs.planning import BLOCK_COMPRESSED, ERROR, indices, map_of


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
