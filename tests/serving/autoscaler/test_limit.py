"""The learned limit: in a closed loop with the three shapes of an engine, and what it leaves out."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from serving.autoscaler import limit, profiles
from serving.autoscaler.observation import Instance
from serving.autoscaler.policy import Policy
from serving.autoscaler.profiles import Profile
from serving.replica import State

MOST = 400
REPLICAS = 3
NOW = 1_000.0


def instance(name: str, in_service: float, rate: float, **more: float) -> Instance:
    """A replica that has been warm for long, with some in its queue."""
    ready = Instance(
        name,
        State.READY,
        created_at=0.0,
        ready_at=10.0,
        in_flight=in_service + 3,
        queued=3.0,
        completed_per_second=rate,
    )
    return ready._replace(**more)  # type: ignore[arg-type]


def loop(profile: Profile, policy: Policy, seconds: int, seed: int, **usage: float) -> list[int]:
    """The limits of a second each, of replicas that have always more to do than they may. What is completed
    in a second is as much by chance as Poisson's."""
    chance = random.Random(seed)
    learned, now_limit, limits = limit.Learned(), policy.limit, []
    for second in range(seconds):
        mean = profile.rate(now_limit)
        seen = [
            instance(f"r{k}", now_limit, max(0.0, chance.gauss(mean, math.sqrt(mean))), **usage)
            for k in range(REPLICAS)
        ]
        learned = limit.noted(learned, now_limit, seen, 1.0, NOW + second)
        learned, now_limit, _ = limit.adjusted(learned, now_limit, policy)
        limits.append(now_limit)
    return limits


def goodput(profile: Profile, in_service: int, bound: float | None) -> float:
    """Completions a second; a latency over the bound by a tenth costs half of them."""
    over = profile.latency(in_service) / bound - 1 if bound is not None else 0.0
    return profile.rate(in_service) * max(0.0, 1 - 5 * max(0.0, over))


@pytest.mark.parametrize("start", [1, 4, 16, 64, MOST])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize(
    ("profile", "bound"),
    [
        (profiles.cpu_bound(cores=10, service_seconds=0.2), 1.0),
        (profiles.batch_friendly(step_seconds=0.02, request_seconds=0.0005, steps=50), 4.0),
        (profiles.memory_bound(fits=32, service_seconds=0.5, thrashing=3), 2.0),
    ],
    ids=lambda each: each.name if isinstance(each, Profile) else "",
)
def test_within_a_tenth_of_the_best_fixed_limit_in_five_minutes_from_any_start(
    profile: Profile, bound: float, bounded: bool, start: int
) -> None:
    latency = bound if bounded else None
    policy = Policy(target=1, limit=start, limit_most=MOST, learn_limit=True, latency_seconds=latency)
    best = max(goodput(profile, fixed, latency) for fixed in range(1, MOST + 1))
    limits = loop(profile, policy, 900, seed=7)
    settled = [goodput(profile, each, latency) for each in limits[300:]]
    assert sum(settled) / len(settled) >= 0.9 * best
    assert all(0.5 * before <= after <= 2 * before for before, after in itertools.pairwise(limits))


@pytest.mark.parametrize("start", [1, 4, 16, 64, MOST])
@pytest.mark.parametrize("usage", [{"gpu": 1.0}, {"cpu": 1.0}], ids=lambda each: next(iter(each)))
@pytest.mark.parametrize(
    "profile",
    [
        profiles.cpu_bound(cores=10, service_seconds=0.2),
        profiles.batch_friendly(step_seconds=0.02, request_seconds=0.0005, steps=50),
        profiles.memory_bound(fits=32, service_seconds=0.5, thrashing=3),
    ],
    ids=lambda each: each.name,
)
def test_what_always_calls_itself_busy_does_not_hide_what_a_batch_brings(
    profile: Profile, usage: dict[str, float], start: int
) -> None:
    policy = Policy(target=1, limit=start, limit_most=MOST, learn_limit=True)
    best = max(goodput(profile, fixed, None) for fixed in range(1, MOST + 1))
    limits = loop(profile, policy, 900, 7, **usage)
    settled = [goodput(profile, each, None) for each in limits[300:]]
    assert sum(settled) / len(settled) >= 0.9 * best


def fed(policy: Policy, seconds: int, seen: Instance) -> tuple[int, str]:
    learned, now_limit, why = limit.Learned(), policy.limit, ""
    for second in range(seconds):
        learned = limit.noted(learned, now_limit, [seen], 1.0, NOW + second)
        learned, now_limit, said = limit.adjusted(learned, now_limit, policy)
        why = why or said
    return now_limit, why


POLICY = Policy(target=8, limit=16, limit_most=64, learn_limit=True)


def test_a_limit_that_is_reached_and_pays_is_raised() -> None:
    now_limit, why = fed(POLICY, 31, instance("r", 16, 16))
    assert now_limit == 24
    assert why == "limit 16 -> 24: 16 a second and rising"


@pytest.mark.parametrize(
    "changes",
    [
        {"ready_at": NOW},  # cold
        {"in_flight": 5.0, "queued": 0.0},  # not pressed
        {"completed_per_second": None},
        {"completed_per_second": math.nan},
        {"in_flight": -4.0},
        {"in_flight": math.inf},
        {"in_flight": 40.0, "queued": 0.0},  # requests of before a cut
        {"state": State.STARTING},
    ],
)
def test_samples_that_say_nothing_change_nothing(changes: dict[str, float]) -> None:
    seen = instance("r", 16, 16)._replace(**changes)  # type: ignore[arg-type]
    assert fed(POLICY, 29, seen) == (16, "")


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"memory": 0.97}, 12),  # cut
        ({"memory": 0.92}, 9),  # not raised; with nothing known below, that is tried
        ({"cpu": 0.99}, 9),
        ({"gpu": 0.999}, 9),
        ({"gpu": 0.98}, 24),
        ({"memory": math.nan}, 24),
    ],
)
def test_utilisation_holds_and_cuts(usage: dict[str, float], expected: int) -> None:
    assert fed(POLICY, 31, instance("r", 16, 16, **usage))[0] == expected


def test_a_limit_that_is_lowered_says_what_was_in_use() -> None:
    assert fed(POLICY, 31, instance("r", 16, 16, gpu=1.0))[1] == (
        "limit 16 -> 9: gpu 100%; no more above; is it less below?"
    )


def test_a_latency_that_is_far_too_long_is_cut_before_the_cycle_ends() -> None:
    policy = dataclasses.replace(POLICY, latency_seconds=0.5)
    now_limit, why = fed(policy, 12, instance("r", 16, 16))
    assert now_limit == 8
    assert why == "limit 16 -> 8: 1 s in flight, 0.5 wanted"


def test_the_caps_hold() -> None:
    narrow = dataclasses.replace(POLICY, limit_least=15, limit_most=17)
    assert fed(narrow, 31, instance("r", 16, 16))[0] == 17
    late = dataclasses.replace(narrow, latency_seconds=0.1)
    assert fed(late, 31, instance("r", 16, 16))[0] == 15


def test_a_thousand_replicas_are_sampled() -> None:
    seen = [instance(f"r{k}", 16, 16) for k in range(1_000)]
    learned = limit.noted(limit.Learned(since_seconds=60), 16, seen, 1.0, NOW)
    assert learned.pressed.seconds == 50
