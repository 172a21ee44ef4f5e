"""`warmpool.leadtime`: believed first, then learned."""

from __future__ import annotations

import numpy as np
import pytest

from warmpool import leadtime
from warmpool.observation import Node, NodeState
from warmpool.policy import LeadTime

_PRIOR = LeadTime(p50_seconds=100.0, p99_seconds=200.0, believed_until=10)


def _warm(number: int, took: float) -> Node:
    at = 1_000.0 * (number + 1)
    return Node(f"n{number}", NodeState.WARM, at, at - took, at - took / 2, at)


def test_what_is_written_is_believed_until_nodes_have_come() -> None:
    nothing = leadtime.quantiles(leadtime.Learned(), _PRIOR, [], 5)
    assert nothing[2] == pytest.approx(100.0, rel=0.05)
    learned = leadtime.Learned().seen([_warm(each, 30.0) for each in range(10)])
    assert leadtime.quantiles(learned, _PRIOR, [], 5).tolist() == [30.0] * 5


def test_a_node_counts_once_and_the_oldest_are_forgotten() -> None:
    learned = leadtime.Learned().seen([_warm(0, 40.0)])
    assert learned.seen([_warm(0, 40.0)]) == learned
    many = learned.seen([_warm(each, 50.0) for each in range(1, leadtime.KEPT + 5)])
    assert len(many.seconds) == leadtime.KEPT
    assert 40.0 not in many.seconds


def test_nodes_that_do_not_come_lengthen_the_time() -> None:
    learned = leadtime.Learned().seen([_warm(each, 60.0) for each in range(20)])
    waiting = [Node(f"w{each}", NodeState.BOOTING, 0.0, requested_at=0.0) for each in range(10)]
    assert np.median(leadtime.quantiles(learned, _PRIOR, leadtime.ages(waiting, 30.0), 6)) == 60.0
    late = leadtime.quantiles(learned, _PRIOR, leadtime.ages(waiting, 600.0), 6)
    assert late[-1] > 400.0
