"""The forecast by the time of day: what it learns, what it is good for, and that it rests when it is not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

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


class Fluid:
    """An endpoint as far as a forecast is concerned: a start takes `START`; 8 are in flight, and for an hour
    of each day 400. What does not fit is late for as long."""

    def __init__(self, policy: Policy) -> None:
        self.state, self.policy = State.initial(policy), policy
        self.ready_at = [MIDNIGHT]
        self.late_seconds = self.replica_seconds = 0.0

    def day(self, number: int, hour: int) -> None:
        """A day whose crowd comes at `hour`."""
        for step in range(round(DAY / EVERY)):
            now = MIDNIGHT + number * DAY + step * EVERY
            level = 400.0 if hour <= step * EVERY / 3600 < hour + 1 else 8.0
            ready = sum(at <= now for at in self.ready_at)
            queued = max(0.0, level - ready * self.policy.limit)
            self.late_seconds += EVERY * (queued > 0)
            self.replica_seconds += EVERY * len(self.ready_at)
            instances = tuple(
                Instance(str(at), ReplicaState.READY, at - START, at)
                if at <= now
                else Instance(str(at), ReplicaState.STARTING, at - START)
                for at in self.ready_at
            )
            demand = Demand(level, queued=queued, issued_per_second=level, service_seconds=1.0)
            made = decide(self.state, Observation(now, demand, instances), now)
            self.state = made.state
            self.ready_at += [now + START] * (made.replicas - len(self.ready_at))
            del self.ready_at[made.replicas :]


def after(policy: Policy, hours: Sequence[int]) -> tuple[list[float], list[float], list[bool]]:
    """Days with these hours: late seconds and replica-hours of each, and whether the forecast was trusted at
    its end."""
    endpoint, late, cost, trusted = Fluid(policy), [], [], []
    for number, hour in enumerate(hours):
        before = endpoint.late_seconds, endpoint.replica_seconds
        endpoint.day(number, hour)
        late.append(endpoint.late_seconds - before[0])
        cost.append((endpoint.replica_seconds - before[1]) / 3600)
        trusted.append(endpoint.state.season.trusted)
    return late, cost, trusted


REACTIVE = dataclasses.replace(POLICY, predict=False)


def test_a_crowd_at_the_same_hour_is_met_from_the_second_day_on_for_hardly_more() -> None:
    late, cost, trusted = after(POLICY, (9, 9, 9, 9))
    without_late, without_cost, _ = after(REACTIVE, (9, 9, 9, 9))
    assert min(without_late) >= START
    assert late == [without_late[0], 0.0, 0.0, 0.0]
    assert sum(without_cost) < sum(cost) < 1.02 * sum(without_cost)
    assert all(trusted)


def test_a_crowd_at_another_hour_each_day_ends_the_trust_and_then_costs_nothing() -> None:
    late, cost, trusted = after(POLICY, (9, 15, 4, 20))
    without_late, without_cost, _ = after(REACTIVE, (9, 15, 4, 20))
    assert late == without_late
    assert cost[1] > 1.3 * without_cost[1]  # the second day was to be like the first
    assert trusted == [True, True, False, False]
    assert cost[2:] == without_cost[2:]


def account(extra: float, saved: float) -> forecast.Season:
    """A day: `extra` replicas beyond need for an hour, then 5 for as long, of which `saved` were needed."""
    season = forecast.Season()
    hour = (3600.0, 100.0)
    season = forecast.scored(season, 1.0, 1, 1 + extra, *hour)
    season = forecast.scored(season, 1.0 + saved, 1, 6.0, *hour)
    return forecast.scored(season, 1.0, 6, 0.0, DAY, 100.0)


def test_what_it_saves_by_chance_does_not_keep_the_trust() -> None:
    assert account(1, 5.0).trusted
    assert account(45, 5.0).trusted  # ten idle replica-seconds for one that was needed
    assert not account(46, 5.0).trusted
    assert not account(50, 0.1).trusted
    assert not account(1, 0.0).trusted
