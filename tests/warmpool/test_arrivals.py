"""`warmpool.arrivals`: the fading sums, and what is learned from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmpool import arrivals, demand


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40))
def test_look_by_look_is_the_same_as_all_at_once(changes: list[int]) -> None:
    levels = [100 + sum(changes[: number + 1]) for number in range(len(changes))]
    times = [60.0 * (number + 1) - 0.001 for number in range(len(changes))]
    record = demand.record_of([-60.0, *times], [100, *levels])
    rises, falls = arrivals.rhythms(demand.grid(record, 0.0, 60.0 * len(changes), 60.0))
    rhythm = arrivals.Rhythm(0.0)
    for number, change in enumerate(changes):
        rhythm = rhythm.after(60.0 * (number + 1), max(0, change), max(0, -change))
        assert np.allclose(rhythm.rises, rises[number])
        assert np.allclose(rhythm.falls, falls[number])


def _world(hours: int, seed: int) -> demand.Record:
    """Quiet hours, and busy ones with two requests a minute; what was asked for is released an hour later."""
    random = np.random.default_rng(seed)
    rises = random.poisson([2.0 if (minute // 60) % 4 == 3 else 0.02 for minute in range(60 * hours)])
    falls = np.concatenate([np.zeros(60, int), rises[:-60]])
    level = 10 + np.cumsum(rises - falls)
    return demand.record_of((60.0 * np.arange(len(level))).tolist(), level.tolist())


def test_bursts_are_recognized() -> None:
    grid = demand.grid(_world(96, 1), 0.0, 96 * 3_600.0, 60.0)
    fit = arrivals.fit(grid, arrivals.NOTHING_SAID, 180.0)
    assert fit is not None
    rises, falls = arrivals.rhythms(grid)
    nothing = np.zeros(len(grid.level))
    rates = fit.rates(arrivals.features(rises, falls, grid.level, (nothing, nothing)))
    minutes = np.arange(len(rates)) % 240
    assert 1.4 < 60 * np.median(rates[(minutes > 190) & (minutes < 230)]) < 2.6
    assert 60 * np.median(rates[(minutes > 60) & (minutes < 170)]) < 0.2


def test_what_the_forecast_says_counts() -> None:
    """Single requests that nothing announces but the outline."""
    minutes = np.arange(60 * 96)
    record = demand.record_of((60.0 * minutes).tolist(), (10 + (minutes + 30) // 60).tolist())
    grid = demand.grid(record, 0.0, 96 * 3_600.0, 60.0)
    outline = arrivals.Outline(0.0, 60.0, tuple(_levels(grid)))
    fit = arrivals.fit(grid, outline, 180.0)
    assert fit is not None
    quiet = (np.zeros((2, 4)), np.zeros((2, 4)), np.array([10.0, 10.0]))
    said = fit.rates(arrivals.features(*quiet, (np.array([0.0, 1.0]), np.zeros(2))))
    assert said[1] > 3 * said[0]


def _levels(grid: demand.Grid) -> list[float]:
    return [float(each) for each in grid.level]


def test_a_gap_teaches_nothing() -> None:
    known = demand.record_of([0.0], [5])
    grid = demand.grid(known, 0.0, 86_400.0, 60.0)
    assert arrivals.fit(grid, arrivals.NOTHING_SAID, 150.0) is None, "nothing was ever asked for"
    gaps = demand.record_of(
        [60.0 * each for each in range(1_440)], [each if each % 2 else None for each in range(1_440)]
    )
    assert arrivals.fit(demand.grid(gaps, 0.0, 86_400.0, 60.0), arrivals.NOTHING_SAID, 150.0) is None


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_no_rate_is_wild(rises: float, falls: float) -> None:
    fit = arrivals.Fit(150.0, 150.0, (5.0,) * arrivals.FEATURES, 1.0, 40.0)
    row = arrivals.features(
        np.full((1, 4), rises), np.full((1, 4), falls), np.array([1e6]), (np.array([1e6]), np.zeros(1))
    )
    assert 0 <= fit.rates(row)[0] * 150.0 <= 40.0 * (1 + 1e-9)


def test_the_reactive_rule_follows_what_came() -> None:
    rhythm = arrivals.Rhythm(0.0)
    assert arrivals.reactive(rhythm) == 0
    for minute in range(120):
        rhythm = rhythm.after(60.0 * (minute + 1), 3, 0)
    assert arrivals.reactive(rhythm) == pytest.approx(0.05, rel=0.15)


@given(st.integers(0, 50), st.lists(st.floats(1.0, 4_000.0), max_size=20))
def test_what_nobody_saw_goes_on_and_does_not_grow(burst: int, gaps: list[float]) -> None:
    rhythm = arrivals.Rhythm(0.0).after(1.0, burst, 0)
    rate = arrivals.reactive(rhythm)
    for seconds in gaps:
        rhythm = rhythm.after(rhythm.at + seconds, 0, 0, arrivals.reactive(rhythm))
        assert arrivals.reactive(rhythm) == pytest.approx(rate)
