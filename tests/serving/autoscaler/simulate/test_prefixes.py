"""The simulation of replicas that remember prompts, against what must come out of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.autoscaler.simulate import prefixes
from serving.autoscaler.simulate.prefixes import Fleet, Request, Rule, Way
from serving.autoscaler.units import Coefficients

COST = Coefficients(request=0.0, input=0.001, output=0.0, cached=0.0)


def poisson(count: int, per_second: float, sessions: int, seed: int = 3) -> list[Request]:
    chance, at, found = random.Random(seed), 0.0, []
    for _ in range(count):
        at += chance.expovariate(per_second)
        session = chance.randrange(sessions)
        blocks = tuple(1_000 * session + number for number in range(4))
        found.append(Request(at, session, 400, 0, blocks))
    return found


@pytest.mark.parametrize("way", list(Way))
@given(seed=st.integers(0, 9), by_units=st.booleans())
def test_every_request_ends_and_no_work_is_lost(way: Way, seed: int, by_units: bool) -> None:
    requests = poisson(60, 20.0, 5, seed)
    fleet = Fleet(3, COST, limit=4, cache_blocks=0, block_tokens=100)
    found = prefixes.run(requests, fleet, Rule(way, by_units), seed)
    assert found.work_seconds == pytest.approx(60 * 0.4)
    assert found.cached_part == 0
    assert min(found.slowdowns()) >= 1 - 1e-9
    assert found.span_seconds >= max(each.at_seconds for each in requests)


def test_one_replica_with_one_place_is_a_queue() -> None:
    requests = [Request(0.0, 0, 1_000, 0), Request(0.5, 0, 500, 0), Request(5.0, 0, 100, 0)]
    found = prefixes.run(requests, Fleet(1, COST, limit=1), Rule(Way.P2C), 1)
    assert found.latency_seconds == pytest.approx((1.0, 1.0, 0.1))


def test_capacity_is_shared_evenly() -> None:
    requests = [Request(0.0, 0, 1_000, 0), Request(0.5, 0, 250, 0)]
    found = prefixes.run(requests, Fleet(1, COST), Rule(Way.P2C), 1)
    # Half a second alone; half a second at half the rate, then the other is done; a quarter second alone.
    assert found.latency_seconds == pytest.approx((1.25, 0.5))


def test_what_is_cached_is_what_a_prompt_begins_with() -> None:
    first = Request(0.0, 0, 400, 0, (1, 2, 3, 4))
    other = Request(10.0, 0, 400, 0, (1, 2, 9, 4))
    found = prefixes.run([first, other], Fleet(1, COST, block_tokens=100), Rule(Way.P2C), 1)
    assert found.cached_part == pytest.approx(200 / 800)
    assert found.work_seconds == pytest.approx(0.6)


def test_sticky_sessions_save_work_and_are_bounded() -> None:
    requests = poisson(3_000, 15.0, 100)
    fleet = Fleet(8, COST, cache_blocks=60, block_tokens=100)
    free = prefixes.run(requests, fleet, Rule(Way.P2C), 1)
    sticky = prefixes.run(requests, fleet, Rule(Way.STICKY, balance=1.5), 1)
    assert sticky.cached_part > 2 * free.cached_part
    assert sticky.work_seconds < free.work_seconds
    one = [Request(each.at_seconds, 7, 400, 0) for each in requests]  # all of one session
    bounded = prefixes.run(one, fleet, Rule(Way.STICKY, balance=1.25), 1)
    assert bounded.slowdowns()[-1] < 50  # one replica alone would never have caught up


def test_the_same_seed_gives_the_same() -> None:
    requests, fleet = poisson(200, 15.0, 10), Fleet(4, COST)
    assert prefixes.run(requests, fleet, Rule(Way.P2C), 5) == prefixes.run(requests, fleet, Rule(Way.P2C), 5)
