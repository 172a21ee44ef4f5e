"""Threads that fail as one: the first error wins, everyone who waits is woken, order is kept."""

from __future__ import annotations

import threading

import pytest

from converter import tasks


def test_a_pipe_keeps_order_and_ends() -> None:
    group = tasks.Group()
    pipe: tasks.Pipe[int] = tasks.Pipe(group, 2)
    seen: list[int] = []

    def produce() -> None:
        for number in range(1000):
            pipe.put(number)
        pipe.close()

    group.start("produce", produce)
    group.start("consume", lambda: seen.extend(pipe))
    group.wait()
    assert seen == list(range(1000))


def test_an_error_wakes_whoever_waits_and_is_the_result() -> None:
    group = tasks.Group()
    full: tasks.Pipe[int] = tasks.Pipe(group, 1)
    empty: tasks.Pipe[int] = tasks.Pipe(group, 1)
    promise: tasks.Promise[int] = tasks.Promise(group)
    tokens = tasks.Tokens(group, 0)
    woken: list[str] = []
    waiting = threading.Barrier(5)

    def waiter(name: str, wait: object) -> None:
        waiting.wait()
        try:
            wait()  # type: ignore[operator]
        except tasks.Cancelled:
            woken.append(name)
            raise

    full.put(0)
    for name, wait in (
        ("full", lambda: full.put(1)),
        ("empty", lambda: list(empty)),
        ("promise", promise.get),
        ("tokens", tokens.__enter__),
    ):
        group.start(name, lambda name=name, wait=wait: waiter(name, wait))  # type: ignore[misc]

    def fail() -> None:
        waiting.wait()
        raise ValueError("the first")

    group.start("fail", fail)
    with pytest.raises(ValueError, match="the first"):
        group.wait()
    assert sorted(woken) == ["empty", "full", "promise", "tokens"]


def test_what_is_made_after_the_cancellation_is_cancelled_too() -> None:
    group = tasks.Group()
    group.cancel()
    ran: list[int] = []
    group.start("late", lambda: ran.append(1))
    group.wait()
    with pytest.raises(tasks.Cancelled):
        tasks.Promise[int](group).get()
    with pytest.raises(tasks.Cancelled):
        list(tasks.Pipe[int](group, 1))
    assert ran == []


def test_the_first_error_hides_those_that_follow_from_it() -> None:
    group = tasks.Group()
    gate = threading.Event()

    def second() -> None:
        gate.wait()
        raise KeyError("a consequence")

    group.start("second", second)
    group.on_cancel(gate.set)
    group.fail(ValueError("the cause"))
    with pytest.raises(ValueError, match="the cause"):
        group.wait()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 1001])
def test_a_pipe_in_batches_gives_every_item_in_order(count: int) -> None:
    group = tasks.Group()
    pipe: tasks.Pipe[int] = tasks.Pipe(group, 4, 2)
    seen: list[int] = []

    def produce() -> None:
        for number in range(count):
            pipe.put(number)
        pipe.close()

    group.start("produce", produce)
    group.start("consume", lambda: seen.extend(pipe))
    group.wait()
    assert seen == list(range(count))


def test_who_waits_for_a_batch_is_woken_by_a_cancellation() -> None:
    group = tasks.Group()
    pipe: tasks.Pipe[int] = tasks.Pipe(group, 4, 2)
    pipe.put(0)  # less than a batch
    seen: list[int] = []
    consumer_ended = threading.Event()

    def consume() -> None:
        try:
            seen.extend(pipe)
        finally:
            consumer_ended.set()

    group.start("consume", consume)
    group.cancel()
    assert consumer_ended.wait(10)
