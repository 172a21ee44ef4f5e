"""The other systems' policies do what their documentation says of them."""

from __future__ import annotations

import itertools

import pytest

from serving.autoscaler.observation import Demand, Instance, Observation
from serving.autoscaler.simulate import hpa, knative, policies
from serving.autoscaler.simulate.policies import Policy
from serving.replica import State

TARGET = 10.0


def seen(
    now: float, in_flight: float | None, ready: int, starting: int = 0, queued: float = 0.0
) -> Observation:
    each = (in_flight or 0.0) / max(1, ready)
    there = [Instance(f"r{n}", State.READY, 0.0, 1.0, each) for n in range(ready)]
    there += [Instance(f"s{n}", State.STARTING, now) for n in range(starting)]
    demand = None if in_flight is None else Demand(in_flight, queued=queued, service_seconds=1.0)
    return Observation(now, demand, tuple(there))


def asked(policy: Policy, load: list[float | None], ready: int, began: int = 0) -> list[int]:
    """The sizes that it wants, one for each of its turns, all replicas ready at once."""
    sizes = []
    for second, in_flight in enumerate(load, began + 1):
        if second % policy.every_seconds == 0:
            ready = policy.decide(seen(float(second), in_flight, ready), float(second)).replicas
            sizes.append(ready)
    return sizes


def test_hpa_goes_by_the_ratio_and_leaves_a_tenth_alone() -> None:
    for in_flight, wanted in ((100.0, 10), (109.0, 10), (111.0, 12), (150.0, 15), (95.0, 10)):
        policy = hpa.HorizontalPodAutoscaler(TARGET)
        assert policy.decide(seen(15.0, in_flight, 10), 15.0).replicas == wanted


def test_hpa_at_most_doubles_or_adds_four_in_fifteen_seconds() -> None:
    assert asked(hpa.HorizontalPodAutoscaler(TARGET), [10_000.0] * 60, 1) == [5, 10, 20, 40]


def test_hpa_goes_down_to_the_largest_recommendation_of_five_minutes() -> None:
    policy = hpa.HorizontalPodAutoscaler(TARGET)
    asked(policy, [200.0] * 15, 20)
    assert set(asked(policy, [50.0] * 285, 20, began=15)) == {20}
    assert asked(policy, [50.0] * 30, 20, began=300)[-1] == 5


def test_hpa_counts_pods_that_are_not_ready_as_idle_when_it_goes_up() -> None:
    policy = hpa.HorizontalPodAutoscaler(TARGET)
    # 10 ready pods at twice their target, 10 that start: enough.
    assert policy.decide(seen(15.0, 200.0, 10, starting=10), 15.0).replicas == 20
    assert policy.decide(seen(30.0, 300.0, 10, starting=10), 30.0).replicas == 30


def test_hpa_does_nothing_without_a_metric() -> None:
    policy = hpa.HorizontalPodAutoscaler(TARGET)
    assert policy.decide(seen(15.0, None, 7), 15.0).replicas == 7


def test_knative_follows_the_stable_window_and_panics_at_twice_what_is_ready() -> None:
    calm = knative.KnativePodAutoscaler(TARGET, utilization=0.7)
    sizes = asked(calm, [70.0] * 60 + [100.0] * 60, 10)
    assert sizes[59] == 10
    assert sizes[71] == 11  # a fifth of the window is at 100
    assert sizes[-1] == 15
    panicking = knative.KnativePodAutoscaler(TARGET, utilization=0.7)
    sizes = asked(panicking, [70.0] * 60 + [700.0] * 20 + [70.0] * 40, 10)
    assert sizes[61] == 40  # two of six seconds are at 700
    assert set(sizes[65:]) == {100}  # never down while it panics
    assert asked(panicking, [70.0] * 60, 100, began=120)[-1] < 100


def test_knative_halves_at_most_and_keeps_one_until_the_grace_is_over() -> None:
    policy = knative.KnativePodAutoscaler(TARGET, minimum=0)
    sizes = asked(policy, [70.0] * 10 + [0.0] * 120, 16)
    assert all(later >= earlier // 2 for earlier, later in itertools.pairwise(sizes) if earlier > 1)
    idle = asked(knative.KnativePodAutoscaler(TARGET, minimum=0), [0.0] * 60, 1)
    assert idle[27] == 1
    assert idle[-1] == 0


def test_the_published_formula_goes_up_by_twenty_seconds_and_down_by_five_minutes() -> None:
    policy = policies.Published(TARGET)
    assert set(asked(policy, [100.0] * 300, 10)[5:]) == {10}
    up = asked(policy, [200.0] * 20, 10, began=300)
    assert up[4] == 13
    assert up[-1] == 20
    down = asked(policy, [100.0] * 300, 20, began=320)
    assert down[24] > 10
    assert down[-1] == 10


def test_the_published_target_is_cut_when_requests_wait_and_raised_slowly() -> None:
    policy = policies.Published(TARGET, least=0.5)
    for second in range(1, 301):
        policy.decide(seen(float(second), 100.0, 10, queued=50.0), float(second))
    assert policy.decide(seen(301.0, 100.0, 10, queued=50.0), 301.0).replicas == 20  # at the lower cap
    for second in range(302, 1_200):
        found = policy.decide(seen(float(second), 100.0, 10), float(second))
    assert found.replicas == 10


def test_the_clairvoyant_has_what_a_start_from_now_needs_and_no_more() -> None:
    known = [10.0] * 50 + [100.0] * 10 + [10.0] * 40
    policy = policies.Clairvoyant(known, TARGET, ahead_seconds=5)
    sizes = [policy.decide(seen(float(second), None, 1), float(second)).replicas for second in range(100)]
    assert sizes[44] == 1
    assert sizes[45:60] == [10] * 15
    assert sizes[60:] == [1] * 40


@pytest.mark.parametrize("parts", [(1, 1), (3, 2)])
def test_a_static_peak_is_what_it_is(parts: tuple[int, int]) -> None:
    assert policies.Constant(parts[0]).decide(seen(1.0, 1e6, parts[1]), 1.0).replicas == parts[0]
