"""Demand and sizes are monotone in load, and a step is believed within seconds."""

from __future__ import annotations

import dataclasses
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.autoscaler import horizontal, windows
from serving.autoscaler.decide import State, decide
from serving.autoscaler.observation import Demand, Instance, Observation
from serving.autoscaler.policy import Policy
from serving.replica import State as ReplicaState

START = 1_700_000_000.0
NO_GROWTH = 1e9
"""Standard deviations that nothing exceeds."""
POLICY = Policy(
    maximum=100_000,
    target=8,
    limit=16,
    predict=False,
    evidence=NO_GROWTH,
    down_window_seconds=20,
    start_seconds=5,
)
CAPACITY = horizontal.Capacity(100_000, 8, 16)
READY = tuple(
    Instance(f"r{number}", ReplicaState.READY, created_at=START - 1_000, ready_at=START - 995)
    for number in range(40)
)


@st.composite
def two_loads(draw: st.DrawFn) -> list[tuple[float, float]]:
    """The rates of each second, the second load's at none below the first's: a level for long, a few others,
    and more in a few of the latest seconds."""
    rates = [draw(st.floats(0, 50))] * draw(st.integers(1, 90))
    for _ in range(draw(st.integers(1, 3))):
        rates += [draw(st.floats(0, 500))] * draw(st.integers(1, 25))
    both = [(rate, rate) for rate in rates]
    for back, more in draw(
        st.lists(st.tuples(st.integers(1, 30), st.floats(1, 2_000)), min_size=1, max_size=3)
    ):
        place = max(0, len(rates) - back)
        both[place] = rates[place], rates[place] + more
    return both


def load(rates: list[float], service: float, every: float, level_seconds: float) -> horizontal.Load:
    history: windows.History = ()
    for rate in rates:
        bucket = windows.Bucket(every, rate * every, rate * service, 0.0, 0.0)
        history = windows.appended(history, bucket, level_seconds)
    return horizontal.Load(history, service)


@given(two_loads(), st.floats(0.05, 20), st.floats(0.3, 8), st.sampled_from([5.0, 30.0, 300.0]))
@settings(max_examples=150, deadline=None)
def test_more_demand_at_any_past_second_is_never_less_demand(
    rates: list[tuple[float, float]], service: float, every: float, level_seconds: float
) -> None:
    policy = dataclasses.replace(POLICY, level_seconds=level_seconds)
    less, more = (
        horizontal.need(load([*each], service, every, level_seconds), Demand(0), CAPACITY, policy, 5.0)
        for each in zip(*rates, strict=True)
    )
    assert less.level <= more.level * (1 + 1e-9)
    assert less.steady <= more.steady * (1 + 1e-9)
    assert less.ahead <= more.ahead * (1 + 1e-9)


@given(two_loads(), st.floats(0.05, 10), st.sampled_from([0.5, 1.0, 4.0]))
@settings(max_examples=40, deadline=None)
def test_more_demand_at_any_past_second_never_gives_fewer_replicas(
    rates: list[tuple[float, float]], service: float, every: float
) -> None:
    """With the same time in service, which is why something is always refused: while it is, no other time is
    learned. And without growth: who has had as much all along does not grow."""
    first = dataclasses.replace(State.initial(POLICY), load=horizontal.Load(service_seconds=service))
    states = [first, first]
    for number, both in enumerate(rates):
        now = START + number * every
        for which, rate in enumerate(both):
            demand = Demand(
                rate * service, issued_per_second=rate, rejected_per_second=1e-6, service_seconds=service
            )
            states[which] = decide(states[which], Observation(now, demand, READY), now).state
        assert states[0].replicas <= states[1].replicas


def poisson(rate: float, seconds: int, chance: random.Random) -> list[float]:
    counts = []
    for _ in range(seconds):
        count, at = 0, chance.expovariate(rate)
        while at < 1:
            count, at = count + 1, at + chance.expovariate(rate)
        counts.append(float(count))
    return counts


@pytest.mark.parametrize(("before", "after"), [(10, 20), (2, 40), (200, 400)])
def test_a_step_is_believed_within_five_seconds(before: int, after: int) -> None:
    """Nearly half of it or more, in the mean of forty draws: the least of five counts is below their mean."""
    chance, policy = random.Random(1), dataclasses.replace(POLICY, evidence=5.0)
    levels = []
    for _ in range(40):
        counts = [*poisson(before, 120, chance), *poisson(after, 5, chance)]
        need = horizontal.need(load(counts, 0.25, 1.0, 30.0), Demand(0), CAPACITY, policy, 3.0)
        levels.append(need.level / 0.25)
    assert statistics.mean(levels) >= before + 0.45 * (after - before)


def test_a_burst_that_is_over_within_five_seconds_is_only_in_the_mean() -> None:
    counts = [10.0] * 120 + [100.0] * 4
    need = horizontal.need(load(counts, 0.5, 1.0, 30.0), Demand(0), CAPACITY, POLICY, 3.0)
    assert need.level == pytest.approx(0.5 * (27 * 10 + 3 * 100 + 100 - 30) / 30, rel=0.1)
    assert need.window_seconds >= 27


def test_a_crowd_that_chance_cannot_make_is_believed_at_once() -> None:
    counts = [10.0] * 120 + [10_000.0]
    need = horizontal.need(load(counts, 0.5, 1.0, 30.0), Demand(0), CAPACITY, POLICY, 3.0)
    assert need.level > 0.75 * 5_000
    assert need.window_seconds == 1


def test_a_level_of_minutes_answers_slowly() -> None:
    policy = dataclasses.replace(POLICY, level_seconds=300, lasting_seconds=300)
    counts = [100.0] * 600 + [120.0] * 30
    need = horizontal.need(load(counts, 1.0, 1.0, 300.0), Demand(0), CAPACITY, policy, 3.0)
    assert need.level == pytest.approx(102, abs=0.5)
    assert need.window_seconds >= 270
