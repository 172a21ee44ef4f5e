"""`warmpool.size`, against scipy's distribution and against a pool that is played through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from warmpool import size


@given(st.floats(1e-4, 0.3), st.floats(0.1, 50), st.floats(10, 400), st.integers(0, 40))
def test_coverage_is_the_negative_binomial(rate: float, shape: float, lead: float, count: int) -> None:
    real = stats.nbinom.cdf(count, shape, shape / (shape + rate * lead))
    assert size.covered(rate, shape, np.array([lead]), count) == pytest.approx(real, abs=1e-6)


@given(st.floats(1e-6, 0.3), st.floats(0.1, 50), st.floats(1e-8, 1e-1), st.floats(1.0, 10.0))
def test_a_dearer_idle_minute_never_makes_a_larger_pool(
    rate: float, shape: float, ratio: float, dearer: float
) -> None:
    saved, idle = size.sides(np.array([rate]), np.array([shape]), np.array([90.0, 150.0]), 40)
    assert size.worth_holding(saved, idle, ratio * dearer)[0] <= size.worth_holding(saved, idle, ratio)[0]


@pytest.mark.parametrize(
    ("rate", "lead", "ratio"), [(0.01, 150.0, 1e-3), (0.05, 150.0, 1e-3), (0.02, 60.0, 3e-3)]
)
def test_it_is_the_cheapest_constant_pool_for_poisson_requests(
    rate: float, lead: float, ratio: float
) -> None:
    """The long-run cost of every constant size, by Palm's theorem: nodes on their way are Poisson, whatever
    the lead time's distribution. A dispersion that is very large is a Poisson process."""
    best, cheapest = 0, np.inf
    for count in range(60):
        on_the_way = stats.poisson(rate * lead)
        missed = rate * on_the_way.sf(count - 1)
        idle = sum((count - each) * on_the_way.pmf(each) for each in range(count))
        if missed + ratio * idle < cheapest:
            best, cheapest = count, missed + ratio * idle
    saved, idle_sides = size.sides(np.array([rate]), np.array([1e6]), np.array([lead]), 60)
    assert size.worth_holding(saved, idle_sides, ratio)[0] == best


def test_nothing_may_be_held_under_a_cap_of_zero() -> None:
    saved, idle = size.sides(np.array([1.0]), np.array([1.0]), np.array([100.0]), 0)
    assert size.worth_holding(saved, idle, 1e-6).tolist() == [0]
