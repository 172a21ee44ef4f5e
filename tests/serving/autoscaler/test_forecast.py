"""The forecast by the time of day: what it learns, what it is good for, and that it rests when it is not."""

from __future__ import annotations

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from serving.autoscaler import forecast
from serving.autoscaler.decide import Decision, State, decide
from serving.autoscaler.observation import Demand, Instance, Observation
from serving.autoscaler.policy import Policy
from serving.replica import State as ReplicaState

DAY = 86_400.0
MIDNIGHT = 20_000 * DAY
EVERY = 30.0
START = 120.0
POLICY = Policy(minimum=1, maximum=100, target=8, limit=16, start_seconds=START)


def day(state: State, number: int, morning: float) -> tuple[State, dict[float, Decision]]:
    """A day of decisions, a few a minute: 8 in flight, and from 8 to 18 o'clock `morning`. By the second."""
    decisions = {}
    ready = (Instance("r", ReplicaState.READY, created_at=0.0, ready_at=START),)
    for step in range(round(DAY / EVERY)):
        second = step * EVERY
        in_flight = morning if 8 * 3600 <= second < 18 * 3600 else 8.0
        now = MIDNIGHT + number * DAY + second
        demand = Demand(in_flight=in_flight, issued_per_second=in_flight, service_seconds=1.0)
        found = decide(state, Observation(now, demand, ready * state.replicas), now)
        decisions[second], state = found, found.state
    return state, decisions


def test_ahead_of_the_morning_from_the_second_day_on_and_at_rest_when_the_mornings_end() -> None:
    state, first = day(State.initial(POLICY), 0, 400.0)
    before = 8 * 3600 - EVERY
    assert first[before].replicas <= 2
    state, second = day(state, 1, 400.0)
    assert second[before].replicas >= 50
    assert [each.rule for each in second[before].because.clamps][-1] == "expected at this time of day"
    assert second[7 * 3600].replicas <= 2
    state, _ = day(state, 2, 400.0)
    assert state.season.trusted
    # Nobody comes any more: a day in vain, then rest, said in words.
    state, _ = day(state, 3, 8.0)
    state, _ = day(state, 4, 8.0)
    assert not state.season.trusted
    state, idle = day(state, 5, 8.0)
    assert idle[9 * 3600].replicas <= 2
    assert "the forecast rests" in idle[9 * 3600].because.note
    # They come again: what it would have saved brings the trust back.
    state, _ = day(state, 6, 400.0)
    state, _ = day(state, 7, 400.0)
    state, back = day(state, 8, 400.0)
    assert back[before].replicas >= 30
    assert State.from_json(json.loads(json.dumps(state.to_json())), POLICY) == state


@given(st.floats(0, 1e6), st.floats(0, 2 * DAY), st.floats(-1e9, 1e10))
def test_it_never_lowers(level: float, ahead: float, now: float) -> None:
    season = dataclasses.replace(forecast.Season(), levels=(level,) * 288)
    assert forecast.expected(season, now, ahead) == level
    assert forecast.expected(forecast.Season(), now, ahead) is None


def test_a_bin_that_was_hardly_watched_learns_nothing() -> None:
    season = forecast.learned(forecast.Season(), 50.0, 100.0, MIDNIGHT)
    season = forecast.learned(season, 50.0, 1.0, MIDNIGHT + 300)
    assert forecast.expected(season, MIDNIGHT + DAY, 0) is None
