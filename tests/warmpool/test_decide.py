"""`warmpool.decide`: sizes and what bounds them, and what is done when things are not known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from warmpool import arrivals, decide, demand, errors, outlook
from warmpool.observation import Mode, Node, NodeState, Observation, Pool, PoolDecision
from warmpool.policy import Breaker, NodeClass, Policy

_DEAR = {"miss_cost": 100_000.0}


def _nodes(count: int, state: NodeState = NodeState.WARM, name: str = "n") -> tuple[Node, ...]:
    return tuple(Node(f"{name}{each}", state, float(each)) for each in range(count))


def _one(state: decide.State, pool: Pool, now: float) -> tuple[decide.State, PoolDecision]:
    state, decision = decide.decide(state, Observation(now, (pool,)), now)
    return state, decision.pools[0]


def _burst(policy: Policy, name: str = "a") -> decide.State:
    """Ten nodes were asked for within the last minutes."""
    state = decide.State(policy)
    for at, wanted in ((0.0, 5), (60.0, 8), (120.0, 15)):
        state, _ = _one(state, Pool(name, wanted, ()), at)
    return state


def test_a_burst_is_answered_at_once_and_up_to_the_cap() -> None:
    state = _burst(Policy(classes={"a": NodeClass(cap=4, floor=1, **_DEAR)}))
    _, decision = _one(state, Pool("a", 15, _nodes(1)), 130.0)
    assert (decision.size, decision.request, decision.release) == (4, 3, ())
    assert [clamp.rule for clamp in decision.explanation.clamps] == ["cap"]
    assert decision.explanation.mode is Mode.REACTIVE


def test_a_pool_without_history_keeps_its_floor() -> None:
    state = decide.State(Policy(classes={"a": NodeClass(floor=2)}))
    _, decision = _one(state, Pool("a", 0, ()), 0.0)
    assert (decision.size, decision.request) == (2, 2)


def test_unknown_demand_lets_nothing_go_for_a_while() -> None:
    state = decide.State(Policy(classes={"a": NodeClass()}, hold_seconds=300.0))
    state, _ = _one(state, Pool("a", 3, ()), 0.0)
    held = _nodes(5)
    for at in (60.0, 350.0):
        state, decision = _one(state, Pool("a", None, held), at)
        assert (decision.explanation.mode, decision.size, decision.release) == (Mode.HOLD, 5, ())
    for at in (370.0, 500.0):
        state, decision = _one(state, Pool("a", None, held), at)
    assert decision.explanation.mode is Mode.REACTIVE
    assert len(decision.release) == 5


def test_failed_nodes_are_replaced_even_when_demand_is_unknown() -> None:
    state = decide.State(Policy(classes={"a": NodeClass()}))
    nodes = (*_nodes(2), Node("broken", NodeState.FAILED, 0.0))
    _, decision = _one(state, Pool("a", None, nodes), 0.0)
    assert (decision.size, decision.request, decision.replace) == (3, 1, ("broken",))


def test_shrinking_waits_and_takes_what_is_furthest_from_warm() -> None:
    state = decide.State(Policy(classes={"a": NodeClass(floor=2)}, release_after_seconds=60.0))
    nodes = (*_nodes(2), *_nodes(1, NodeState.BOOTING, "b"), *_nodes(1, NodeState.REQUESTED, "r"))
    state, decision = _one(state, Pool("a", 0, nodes), 0.0)
    assert (decision.size, decision.release) == (4, ())
    state, decision = _one(state, Pool("a", 0, nodes), 59.0)
    assert decision.release == ()
    state, decision = _one(state, Pool("a", 0, nodes), 60.0)
    assert decision.release == ("r0", "b0")


def test_handed_nodes_are_nobodys_to_let_go() -> None:
    state = decide.State(Policy(classes={"a": NodeClass()}, release_after_seconds=0.0))
    _, decision = _one(state, Pool("a", 9, _nodes(9, NodeState.HANDED)), 0.0)
    assert (decision.release, decision.replace) == ((), ())


def test_what_cannot_be_had_is_held_elsewhere() -> None:
    policy = Policy(classes={"a": NodeClass(cap=6, substitutes=("b",), **_DEAR), "b": NodeClass(cap=5)})
    state = _burst(policy)
    blocked = Pool("a", 15, _nodes(1), blocked_until=999.0, blocked="no capacity")
    _, decision = decide.decide(state, Observation(130.0, (blocked, Pool("b", 0, ()))), 130.0)
    first, other = decision.pools
    assert (first.request, other.size, other.request) == (0, 5, 5)
    assert "5 held as b instead" in first.explanation.note
    _, later = decide.decide(state, Observation(130.0, (blocked, Pool("b", 0, ()))), 1_000.0)
    assert later.pools[1].size == 0, "it is blocked no more"


def test_a_quota_bounds_what_is_asked_for() -> None:
    state = _burst(Policy(classes={"a": NodeClass(**_DEAR)}))
    _, decision = _one(state, Pool("a", 15, (), quota=2), 130.0)
    assert decision.request == 2


def test_the_budget_takes_first_what_saves_least() -> None:
    policy = Policy(
        classes={"a": NodeClass(**_DEAR), "b": NodeClass(floor=1, **_DEAR)}, budget_per_hour=4 * 60.0
    )
    state = _burst(policy)
    _, decision = decide.decide(state, Observation(130.0, (Pool("a", 15, ()), Pool("b", 0, ()))), 130.0)
    assert sum(pool.size for pool in decision.pools) <= 4
    assert decision.pools[1].size == 1, "floors are kept"
    assert "budget" in [clamp.rule for clamp in decision.pools[0].explanation.clamps]


def _forecasting(policy: Policy, weight: float) -> decide.State:
    """A controller whose forecast says one thing whatever comes."""
    weights = (weight, *(0.0,) * (arrivals.FEATURES - 1))
    fitted = outlook.Fitted(0.0, "fixed", fit=arrivals.Fit(150.0, 150.0, weights, 1.0, 1e6))
    return decide.State(policy, {"a": outlook.Memory(fitted=fitted)})


def test_a_forecast_that_goes_wild_is_bounded_and_then_left() -> None:
    policy = Policy(classes={"a": NodeClass(cap=10, **_DEAR)}, breaker=Breaker(open_seconds=600.0))
    state = _forecasting(policy, 9.0)
    modes = []
    for minute in range(15):
        state, decision = _one(state, Pool("a", 3, _nodes(0)), 60.0 * minute)
        assert decision.size <= 10
        modes.append(decision.explanation.mode)
    assert modes[0] is Mode.FORECAST
    assert Mode.REACTIVE in modes[1:3]
    opened = modes.index(Mode.REACTIVE)
    assert modes[opened : opened + 10] == [Mode.REACTIVE] * 10
    assert modes[opened + 10] is Mode.FORECAST, "tried again"


def test_the_breaker_says_so() -> None:
    state = _forecasting(Policy(classes={"a": NodeClass()}), -9.0)
    state, _ = _one(state, Pool("a", 0, ()), 0.0)
    _, decision = _one(state, Pool("a", 40, ()), 60.0)
    assert decision.explanation.breaker == "40 nodes were asked for lately where the forecast had expected 0"
    assert decision.size > 0


def test_a_class_that_the_policy_lacks_is_an_error() -> None:
    with pytest.raises(errors.ConfigurationError, match="z: the policy has no such class"):
        _one(decide.State(Policy(classes={"a": NodeClass()})), Pool("z", 1, ()), 0.0)


def _history(days: int) -> demand.Record:
    random = np.random.default_rng(5)
    minutes = np.arange(days * 1_440)
    wish = (
        20 + 8 * np.sin(2 * np.pi * minutes / 1_440) + np.repeat(random.normal(0, 1, len(minutes) // 10), 10)
    )
    return demand.record_of((60.0 * minutes).tolist(), np.rint(wish).astype(int).tolist())


def test_a_controller_with_history_forecasts_and_a_successor_decides_the_same() -> None:
    policy = Policy(classes={"a": NodeClass(**_DEAR)})
    state = decide.State(policy, {"a": outlook.Memory(record=_history(4))})
    now = 4 * 86_400.0
    for look in range(5):
        state, _ = _one(state, Pool("a", 20 + look, ()), now + 30.0 * look)
    successor = decide.State.from_json(policy, state.to_json())
    assert successor == state
    pool = Pool("a", 26, _nodes(3))
    ours, theirs = (_one(each, pool, now + 200.0)[1] for each in (state, successor))
    assert ours == theirs
    assert ours.explanation.mode is Mode.FORECAST
    assert ours.explanation.quantile > 0.5
    assert f"models by their loss: {ours.explanation.model} " in ours.explanation.note


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: kept.update(version=99),
        lambda kept: kept["pools"]["a"].update(rate=float("nan")),
        lambda kept: kept["pools"]["a"].update(at=[2.0, 1.0], wanted=[1, 2]),
        lambda kept: kept["pools"]["a"].pop("trust"),
        lambda kept: kept["pools"]["a"].update(more=1),
    ],
)
def test_damaged_state_is_refused(spoil: object) -> None:
    policy = Policy(classes={"a": NodeClass()})
    kept = json.loads(_one(decide.State(policy), Pool("a", 1, ()), 0.0)[0].to_json())
    spoil(kept)  # type: ignore[operator]
    with pytest.raises(errors.InvalidInputError, match="remove it to begin anew"):
        decide.State.from_json(policy, json.dumps(kept))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.floats(0, 4_000), st.one_of(st.none(), st.integers(0, 500)), st.integers(0, 30)),
        min_size=1,
        max_size=25,
    )
)
def test_whatever_comes_bounds_are_kept(looks: list[tuple[float, int | None, int]]) -> None:
    policy = Policy(classes={"a": NodeClass(floor=1, cap=12, **_DEAR)}, release_after_seconds=0.0)
    state, now = decide.State(policy), 0.0
    for after, wanted, held in looks:
        now += after
        nodes = _nodes(held)
        state, decision = _one(state, Pool("a", wanted, nodes), now)
        assert len(set(decision.release)) == len(decision.release)
        assert held - len(decision.release) + decision.request == decision.size
        assert 1 <= decision.size <= max(12, held)
        state = decide.State.from_json(policy, state.to_json())


def test_settings_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="cap: 1 is below floor"):
        NodeClass(floor=2, cap=1)
    with pytest.raises(ValueError, match="'z' is no other class"):
        Policy(classes={"a": NodeClass(substitutes=("z",))})
