"""The simulated endpoint against closed forms of queueing theory, and what holds whatever happens to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.autoscaler.simulate import fleet as fleets
from serving.autoscaler.simulate import kernel, routing
from serving.autoscaler.simulate.fleet import Floats, Rules
from tests.serving.autoscaler.simulate import endpoints

SIZE = 400_000


def lognormal(size: int, seed: int, mean: float = 1.0, cv: float = 1.0) -> Floats:
    variance = math.log1p(cv**2)
    random = np.random.default_rng([seed, 2])
    return np.exp(math.log(mean) - variance / 2 + math.sqrt(variance) * random.standard_normal(size))


def exponential(size: int, seed: int, mean: float = 1.0) -> Floats:
    return np.random.default_rng([seed, 2]).exponential(mean, size)


def erlang_b(load: float, servers: int) -> float:
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = load * blocked / (n + load * blocked)
    return blocked


def erlang_c(load: float, servers: int) -> float:
    blocked = erlang_b(load, servers)
    return servers * blocked / (servers - load * (1 - blocked))


@pytest.mark.parametrize("work", [exponential, lognormal])
def test_without_a_queue_erlang_b_says_what_is_rejected_whatever_the_work_is_like(work: object) -> None:
    assert callable(work)
    fleet = endpoints.fixed(1, Rules(limit=10, queue_limit=0))
    endpoints.drive(fleet, endpoints.poisson(8.0, SIZE, 1), work(SIZE, 1))
    assert endpoints.total(fleet, "rejected") / SIZE == pytest.approx(erlang_b(8.0, 10), rel=0.03)


def test_with_a_queue_erlang_c_says_who_waits_and_for_how_long() -> None:
    fleet = endpoints.fixed(1, Rules(limit=10, queue_limit=10_000))
    endpoints.drive(fleet, endpoints.poisson(8.0, SIZE, 1), exponential(SIZE, 1))
    waits = erlang_c(8.0, 10)
    assert endpoints.total(fleet, "waited") / SIZE == pytest.approx(waits, rel=0.03)
    assert endpoints.total(fleet, "wait_seconds") / SIZE == pytest.approx(waits / (10 - 8), rel=0.08)


def test_one_shared_server_is_as_slow_as_processor_sharing_says_whatever_the_work_is_like() -> None:
    shared = np.array([0.0, *(1 / n for n in range(1, 2_001))])
    for work in (exponential, lognormal):
        fleet = endpoints.fixed(1, Rules(limit=2_000, queue_limit=0), shared)
        endpoints.drive(fleet, endpoints.poisson(0.7, SIZE, 2), work(SIZE, 2))
        mean = float(fleet.rows["done_seconds"][0]) / SIZE
        assert mean == pytest.approx(1 / (1 - 0.7), rel=0.05)


def test_the_best_of_two_has_the_tail_that_the_mean_field_has() -> None:
    """Of the supermarket model: the part of servers with k requests or more is load ** (2 ** k - 1)."""
    servers, load = 1_000, 0.9
    fleet = endpoints.fixed(servers, Rules(limit=1, queue_limit=50, routing=routing.P2C))
    at = endpoints.poisson(servers * load, 600_000, 3)
    work, keys = exponential(at.size, 3), np.zeros(at.size, np.int64)
    index, seen = 0, []
    for second in range(100, int(at[-1]), 5):
        index = kernel.advance(fleet, at, work, keys, index, float(second))
        seen.append(fleet.rows["serving"] + fleet.rows["waiting"])
    held = np.concatenate(seen)
    for k in (1, 2, 3, 4):
        assert np.mean(held >= k) == pytest.approx(load ** (2**k - 1), rel=0.06), k


def test_random_routing_has_a_longer_tail_than_two_choices_and_two_than_a_full_scan() -> None:
    waits = {}
    for name in ("random", "p2c", "least"):
        fleet = endpoints.fixed(20, Rules(limit=4, queue_limit=500, routing=routing.NAMES[name]))
        endpoints.drive(fleet, endpoints.poisson(68.0, 100_000, 4), exponential(100_000, 4))
        waits[name] = endpoints.total(fleet, "wait_seconds")
    assert waits["random"] > 2 * waits["p2c"] > 2 * waits["least"]


def test_maglev_sends_a_session_to_one_replica_until_that_has_more_than_its_share() -> None:
    rules = Rules(limit=100, queue_limit=0, routing=routing.MAGLEV, balance=1.25)
    few = endpoints.fixed(8, rules)
    for index in range(5):  # each alone
        at = np.array([10.0 * (index + 1)])
        kernel.advance(few, at, np.ones(1), np.array([77]), 0, 10.0 * (index + 2))
    assert np.count_nonzero(few.rows["done"]) == 1

    crowd = endpoints.fixed(8, rules)
    at = np.linspace(1.0, 1.5, 200)
    kernel.advance(crowd, at, np.ones(200), np.full(200, 77), 0, 1.6)
    held = crowd.rows["serving"]
    assert held.sum() == 200
    assert held.max() <= math.ceil(1.25 * 200 / 8)


def test_maglev_moves_few_sessions_when_a_replica_goes() -> None:
    rules = Rules(limit=10_000, queue_limit=0, routing=routing.MAGLEV, balance=1e9)
    fleet = endpoints.fixed(10, rules)
    keys = np.arange(2_000)

    def homes(at: float) -> list[int]:
        found = []
        for key in keys:
            before = fleet.rows["serving"].copy()
            kernel.advance(
                fleet, np.array([at]), np.array([1e6]), np.array([key]), 0, math.nextafter(at, 9e9)
            )
            found.append(int(np.argmax(fleet.rows["serving"] - before)))
        return found

    before = homes(1.0)
    assert max(np.bincount(before)) < 1.3 * keys.size / 10
    kernel.drain(fleet, 4)
    after = homes(2.0)
    assert 4 not in after
    moved = [one for one, other in zip(before, after, strict=True) if one != other and one != 4]
    assert len(moved) < 0.1 * keys.size


def test_who_finds_no_replica_is_held_until_one_is_ready_or_time_is_up() -> None:
    rules = Rules(limit=4, queue_limit=10, hold_limit=3, hold_seconds=5.0)
    fleet = fleets.empty(2, np.ones(5), rules, 1)
    at = np.array([1.0, 6.0, 6.1, 6.2, 6.3])
    kernel.create(fleet, 0, 2.0, 7.0, math.inf)
    kernel.advance(fleet, at, np.full(5, 0.5), np.zeros(5, np.int64), 0, 20.0)
    # One was held too long; of the four that came then, three had room.
    assert endpoints.total(fleet, "rejected") == 2
    assert endpoints.total(fleet, "finished") == 3
    # Each took until 7.0 and its work, from when it came.
    assert float(fleet.rows["done_seconds"][0]) == pytest.approx((7.5 - 6.0) + (7.5 - 6.1) + (7.5 - 6.2))


def test_a_replica_that_drains_finishes_what_it_has_and_gets_no_more() -> None:
    fleet = endpoints.fixed(2, Rules(limit=1, queue_limit=9))
    at = np.arange(8) / 100
    index = kernel.advance(fleet, at, np.ones(8), np.zeros(8, np.int64), 0, 0.5)
    had = int(fleet.rows["serving"][0] + fleet.rows["waiting"][0])
    kernel.drain(fleet, 0)
    more = np.linspace(0.6, 0.9, 5)
    kernel.advance(fleet, more, np.ones(5), np.zeros(5, np.int64), 0, 1_000.0)
    assert index == 8
    assert had > 0
    assert fleet.rows["state"][0] == fleets.ABSENT
    assert fleet.rows["done"][0] == had
    assert endpoints.total(fleet, "finished") == 13


def test_late_is_counted_from_the_work_of_each_request() -> None:
    fleet = endpoints.fixed(1, Rules(limit=1, queue_limit=9, late_factor=2.0, late_seconds=1.0))
    # Done at 1, 1.5 and 4.5 after coming at 0: allowed are 3, 2 and 7; the fourth is done at 5, allowed 2.
    endpoints.drive(fleet, np.zeros(4), np.array([1.0, 0.5, 3.0, 0.5]))
    assert endpoints.total(fleet, "late") == 1


def test_a_higher_limit_lets_those_begin_that_wait() -> None:
    fleet = endpoints.fixed(1, Rules(limit=2, queue_limit=9), np.ones(5))
    kernel.advance(fleet, np.zeros(6), np.ones(6), np.zeros(6, np.int64), 0, 0.5)
    assert (fleet.rows["serving"][0], fleet.rows["waiting"][0]) == (2, 4)
    kernel.set_limit(fleet, 4, 0.5)
    assert (fleet.rows["serving"][0], fleet.rows["waiting"][0]) == (4, 2)
    kernel.advance(fleet, np.zeros(0), np.zeros(0), np.zeros(0, np.int64), 0, 1.25)
    assert endpoints.total(fleet, "finished") == 2


ACTS = st.one_of(
    st.tuples(st.just("create"), st.floats(0, 5), st.one_of(st.just(math.inf), st.floats(0, 20))),
    st.tuples(st.just("drain"), st.integers(0, 5), st.just(0.0)),
    st.tuples(st.just("limit"), st.integers(1, 6), st.just(0.0)),
    st.tuples(st.just("ask"), st.integers(1, 60), st.floats(0.01, 4.0)),
)


@settings(max_examples=150)
@given(
    acts=st.lists(ACTS, max_size=40),
    way=st.sampled_from(sorted(routing.NAMES.values())),
    by_work=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_request_is_somewhere_whatever_happens(
    acts: list[tuple[str, float, float]], way: int, by_work: bool, seed: int
) -> None:
    rules = Rules(limit=3, queue_limit=4, hold_limit=5, hold_seconds=2.0, routing=way, by_work=by_work)
    fleet = fleets.empty(6, np.array([0.0, 1.0, 1.0, 0.8, 0.5, 0.4, 0.3]), rules, seed)
    random = np.random.default_rng(seed)
    now = 0.0
    for act, first, second in acts:
        rows = fleet.rows
        at = work = np.zeros(0)
        if act == "create" and (free := np.flatnonzero(rows["state"] == fleets.ABSENT)).size:
            kernel.create(fleet, int(free[0]), now, now + first, now + first + second)
        elif act == "drain" and rows["state"][int(first)] in (fleets.STARTING, fleets.READY):
            kernel.drain(fleet, int(first))
        elif act == "limit":
            kernel.set_limit(fleet, int(first), now)
        elif act == "ask":
            at = np.sort(random.uniform(now, now + 1, int(first)))
            work = random.exponential(second, at.size)
        now += 1.0
        kernel.advance(fleet, at, work, random.integers(0, 9, at.size), 0, now)
        gone = sum(endpoints.total(fleet, name) for name in ("finished", "rejected", "lost"))
        assert endpoints.total(fleet, "arrived") == gone + endpoints.left(fleet)
        assert (rows["serving"] <= 6).all()
        assert (rows["waiting"] <= rules.queue_limit).all()
        assert fleet.whole["ready"][0] == np.count_nonzero(rows["state"] == fleets.READY)
        assert fleet.whole["load"][0] == pytest.approx(rows["load"][rows["state"] > 0].sum(), abs=1e-6)
        if not by_work:
            there = rows["state"] > 0
            assert (rows["load"] == rows["serving"] + rows["waiting"])[there].all()
