"""Which peers are asked: every rule of peerhealth, on a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imagefs import peerhealth
from imagefs.peerhealth import Why

POLICY = peerhealth.Policy(
    down_seconds=10, longest_down_seconds=40, lying_seconds=600, slow_losses=3, hedge_share=0.5, hedge_burst=2
)


def test_a_peer_that_failed_comes_back_by_a_probe_only() -> None:
    health = peerhealth.Health(POLICY)
    assert health.failed("a", 0.0)
    assert not health.failed("a", 1.0), "told twice"
    assert health.down() == {"a": Why.FAILED}
    assert health.next_probe(9.9) is None
    assert health.next_probe_at() == 10.0
    assert health.next_probe(10.0) == "a"
    assert health.next_probe(10.0) is None, "probed twice at once"
    assert health.next_probe_at() is None
    health.probed("a", False, 10.5)
    assert health.next_probe_at() == 30.5
    health.next_probe(31.0)
    health.probed("a", False, 31.0)
    assert health.next_probe_at() == 71.0
    health.next_probe(71.0)
    health.probed("a", False, 71.0)
    assert health.next_probe_at() == 111.0, "a pause grew beyond its bound"
    health.next_probe(111.0)
    health.probed("a", True, 111.0)
    assert not health.down()
    assert health.failed("a", 112.0), "a new outage is news"


def test_a_liar_stays_down_longer_and_is_news_once() -> None:
    health = peerhealth.Health(POLICY)
    assert health.failed("a", 0.0)
    assert health.lied("a", 1.0), "that it lies is news, although it was down"
    assert not health.lied("a", 2.0)
    assert not health.failed("a", 3.0)
    assert health.down() == {"a": Why.LIED}
    assert health.next_probe(600.0) is None
    assert health.next_probe(601.0) == "a"


def test_races_lost_in_a_row_make_a_peer_slow() -> None:
    health = peerhealth.Health(POLICY)
    assert not health.lost_race("a", 0.0)
    assert not health.lost_race("a", 0.0)
    health.answered("a")
    assert not health.lost_race("a", 1.0)
    assert not health.lost_race("a", 1.0)
    assert health.lost_race("a", 1.0)
    assert health.down() == {"a": Why.SLOW}


def test_a_refused_layer_says_nothing_of_others() -> None:
    health = peerhealth.Health(POLICY)
    health.refused("a", "layer", 0.0)
    assert health.refuses("a", "layer", 9.9)
    assert not health.refuses("a", "layer", 10.0)
    assert not health.refuses("a", "other", 1.0)
    assert not health.refuses("b", "layer", 1.0)
    assert not health.down()


def test_who_left_is_forgotten() -> None:
    health = peerhealth.Health(POLICY)
    health.failed("a", 0.0)
    health.failed("b", 0.0)
    health.retain(["b"])
    assert health.down() == {"b": Why.FAILED}
    health.probed("a", True, 1.0)
    assert health.down() == {"b": Why.FAILED}


@given(st.lists(st.booleans(), max_size=200))
def test_hedges_are_a_bounded_part(moves: list[bool]) -> None:
    health = peerhealth.Health(POLICY)
    answered = hedged = 0
    for is_answer in moves:
        if is_answer:
            health.answered("a")
            answered += 1
        else:
            hedged += health.may_hedge()
        assert hedged <= POLICY.hedge_burst + POLICY.hedge_share * answered
