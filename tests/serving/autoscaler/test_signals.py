"""What is concluded from reports: sums, rates, and what stays unknown."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.autoscaler.observation import Demand, Observation
from serving.autoscaler.signals import Signals
from serving.replica import Replica, State, Vitals
from serving.router.reports import Pressure, Total
from serving.service import Load

ACTIVATOR = ("127.0.0.1", 9)


def _replica(number: int, vitals: Vitals | None = None, state: State = State.READY) -> Replica:
    return Replica(f"r{number}", "v", ("127.0.0.1", number), state, 0.0, 1.0, vitals=vitals)


def _load(port: int, in_flight: float) -> Load:
    return Load("s", "127.0.0.1", port, in_flight, 0, 0, 1.0)  # type: ignore[arg-type]


def _demand(found: Observation) -> Demand:
    assert found.demand is not None
    return found.demand


def test_what_is_in_flight_and_held() -> None:
    pressure = Pressure((_load(1, 3), _load(2, 4), _load(9, 5), _load(7, 1)), {})
    found = Signals().observe(pressure, ACTIVATOR, [_replica(1), _replica(2), _replica(3)], "v", 10.0)
    demand = _demand(found)
    assert (demand.in_flight, demand.held) == (8, 5)  # one of them at a replica that has left
    assert [each.in_flight for each in found.instances] == [3, 4, 0]


def test_load_in_units_is_requests_of_the_reference_cost() -> None:
    signals = Signals()
    pressure = Pressure((_load(1, 6), _load(9, 2)), {"e": Total(seconds=1.0, issued=30, dropped=3)})

    def look(now: float, *replicas: Replica) -> Observation:
        return signals.observe(pressure, ACTIVATOR, replicas, "v", now, reference_units=0.5)

    assert _demand(look(0.0, _replica(1))).in_flight == 6  # what they cost is not known
    dear = Vitals(1.0, 3, 1, 0, 0, 0.0, units_in_flight=8.0)  # four, each of four times the reference
    found = look(1.0, _replica(1, dear))
    demand = _demand(found)
    assert (demand.in_flight, demand.held, demand.queued) == (24, 8, 4)
    assert (demand.issued_per_second, demand.rejected_per_second) == (120, 12)
    assert found.instances[0].in_flight == 24
    idle = Vitals(2.0, 0, 0, 4, 0, 1.0)
    assert _demand(look(2.0, _replica(1, idle))).in_flight == pytest.approx(24)  # as they were lately


def test_who_is_absent_from_reports_that_came_has_a_demand_of_zeros() -> None:
    found = Signals().observe(Pressure((), {}), ACTIVATOR, [], "v", 10.0)
    assert found.demand == Demand(in_flight=0.0)


def test_reports_that_are_missing_are_no_demand_at_all() -> None:
    pressure = Pressure((_load(1, 3),), {}, unknown="x has not reported for 3.6 s")
    vitals = Vitals(9.0, 6, 2, 0, 0, 0.0)
    found = Signals().observe(pressure, ACTIVATOR, [_replica(1, vitals)], "v", 10.0)
    assert found.demand is None
    assert found.instances[0].in_flight == 8  # the engine itself says so


def test_rates_of_several_envoys_whatever_the_look_catches() -> None:
    signals = Signals()

    def look(now: float, **totals: Total) -> Demand:
        return _demand(signals.observe(Pressure((), totals), None, [], "v", now))

    look(0.0, x=Total(10, 0, 1.0), y=Total(5, 0, 1.0))
    two_of_x = look(1.0, x=Total(10 + 40, 8, 3.0), y=Total(5, 0, 1.0))
    assert two_of_x.issued_per_second == pytest.approx(20 + 5)  # y sent nothing new and goes on
    assert two_of_x.rejected_per_second == pytest.approx(4)
    anew = look(2.0, x=Total(7, 0, 1.0))
    assert anew.issued_per_second == pytest.approx(7)  # y is gone, x began anew


def test_engines_say_how_long_requests_take_without_waiting_and_what_they_refused() -> None:
    signals = Signals()
    first, second = (
        Vitals(0.0, 0, 0, 10, 0, 5.0, 2.0, 1.0, 0.5),
        Vitals(2.0, 4, 3, 30, 6, 15.0, 2.0, 3.0, 0.5, 0.97),
    )
    signals.observe(Pressure((), {}), None, [_replica(1, first)], "v", 0.0)
    found = signals.observe(Pressure((_load(1, 7),), {}), None, [_replica(1, second)], "v", 2.0)
    demand, (instance,) = _demand(found), found.instances
    assert demand.service_seconds == pytest.approx(0.5)
    assert (demand.rejected_per_second, demand.queued) == (3.0, 3.0)
    assert (instance.completed_per_second, instance.latency_seconds) == (10.0, 0.5)
    assert (instance.cpu, instance.gpu, instance.memory, instance.queued) == (0.5, 0.97, 0.5, 3.0)
    again = signals.observe(Pressure((_load(1, 2),), {}), None, [_replica(1, second)], "v", 2.5)
    assert _demand(again).queued == 2  # it cannot be more than is in flight
    assert again.instances == (instance._replace(in_flight=2.0),)  # not asked since: as it was


def test_what_engines_refused_was_not_issued_too() -> None:
    signals = Signals()
    first, second = Vitals(0.0, 4, 0, 0, 0, 0.0), Vitals(1.0, 4, 0, 20, 30, 5.0)
    signals.observe(Pressure((), {"x": Total(0, 0, 1.0)}), None, [_replica(1, first)], "v", 0.0)
    totals = {"x": Total(50, 5, 2.0)}
    demand = _demand(signals.observe(Pressure((), totals), None, [_replica(1, second)], "v", 1.0))
    assert (demand.issued_per_second, demand.rejected_per_second) == (20, 30 + 5)


def test_an_engine_that_is_not_asked_any_more_refuses_no_more() -> None:
    signals = Signals()
    for at in (0.0, 1.0):
        replica = _replica(1, Vitals(at, 4, 2, 20, int(30 * at), 5.0))
        demand = _demand(signals.observe(Pressure((_load(1, 6),), {}), None, [replica], "v", at))
    assert (demand.rejected_per_second, demand.queued) == (30, 2)
    leaving = dataclasses.replace(replica, state=State.DRAINING)
    demand = _demand(signals.observe(Pressure((_load(1, 6),), {}), None, [leaving], "v", 20.0))
    assert (demand.rejected_per_second, demand.queued) == (0, 0)


def test_without_engines_the_time_is_littles_law() -> None:
    signals = Signals()
    for second in range(20):
        totals = {"x": Total(40 * second, 0, float(second))}
        found = signals.observe(Pressure((_load(1, 10),), totals), None, [_replica(1)], "v", float(second))
    assert _demand(found).service_seconds == pytest.approx(0.25)


def test_an_engine_that_began_anew_gives_no_negative_rates() -> None:
    signals = Signals()
    signals.observe(Pressure((), {}), None, [_replica(1, Vitals(0.0, 0, 0, 99, 9, 50.0, 2.0, 9.0))], "v", 0.0)
    found = signals.observe(
        Pressure((), {}), None, [_replica(1, Vitals(1.0, 0, 0, 1, 0, 0.5, 2.0, 0.1))], "v", 1.0
    )
    (instance,) = found.instances
    assert (instance.completed_per_second, instance.latency_seconds, instance.cpu) == (None, None, None)
    assert _demand(found).service_seconds is None


def test_only_the_version_that_is_scaled_has_instances() -> None:
    other = dataclasses.replace(_replica(2), version="w")
    found = Signals().observe(Pressure((_load(2, 5),), {}), None, [_replica(1), other], "v", 0.0, quota=3)
    assert [each.name for each in found.instances] == ["r1"]
    assert (_demand(found).in_flight, found.quota) == (5, 3)


_NUMBER = st.floats() | st.integers(-5, 10**6)
_TOTAL = st.builds(Total, st.integers(-5, 10**9), st.integers(-5, 10**9), st.floats(0, 1e6))
_VITALS = st.builds(
    Vitals,
    st.floats(0, 1e6),
    *(st.integers(0, 10**6) for _ in range(4)),
    st.floats(0, 1e6),
    st.none() | st.floats(0.1, 100),
    st.none() | st.floats(0, 1e6),
    st.none() | st.floats(0, 1),
)


@given(
    st.lists(
        st.tuples(
            st.lists(st.builds(_load, st.integers(1, 9), _NUMBER), max_size=4),
            st.dictionaries(st.sampled_from("xy"), _TOTAL),
            st.lists(st.builds(_replica, st.integers(1, 9), st.none() | _VITALS), max_size=3),
            st.floats(0, 1e6),
        ),
        max_size=6,
    )
)
def test_nothing_that_is_not_a_number_comes_out(
    looks: list[tuple[list[Load], dict[str, Total], list[Replica], float]],
) -> None:
    signals = Signals()
    for loads, totals, replicas, now in looks:
        demand = _demand(signals.observe(Pressure(tuple(loads), totals), ACTIVATOR, replicas, "v", now))
        for value in dataclasses.astuple(demand):
            assert value is None or (math.isfinite(value) and value >= 0)
