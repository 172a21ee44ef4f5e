"""What `decide` keeps to, whatever it is shown, and what it does on plain loads."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.autoscaler.decide import Decision, State, decide
from serving.autoscaler.observation import Demand, Instance, Observation
from serving.autoscaler.policy import Policy, Schedule
from serving.replica import State as ReplicaState

POLICY = Policy(minimum=1, maximum=500, target=8, limit=16, predict=False)
START = 1_700_000_000.0


def instances(ready: int, starting: int = 0, now: float = START) -> tuple[Instance, ...]:
    made = [
        Instance(f"r{i}", ReplicaState.READY, created_at=START - 1000, ready_at=START - 995)
        for i in range(ready)
    ]
    made += [Instance(f"s{i}", ReplicaState.STARTING, created_at=now) for i in range(starting)]
    return tuple(made)


def flowing(rate: float, service: float = 1.0, ready: int = 500) -> Demand:
    return Demand(in_flight=rate * service, issued_per_second=rate, service_seconds=service)


def run(
    state: State, demand: Callable[[int], Demand | None], seconds: int, start: float | None = None
) -> list[Decision]:
    """A decision a second; replicas are ready at once."""
    now = (state.at if state.at is not None else START) if start is None else start
    decisions = []
    for second in range(seconds):
        now += 1
        decision = decide(state, Observation(now, demand(second), instances(state.replicas)), now)
        state = decision.state
        decisions.append(decision)
    return decisions


def test_a_steady_load_has_its_target_in_each_replica() -> None:
    last = run(State.initial(POLICY), lambda _: flowing(800), 120)[-1]
    assert last.replicas == 100
    assert "800 in flight" in last.because.formula


def test_a_saturated_replica_that_rejects_gets_company() -> None:
    policy = dataclasses.replace(POLICY, target=16)
    state = State.initial(policy)
    demand = Demand(in_flight=16, issued_per_second=16, rejected_per_second=48, service_seconds=1)
    assert run(state, lambda _: demand, 30)[-1].replicas >= 4


def test_from_zero_at_once_and_back_after_the_idle_time() -> None:
    policy = dataclasses.replace(POLICY, minimum=0, idle_seconds=60)
    decisions = run(State.initial(policy), lambda _: Demand(0), 5)
    assert decisions[-1].replicas == 0
    woken = run(decisions[-1].state, lambda _: Demand(0, held=1), 1)[-1]
    assert woken.replicas == 1
    idle = run(woken.state, lambda _: Demand(0), 100)
    assert idle[30].replicas == 1
    assert idle[-1].replicas == 0


@pytest.mark.parametrize("rate", [1, 5, 20, 100, 500])
def test_steady_poisson_load_turns_round_at_most_once_in_ten_minutes(rate: float) -> None:
    chance = random.Random(int(rate))
    ends: list[float] = []
    now = 0.0

    def second(number: int) -> Demand:
        nonlocal now, ends
        issued = 0
        while now < number + 1:
            now += chance.expovariate(rate)
            ends.append(now + chance.expovariate(1.0))
            issued += 1
        ends = [end for end in ends if end > number + 1]
        return Demand(in_flight=len(ends), issued_per_second=issued, service_seconds=1)

    decisions = run(State.initial(POLICY), second, 1500)
    sizes = [each.replicas for each in decisions[600:]]
    moves = [b - a for a, b in itertools.pairwise(sizes) if a != b]
    reversals = sum(a * b < 0 for a, b in itertools.pairwise(moves))
    assert reversals <= 2


numbers = st.one_of(
    st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 1e4), st.just(0.0)
)


@st.composite
def demands(draw: st.DrawFn) -> Demand | None:
    if draw(st.booleans()):
        return draw(st.sampled_from([None, Demand(0)]))
    values = {field.name: draw(numbers) for field in dataclasses.fields(Demand)}
    service = values.pop("service_seconds")
    return Demand(**{name: value or 0.0 for name, value in values.items()}, service_seconds=service)


@given(
    st.lists(
        st.tuples(
            demands(),
            st.floats(-100, 1000),
            st.floats(-5, 5),
            st.integers(0, 30),
            st.integers(0, 5),
            st.one_of(st.none(), st.integers(-1, 40)),
        ),
        max_size=30,
    ),
    st.integers(0, 5),
    st.integers(0, 50),
)
@settings(max_examples=200, deadline=None)
def test_bounds_hold_and_nothing_wrong_lowers(
    steps: list[tuple[Demand | None, float, float, int, int, int | None]], least: int, more: int
) -> None:
    policy = Policy(minimum=least, maximum=least + more, target=4, limit=8, down_window_seconds=5)
    state, now = State.initial(policy), START
    for demand, elapsed, age, ready, starting, quota in steps:
        before, now = now, now + elapsed
        seen = Observation(now - age, demand, instances(ready, starting, now), quota)
        decision = decide(state, seen, now)
        top = policy.maximum if quota is None or quota < 0 else min(quota, policy.maximum)
        # A quota that is no number of replicas lets nothing grow, not even to the minimum.
        least_now = min(policy.minimum, top, *([state.replicas] if (quota or 0) < 0 else []))
        assert least_now <= decision.replicas <= top
        broken = (
            demand is None
            or not 0 <= now - before <= 30
            or abs(now - seen.at) > 2.5
            or any(v is not None and not 0 <= v < math.inf for v in dataclasses.astuple(demand))
        )
        if state.at is not None and (broken or starting):
            assert decision.replicas >= min(state.replicas, top)
        if broken and state.at is not None:
            assert decision.because.note
        assert State.from_json(json.loads(json.dumps(decision.state.to_json())), policy) == decision.state
        state = decision.state


def test_schedules_and_quota() -> None:
    night = Schedule(frozenset(range(7)), 22 * 3600, 6 * 3600, 20)
    policy = dataclasses.replace(POLICY, schedules=(night,))
    midnight = START - START % 86400
    at = midnight + 3600
    decision = decide(State.initial(policy), Observation(at, Demand(0), ()), at)
    assert decision.replicas == 20
    short = decide(State.initial(policy), Observation(at, Demand(0), (), quota=7), at)
    assert short.replicas == 7
    assert [each.rule for each in short.because.clamps] == ["schedule", "quota"]
    noon = midnight + 12 * 3600
    assert decide(State.initial(policy), Observation(noon, Demand(0), ()), noon).replicas == 1


@given(st.lists(st.floats(0, 30), min_size=1, max_size=40), st.floats(1, 8), st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_more_of_the_same_demand_never_gives_fewer(rates: list[float], times: float, service: float) -> None:
    policy = dataclasses.replace(POLICY, maximum=100_000)
    less, more = State.initial(policy), State.initial(policy)
    ready = instances(200)
    for second, rate in enumerate(rates):
        now = START + second
        less = decide(less, Observation(now, flowing(rate, service), ready), now).state
        more = decide(more, Observation(now, flowing(times * rate, service), ready), now).state
        assert more.replicas >= less.replicas


@given(st.floats(0, 100), st.floats(0.05, 20), st.sampled_from([0.5, 1.0, 5.0]))
@settings(max_examples=8, deadline=None)
def test_constant_demand_gives_a_constant_size_at_any_cadence(
    rate: float, service: float, every: float
) -> None:
    policy = dataclasses.replace(POLICY, maximum=100_000, down_window_seconds=30)
    state, now, sizes = State.initial(policy), START, []
    for _ in range(round(120 / every)):
        now += every
        seen = Observation(now, flowing(rate, service), instances(state.replicas))
        state = decide(state, seen, now).state
        sizes.append(state.replicas)
    assert len(set(sizes[len(sizes) // 2 :])) == 1


def test_an_exponential_ramp_is_met_a_start_ahead() -> None:
    """10 to 10,000 a second in a minute, a start takes 5 s: from a thousand a second on, what is asked for is
    what will be needed when it is ready, but for a tenth; what is too much at the end is soon given back."""
    policy = dataclasses.replace(POLICY, maximum=10_000, target=16, down_window_seconds=30)

    def rate(second: int) -> float:
        return float(10 * 1_000 ** min(1.0, max(0, second - 60) / 60))

    sizes = [each.replicas for each in run(State.initial(policy), lambda at: flowing(rate(at)), 180)]
    assert all(16 * sizes[second] >= 0.9 * rate(second + 5) for second in range(100, 180))
    assert max(sizes) < 2.2 * 10_000 / 16
    assert sizes[-1] < 1.3 * 10_000 / 16


def test_a_replica_that_starts_keeps_the_size_until_patience_ends() -> None:
    policy = dataclasses.replace(POLICY, down_window_seconds=30, start_patience_seconds=300)
    state = run(State.initial(policy), lambda _: flowing(800), 60)[-1].state
    large, now, created = state.replicas, state.at or START, state.at or START
    kept: list[int] = []
    later: list[int] = []
    for second in range(600):
        now += 1
        stuck = Instance("stuck", ReplicaState.STARTING, created_at=created)
        seen = Observation(now, flowing(80), (*instances(state.replicas), stuck))
        state = decide(state, seen, now).state
        (kept if second < 299 else later).append(state.replicas)
    assert set(kept) == {large}
    assert later[-1] < large


def test_what_nobody_saw_empties_no_window() -> None:
    policy = dataclasses.replace(POLICY, down_window_seconds=60)
    state = run(State.initial(policy), lambda _: flowing(800), 100)[-1].state
    large = state.replicas
    blind = run(state, lambda _: None, 300)
    assert {each.replicas for each in blind} == {large}
    assert blind[-1].because.note == "no load report came in time"
    seeing = run(blind[-1].state, lambda _: flowing(80), 50)
    assert {each.replicas for each in seeing} == {large}
    assert run(seeing[-1].state, lambda _: flowing(80), 100)[-1].replicas < large


def test_a_restart_goes_on_with_the_same_decisions() -> None:
    half = run(State.initial(POLICY), lambda second: flowing(50 + second), 60)[-1].state
    again = State.from_json(json.loads(json.dumps(half.to_json())), POLICY)
    assert run(half, lambda _: flowing(300), 60) == run(again, lambda _: flowing(300), 60)


def test_a_learned_limit_moves_the_target_with_it_and_says_so() -> None:
    policy = dataclasses.replace(POLICY, maximum=2, learn_limit=True, limit_most=64)
    state, notes = State.initial(policy), set()
    for second in range(60):
        now = START + second
        full = [
            each._replace(in_flight=state.limit, queued=0.0, completed_per_second=state.limit)
            for each in instances(2)
        ]
        demand = Demand(in_flight=2 * state.limit, issued_per_second=2 * state.limit, service_seconds=1.0)
        decision = decide(state, Observation(now, demand, tuple(full)), now)
        state = decision.state
        notes.add(decision.because.note)
    assert decision.limit > 16
    assert decision.target == decision.limit / 2
    assert any(note.startswith("limit 16 -> 24: ") for note in notes)
