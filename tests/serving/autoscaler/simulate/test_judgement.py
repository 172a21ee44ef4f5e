"""What points say of policies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.autoscaler.simulate import judgement, table
from serving.autoscaler.simulate.judgement import Outcome


def point(hours: float, late: int, policy: str = "ours", default: bool = False) -> Outcome:
    return Outcome("made", policy, f"{hours:g} h", default, 1_000, late, 0, 0, hours, 1.0, 2.0, 3, 0)


def test_a_frontier_has_no_point_that_another_is_better_than() -> None:
    points = [point(10, 50), point(12, 50), point(14, 20), point(11, 60), point(20, 20), point(30, 0)]
    assert [each.replica_hours for each in judgement.frontier(points)] == [10, 14, 30]


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 1_000)), min_size=1, max_size=30))
def test_every_point_is_matched_or_bettered_by_the_frontier(values: list[tuple[float, int]]) -> None:
    points = [point(*each) for each in values]
    best = judgement.frontier(points)
    assert best == sorted(best, key=lambda each: each.replica_hours)
    for each in points:
        assert any(o.replica_hours <= each.replica_hours and o.unserved <= each.unserved for o in best)


def test_a_verdict_compares_at_the_others_default_and_names_what_is_above() -> None:
    others = [point(100, 40, "hpa", default=True), point(60, 80, "hpa"), point(140, 10, "hpa")]
    found = judgement.verdict([point(80, 40), point(100, 10), point(70, 90)], others)
    assert found.hours_ratio == pytest.approx(0.8)
    assert found.unserved_ratio == pytest.approx(0.25)
    assert (found.frontier, len(found.above)) == (3, 1)
    assert found.above[0].startswith("60 h")
    assert found.met
    said = table.said(found)
    assert "0.80 of its replica-hours" in said
    assert "not below 60 h" in said


def test_a_verdict_says_where_there_is_nothing_to_compare() -> None:
    found = judgement.verdict([point(200, 50)], [point(100, 40, "kpa", default=True)])
    assert (found.hours_ratio, found.unserved_ratio, found.met) == (None, None, False)
    assert "no setting of ours" in table.said(found)


def test_reversals_are_counted_in_their_window() -> None:
    assert judgement.most_reversals([5] * 100) == 0
    assert judgement.most_reversals([1, 2, 3, 4]) == 0
    assert judgement.most_reversals([1, 2, 2, 1, 1, 2]) == 2
    up, down = [1] * 700 + [2], [2] * 700 + [1]
    assert judgement.most_reversals([*up, *down, *up]) == 0
    assert judgement.most_reversals([*up, *[2] * 100, *down[-3:], *up]) == 1
