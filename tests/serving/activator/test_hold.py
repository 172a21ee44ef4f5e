"""Who waits, and which replica they get: the pure half of the activator."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving.activator import choice, hold

ONE, TWO = ("10.0.0.1", 80), ("10.0.0.2", 80)


def test_in_order_of_arrival_and_no_more_than_there_is_room_for() -> None:
    held = hold.Hold(hold.Limits(max_held=2, deadline_seconds=10))
    first, second = held.enter(0.0), held.enter(1.0)
    assert held.enter(1.0) is None
    assert held.release() == (first, 10.0)
    assert held.release() == (second, 11.0)
    assert held.release() is None


def test_who_waited_too_long_or_is_gone_gets_no_turn() -> None:
    held = hold.Hold(hold.Limits(deadline_seconds=10))
    first, second, third = held.enter(0.0), held.enter(5.0), held.enter(6.0)
    assert first is not None
    assert second is not None
    assert held.next_deadline() == 10.0
    assert held.expire(9.9) == []
    assert held.expire(10.0) == [first]
    held.leave(second)
    held.leave(second)
    assert held.release() == (third, 16.0)
    assert held.next_deadline() is None


def test_a_turn_that_led_nowhere_is_the_next_one_again() -> None:
    held = hold.Hold(hold.Limits(max_held=1, deadline_seconds=10))
    ticket = held.enter(0.0)
    assert held.release() == (ticket, 10.0)
    newer = held.enter(1.0)
    assert ticket is not None
    held.enter_again(ticket, 10.0)
    assert held.next_deadline() == 10.0
    assert held.release() == (ticket, 10.0)
    assert held.release() == (newer, 11.0)


@given(
    st.lists(
        st.one_of(
            st.just(("enter", 0)),
            st.just(("release", 0)),
            st.tuples(st.just("leave"), st.integers(1, 20)),
            st.tuples(st.just("pass"), st.integers(1, 5)),
        )
    )
)
def test_every_ticket_leaves_once(steps: list[tuple[str, int]]) -> None:
    held = hold.Hold(hold.Limits(max_held=5, deadline_seconds=7))
    now, waiting = 0.0, []
    for step, value in steps:
        if step == "enter":
            ticket = held.enter(now)
            assert (ticket is None) == (len(waiting) == 5)
            if ticket is not None:
                waiting.append(ticket)
        elif step == "release":
            released = held.release()
            assert released == ((waiting[0], released[1]) if waiting and released else None)
            waiting = waiting[1:]
        elif step == "leave":
            held.leave(value)
            waiting = [ticket for ticket in waiting if ticket != value]
        else:
            now += value
            expired = held.expire(now)
            assert expired == waiting[: len(expired)]
            waiting = waiting[len(expired) :]
        assert len(held) == len(waiting)


@pytest.mark.parametrize("wrong", [{"max_held": 0}, {"deadline_seconds": 0.0}, {"deadline_seconds": -1.0}])
def test_limits_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(errors.ConfigurationError):
        hold.Limits(**wrong)  # type: ignore[arg-type]


def test_only_replicas_that_are_up_and_have_room() -> None:
    replicas = choice.Replicas(limit=2)
    replicas.replace([ONE, TWO])
    assert replicas.take(0.0, 0.9) is None
    assert replicas.to_probe() == [ONE, TWO]
    replicas.mark(ONE, up=True)
    assert [replicas.take(0.0, 0.9) for _ in range(3)] == [ONE, ONE, None]
    replicas.mark(TWO, up=True)
    assert replicas.take(0.0, 0.9) == TWO
    replicas.give_back(ONE)
    assert replicas.in_flight == 2


def test_the_less_busy_of_two() -> None:
    replicas = choice.Replicas(limit=10)
    replicas.replace([ONE, TWO])
    for place in (ONE, TWO):
        replicas.mark(place, up=True)
    taken = [replicas.take(0.0, 0.99) for _ in range(6)]
    assert taken.count(ONE) == taken.count(TWO) == 3


def test_a_replica_that_was_taken_out_gets_nothing_more_and_may_come_back() -> None:
    replicas = choice.Replicas(limit=1)
    replicas.replace([ONE])
    replicas.mark(ONE, up=True)
    assert replicas.take(0.0, 0.0) == ONE
    replicas.replace([])
    replicas.mark(ONE, up=True)
    assert replicas.to_probe() == []
    assert replicas.take(0.0, 0.0) is None
    replicas.replace([ONE])
    assert replicas.to_probe() == [ONE], "what was known of it may be old"
    replicas.mark(ONE, up=True)
    assert replicas.take(0.0, 0.0) is None, "what it was given before goes on"
    replicas.give_back(ONE)
    assert replicas.take(0.0, 0.0) == ONE
