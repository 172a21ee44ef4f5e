"""Coefficients from measurements: found where they are, never negative, and honest about their error."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving.autoscaler import unitfit, units
from serving.autoscaler.unitfit import Point
from serving.autoscaler.units import Coefficients

_TOKENS = st.just(0.0) | st.floats(1e-3, 1e6)
_COEFFICIENT = st.sampled_from([0.0, 1e-6, 3e-5, 1e-3, 0.02])
_SHAPES = [
    (given_, given_ * part // 4, made)
    for given_, part, made in itertools.product((16, 128, 1_024), (0, 3), (1, 16, 128))
]


def measured(by: Coefficients, noise: float = 0.0, seed: int = 1) -> list[Point]:
    chance = random.Random(seed)
    return [
        Point(
            given_, cached, made, units.cost(by, given_, made, cached) * (1 + chance.uniform(-noise, noise))
        )
        for given_, cached, made in _SHAPES
    ]


@given(st.builds(Coefficients, st.sampled_from([1e-4, 0.01]), _COEFFICIENT, _COEFFICIENT, _COEFFICIENT))
def test_exact_measurements_give_the_coefficients_back(by: Coefficients) -> None:
    found = unitfit.fit(measured(by))
    assert found.coefficients.request == pytest.approx(by.request, rel=1e-4)
    for name in ("input", "output", "cached"):
        # What is a millionth of a request's cost does not show.
        assert getattr(found.coefficients, name) == pytest.approx(getattr(by, name), rel=1e-3, abs=1e-10)
    assert found.mape_percent < 0.1
    assert found.r_squared > 0.999 or by == Coefficients(by.request, 0.0, 0.0)


def test_noise_is_the_error_that_is_reported() -> None:
    by = Coefficients(0.002, 2e-5, 1e-3, 1e-6)
    found = unitfit.fit(measured(by, noise=0.1))
    assert 2 < found.mape_percent < 15
    assert found.own_mape_percent < found.mape_percent <= found.worst_percent
    assert found.coefficients.output == pytest.approx(by.output, rel=0.1)


@given(
    st.lists(
        st.builds(Point, _TOKENS, _TOKENS, _TOKENS, st.floats(1e-6, 1e3)),
        min_size=unitfit.LEAST_POINTS,
        max_size=12,
    )
)
def test_whatever_was_measured_no_coefficient_is_negative(points: list[Point]) -> None:
    found = unitfit.fit(points)
    by = found.coefficients
    assert min(by.request, by.input, by.output, by.cached) >= 0
    assert found.mape_percent >= 0


def test_what_a_line_cannot_say_has_a_large_error() -> None:
    points = [Point(n, 0, 1, 1e-6 * n * n) for n in (10, 100, 1_000, 3_000, 6_000, 10_000)]
    assert unitfit.fit(points).mape_percent > 50


@pytest.mark.parametrize(
    "points",
    [
        [],
        [Point(1, 0, 1, 1)] * 4,
        [Point(1, 0, 1, 0)] * 9,
        [Point(1, 0, 1, float("nan"))] * 9,
        [Point(5e-324, 0, 1, 1)] * 9,
    ],
)
def test_points_that_say_nothing_are_refused(points: list[Point]) -> None:
    with pytest.raises(errors.DocumentError):
        unitfit.fit(points)
