"""Capacity between endpoints: the rules, whatever is claimed."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving.autoscaler import capacity
from serving.autoscaler.capacity import Claim, Policy

_COUNT = st.integers(0, 30)


@st.composite
def claims(draw: st.DrawFn, most_places: int = 1) -> list[Claim]:
    names = draw(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1, max_size=6))
    return [
        Claim(
            name,
            wants=draw(_COUNT),
            holds=draw(_COUNT),
            floor=draw(st.integers(0, 5)),
            guaranteed=draw(st.integers(0, 15)),
            weight=draw(st.floats(0.1, 10)),
            places=draw(st.integers(1, most_places)),
        )
        for name in names
    ]


_ANY = claims(8)
_PLACES = st.integers(0, 120)
POLICY = Policy(notice_seconds=30.0, step_percent=25.0)


def used(given_: dict[str, int], found: list[Claim]) -> int:
    return sum(given_[claim.name] * claim.places for claim in found)


@given(places=_PLACES, found=_ANY)
def test_no_more_is_allotted_than_there_is_or_than_is_wanted(places: int, found: list[Claim]) -> None:
    due = capacity.allot(places, found)
    assert used(due, found) <= places
    assert all(0 <= due[claim.name] <= max(claim.wants, claim.floor) for claim in found)


@given(places=_PLACES, found=_ANY)
def test_nothing_that_somebody_could_use_is_left(places: int, found: list[Claim]) -> None:
    due = capacity.allot(places, found)
    left = places - used(due, found)
    for claim in found:
        assert due[claim.name] >= max(claim.wants, claim.floor) or claim.places > left


@given(places=_PLACES, found=claims())
def test_best_effort_never_takes_what_is_guaranteed(places: int, found: list[Claim]) -> None:
    due = capacity.allot(places, found)
    owed = {claim.name: max(claim.floor, min(claim.wants, claim.guaranteed)) for claim in found}
    if any(due[name] < owed[name] for name in owed):
        assert all(due[name] <= owed[name] for name in owed)
        assert sum(due.values()) == places
    if any(due[claim.name] < claim.floor for claim in found):
        assert all(due[claim.name] <= claim.floor for claim in found)


@given(places=_PLACES, found=claims())
def test_more_capacity_takes_nothing_from_anybody(places: int, found: list[Claim]) -> None:
    less, more = capacity.allot(places, found), capacity.allot(places + 1, found)
    assert all(less[name] <= more[name] for name in less)


@given(places=_PLACES, found=claims(), data=st.data())
def test_who_wants_more_gets_no_less_and_takes_no_guarantee(
    places: int, found: list[Claim], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(found) - 1))
    greedier = [*found]
    greedier[at] = dataclasses.replace(found[at], wants=found[at].wants + 7)
    before, after = capacity.allot(places, found), capacity.allot(places, greedier)
    assert after[found[at].name] >= before[found[at].name]


@given(places=_PLACES, found=claims())
def test_the_rest_is_divided_by_weight(places: int, found: list[Claim]) -> None:
    """Max-min: who has more of it for its weight than another could not give that other a replica."""
    due = capacity.allot(places, found)
    base = {claim.name: max(claim.floor, min(claim.wants, claim.guaranteed)) for claim in found}
    rest = {name: due[name] - base[name] for name in due}
    for rich in found:
        for poor in found:
            wants_more = due[poor.name] < max(poor.wants, poor.floor)
            if rest[rich.name] > 0 and wants_more:
                assert rest[rich.name] / rich.weight <= (rest[poor.name] + 1) / poor.weight * (1 + 1e-9)


@given(places=_PLACES, found=_ANY)
def test_the_order_of_claims_does_not_matter(places: int, found: list[Claim]) -> None:
    assert capacity.allot(places, found) == capacity.allot(places, list(reversed(found)))


@given(places=_PLACES, found=_ANY, since=st.floats(0, 100))
def test_grants_never_exceed_what_there_is_nor_hurt(places: int, found: list[Claim], since: float) -> None:
    notices = {claim.name: 0.0 for claim in found}
    grants = capacity.decide(places, found, notices, since, POLICY)
    held = sum(claim.holds * claim.places for claim in found)
    occupied = sum(max(grants[claim.name].replicas, claim.holds) * claim.places for claim in found)
    assert occupied <= max(places, held)
    for claim in found:
        grant = grants[claim.name]
        assert grant.replicas >= min(claim.holds, grant.due)
        assert grant.replicas <= max(claim.holds, grant.due)
        if since < POLICY.notice_seconds:
            assert grant.replicas >= claim.holds


@given(places=_PLACES, found=_ANY)
def test_it_comes_to_what_the_rules_give(places: int, found: list[Claim]) -> None:
    notices: dict[str, float] = {}
    for turn in range(60):
        grants = capacity.decide(places, found, notices, 30.0 * turn, POLICY)
        notices = {name: each.notice_at for name, each in grants.items() if each.notice_at is not None}
        found = [dataclasses.replace(claim, holds=grants[claim.name].replicas) for claim in found]
    assert {claim.name: claim.holds for claim in found} == capacity.allot(places, found)


def test_a_guaranteed_endpoint_gets_its_own_back_step_by_step() -> None:
    """Best effort filled the machine while the other slept; then that one wakes."""
    story = []
    batch, chat, notices = 16, 0, dict[str, float]()
    for turn in range(16):
        found = [
            Claim("batch", wants=16, holds=batch, floor=2),
            Claim("chat", wants=12, holds=chat, guaranteed=10),
        ]
        grants = capacity.decide(16, found, notices, 10.0 * turn, POLICY)
        notices = {name: each.notice_at for name, each in grants.items() if each.notice_at is not None}
        batch, chat = grants["batch"].replicas, grants["chat"].replicas
        story.append((batch, chat))
    assert story[:3] == [(16, 0)] * 3  # the notice
    assert story[3:5] == [(13, 0), (11, 3)]  # what is free when it is decided can be given
    assert story[-1] == (4, 12)  # the floor, ten guaranteed, the rest alike
    assert all(one + other <= 16 for one, other in story)


def test_a_weight_is_a_weight() -> None:
    found = [Claim("a", 100, weight=3.0), Claim("b", 100), Claim("c", 2)]
    assert capacity.allot(22, found) == {"a": 15, "b": 5, "c": 2}
    gpus = [Claim("large", 10, places=8), Claim("small", 10, places=1)]
    assert capacity.allot(20, gpus) == {"large": 1, "small": 10}


@pytest.mark.parametrize("wrong", [{"wants": -1}, {"places": 0}, {"weight": 0.0}, {"weight": float("nan")}])
def test_a_claim_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(errors.DocumentError):
        Claim("a", **{"wants": 1, **wrong})  # type: ignore[arg-type]


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(errors.DocumentError):
        capacity.allot(1, [Claim("a", 1), Claim("a", 1)])
