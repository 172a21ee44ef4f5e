"""Budgets divided: never more than there is, something for everybody, most for who is asked most."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import division, endpoint, shares
from serving.autoscaler.units import Coefficients
from serving.engine.state import Measure, Ration, Spent
from serving.service import Key

_NAMES = st.sampled_from("abcdef")
_RATES = st.floats(1e-3, 1e9)
_DEMAND = st.dictionaries(_NAMES, st.floats(0, 1e9), min_size=1)


@given(total=_RATES, demand=_DEMAND, kept=st.dictionaries(st.sampled_from("xyz"), st.floats(0, 1)))
def test_shares_add_up_to_what_there_is(
    total: float, demand: dict[str, float], kept: dict[str, float]
) -> None:
    kept = {name: part * total / 3 for name, part in kept.items()}
    found = division.divide(total, demand, kept)
    assert found.keys() == demand.keys()
    assert all(each > 0 for each in found.values())
    assert sum(found.values()) + sum(kept.values()) <= total * (1 + 1e-8)
    if sum(kept.values()) < total / 2:
        assert sum(found.values()) + sum(kept.values()) == pytest.approx(total)


@given(total=_RATES, demand=_DEMAND)
def test_who_is_asked_more_gets_no_less(total: float, demand: dict[str, float]) -> None:
    found = division.divide(total, demand)
    for one in demand:
        for other in demand:
            if demand[one] >= demand[other]:
                assert found[one] >= found[other] * (1 - 1e-9)


WANTED = shares.Budget({"acme": Ration(100.0), "free": Ration(None, priority=2)})


def second(state: shares.State, **spent: Spent) -> shares.State:
    """One turn, in which these answered what they have had in all."""
    told = shares.rations(WANTED, state, sorted(spent))
    return shares.heard(state, told, {name: {"acme": each} for name, each in spent.items()}, 1.0)


def test_shares_follow_the_traffic() -> None:
    state = shares.State()
    for turn in range(1, 10):
        state = second(state, a=Spent(turn, 30.0 * turn, 0, 0.0), b=Spent(0, 0.0, 0, 0.0))
    told = shares.rations(WANTED, state, "ab")
    rate = {name: told[name].tenants["acme"].per_second for name in "ab"}
    assert rate == {"a": pytest.approx(95), "b": pytest.approx(5)}
    assert told["a"].tenants["free"] == Ration(None, priority=2)


def test_what_was_refused_is_demand() -> None:
    state = shares.State()
    for turn in range(1, 10):
        one, other = Spent(turn, 10.0 * turn, turn, 30.0 * turn), Spent(turn, 20.0 * turn, 0, 0.0)
        state = second(state, a=one, b=other)
    told = shares.rations(WANTED, state, "ab")
    assert told["a"].tenants["acme"].per_second == pytest.approx(5 + 90 * 2 / 3, rel=0.02)


@given(
    turns=st.lists(
        st.tuples(st.sets(_NAMES, min_size=1), st.sets(_NAMES), st.sets(_NAMES), st.floats(0, 1e3)),
        max_size=8,
    )
)
def test_whoever_is_silent_no_more_is_in_use_than_there_is(
    turns: list[tuple[set[str], set[str], set[str], float]],
) -> None:
    """Nor where only the answer was lost. A second later, at the latest: it takes one to know."""
    state, has = shares.State(), dict[str, float]()
    for holders, hearing, answering, demand in turns:
        for name in has.keys() - holders:
            del has[name]
        for turn in range(2):
            told = shares.rations(WANTED, state, sorted(holders))
            for name in holders & (hearing | answering):
                has[name] = told[name].tenants["acme"].per_second or 0.0
            answers = {name: {"acme": Spent(turn, demand * turn, 0, 0.0)} for name in holders & answering}
            state = shares.heard(state, told, answers, 1.0)
        assert sum(has.values()) <= 100 * (1 + 1e-6)


def test_a_replica_that_began_again_is_no_negative_demand() -> None:
    state = second(shares.State(), a=Spent(9, 1_000.0, 0, 0.0))
    told = shares.rations(WANTED, state, "a")
    state = shares.heard(state, told, {"a": {"acme": Spent(0, 7.0, 0, 0.0)}}, 1.0)
    assert state.demand["a", "acme"] >= 0


def test_a_budget_is_what_engines_must_know() -> None:
    document = {
        "name": "chat",
        "engine": {"kind": "command", "command": ["true"]},
        "limits": {"output_tokens": 9},
        "units": {"request_seconds": 0.5, "input_token_seconds": 0.25, "output_token_seconds": 1},
    }
    wanted = endpoint.Endpoint.model_validate(document)
    keys = [
        Key("a", "1", requests_per_second=3),
        Key("b", "2", tokens_per_second=5.0),
        Key("c", "3", units_per_second=0.5, priority=-1),
    ]
    found = shares.budget(wanted, keys)
    assert found.tenants == {"b": Ration(5.0), "c": Ration(0.5, Measure.UNITS, -1)}
    assert (found.output_tokens, found.coefficients) == (9, Coefficients(0.5, 0.25, 1.0, 0.0))
    assert not found.empty
    assert shares.budget(
        endpoint.Endpoint.model_validate(document | {"limits": {}, "units": None}), keys[:1]
    ).empty
