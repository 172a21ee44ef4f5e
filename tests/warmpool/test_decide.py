"""`warmpool.decide`: sizes, bounds, and what is done when things are not known."""

from __future__ import annotations

from warmpool import decide
from warmpool.observation import Mode, Observation, Pool
from warmpool.policy import NodeClass, Policy


def _policy() -> Policy:
    return Policy(classes={"a": NodeClass(floor=1, cap=3)})


def test_a_rise_is_answered_within_the_bounds_and_survives_a_restart() -> None:
    state = decide.State(_policy())
    for at, wanted in ((0.0, 5), (60.0, 6), (120.0, 20)):
        state, decision = decide.decide(state, Observation(at, (Pool("a", wanted, ()),)), at)
        state = decide.State.from_json(_policy(), state.to_json())
    (pool,) = decision.pools
    assert (pool.size, pool.request) == (3, 3)
    assert [clamp.rule for clamp in pool.explanation.clamps] == ["cap"]


def test_unknown_demand_holds() -> None:
    state = decide.State(_policy())
    state, decision = decide.decide(state, Observation(0.0, (Pool("a", None, ()),)), 0.0)
    assert decision.pools[0].explanation.mode is Mode.HOLD
    assert decision.pools[0].size == 1
