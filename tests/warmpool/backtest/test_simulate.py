"""`warmpool.backtest.simulate`, against a simulation of its own that is written for clarity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmpool.backtest import simulate

_EVENTS = st.lists(st.tuples(st.floats(0.5, 90.0), st.booleans()), min_size=1, max_size=40)


def _world(events: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    times = np.cumsum([after for after, _ in events])
    return times, np.array([1 if up else -1 for _, up in events], np.int64)


def _run(
    events: list[tuple[float, bool]], least: int, most: int, *, returns: bool, patience: int = 0
) -> tuple[simulate.Outcome, np.ndarray]:
    times, changes = _world(events)
    end = float(times[-1]) + 400.0
    looks = np.arange(0.0, end, 30.0)
    own = 40.0 + 10.0 * (np.arange(int((changes > 0).sum())) % 7)
    pool = 35.0 + 17.0 * (np.arange(50) % 5)
    run = simulate.Simulation(times, changes, 0.0, (own, pool), returns=returns)
    sizes = np.full(len(looks), least, np.int64)
    run.run(looks, end, sizes, np.full(len(looks), most, np.int64), patience)
    return run.outcome(), own


@settings(deadline=None, max_examples=60)
@given(_EVENTS)
def test_without_a_pool_each_request_waits_for_its_own_node(events: list[tuple[float, bool]]) -> None:
    outcome, own = _run(events, 0, 0, returns=False)
    assert (outcome.hits, outcome.misses) == (0, len(own))
    assert outcome.idle_hours == 0
    assert np.all(outcome.waits <= own + 1e-9)


@settings(deadline=None, max_examples=100)
@given(_EVENTS, st.integers(0, 6), st.integers(0, 4), st.booleans(), st.integers(0, 3))
def test_no_request_waits_longer_than_without_a_pool(
    events: list[tuple[float, bool]], least: int, more: int, returns: bool, patience: int
) -> None:
    outcome, own = _run(events, least, least + more, returns=returns, patience=patience)
    assert outcome.worse == 0
    assert outcome.hits + outcome.misses == len(own) == len(outcome.waits)
    assert np.all(outcome.waits <= own + 1e-6)
    assert (outcome.waits == 0).sum() >= outcome.hits


@settings(deadline=None, max_examples=60)
@given(_EVENTS, st.integers(1, 5), st.booleans())
def test_a_constant_pool_is_what_second_by_second_says(
    events: list[tuple[float, bool]], size: int, returns: bool
) -> None:
    """Lead times of one length, so that it does not matter whose node is whose: time in steps, counted."""
    step, lead = 0.25, 45.0
    events = [(max(step, round(after / step) * step), up) for after, up in events]
    times, changes = _world(events)
    times = times + step / 3  # no event falls on a look, or on the coming of a node
    end = np.ceil(times[-1] / 30.0) * 30.0
    looks = np.arange(0.0, end, 30.0)
    count = int((changes > 0).sum())
    run = simulate.Simulation(
        times, changes, 0.0, (np.full(count, lead), np.full(3, lead + step / 5)), returns=returns
    )
    sizes = np.full(len(looks), size, np.int64)
    run.run(looks, end, sizes, sizes, 0)
    hits = _stepped(times, changes, end, size, lead, returns=returns, step=step)
    assert run.outcome().hits == hits


def _stepped(
    times: np.ndarray, changes: np.ndarray, end: float, size: int, lead: float, *, returns: bool, step: float
) -> int:
    warm, waiting, hits = 0, 0, 0
    coming: list[float] = []
    moments = sorted({*np.arange(0.0, end, 30.0).tolist(), *times.tolist()})
    looks = set(np.arange(0.0, end, 30.0).tolist())
    changed = dict(zip(times.tolist(), changes.tolist(), strict=True))
    for now in moments:
        for ready in sorted(each for each in coming if each < now):
            coming.remove(ready)
            if waiting:
                waiting -= 1
            else:
                warm += 1
        if now in looks:
            while warm + len(coming) - waiting > size and len(coming) > waiting:
                coming.remove(max(coming))
            warm = min(warm, max(0, size - len(coming) + waiting))
            coming += [now + lead + step / 5] * (size - (warm + len(coming) - waiting))
        if now in changed:
            if changed[now] > 0 and warm:
                warm, hits = warm - 1, hits + 1
            elif changed[now] > 0:
                waiting += 1
                coming.append(now + lead)
            elif returns and waiting:
                waiting -= 1
            elif returns:
                warm += 1
    return hits


def test_idle_time_is_of_warm_nodes_only() -> None:
    run = simulate.Simulation(
        np.array([600.0]), np.array([1], np.int64), 0.0, (np.array([99.0]), np.array([100.0])), returns=False
    )
    run.step(0.0, 3_600.0, 2)
    outcome = run.outcome()
    assert (outcome.hits, outcome.started) == (1, 2)
    assert outcome.idle_hours == pytest.approx((500 + 3_500) / 3_600)
    assert outcome.booting_hours == pytest.approx(200 / 3_600)
