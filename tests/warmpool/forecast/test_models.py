"""`warmpool.forecast`: every model under one suite, and the choice between them."""

from __future__ import annotations

import numpy as np
import pytest

from warmpool.forecast import Model, choice, models

_ALL = models.candidates(1_800.0)
_DAY = 48


def _days(count: int, noise: float = 0.5, week: bool = False) -> np.ndarray:
    steps = np.arange(count * _DAY)
    level = 20 + 10 * np.sin(2 * np.pi * steps / _DAY)
    if week:
        level = level * np.where(steps // _DAY % 7 < 5, 1.0, 0.3)
    return np.maximum(0, level + np.random.default_rng(3).normal(0, noise, len(steps)))


@pytest.mark.parametrize("model", _ALL, ids=lambda each: each.name)
def test_the_contract(model: Model) -> None:
    levels = _days(15)[: max(model.least_steps, 1)]
    before = levels.copy()
    said = model.forecast(levels, 30)
    assert said.shape == (30,)
    assert np.isfinite(said).all()
    assert np.array_equal(said, model.forecast(levels, 30)), "the same input, the same output"
    assert np.array_equal(levels, before), "the input is left alone"


@pytest.mark.parametrize("model", _ALL, ids=lambda each: each.name)
@pytest.mark.parametrize(
    "levels", [np.zeros(15 * _DAY), np.full(15 * _DAY, 7.0), np.eye(1, 15 * _DAY, 300)[0] * 1e4]
)
def test_zeros_constants_and_spikes(model: Model, levels: np.ndarray) -> None:
    chosen = choice.choose([model], levels, _DAY, 3)
    assert np.isfinite(chosen.path).all()
    assert (chosen.path >= 0).all()


def test_days_are_recognized() -> None:
    chosen = choice.choose(_ALL, _days(7), _DAY, 3)
    assert chosen.model in {"as yesterday", "MSTL, daily"}
    assert np.abs(chosen.path - _days(8, noise=0)[-_DAY:]).mean() < 1.5
    assert chosen.losses["last value"] > 2 * chosen.losses[chosen.model]


def test_weeks_are_recognized_once_there_were_two() -> None:
    """The judged days are a Friday, a Saturday and a Sunday: no other model knows of the step down."""
    chosen = choice.choose(_ALL[:3] + _ALL[4:], _days(21, week=True), _DAY, 3)
    assert chosen.model in {"as a week ago", "MSTL, daily and weekly"}


def test_short_histories_get_the_simplest_model() -> None:
    chosen = choice.choose(_ALL, np.array([4.0]), _DAY, 3)
    assert chosen.model == "last value"
    assert chosen.path.tolist() == [4.0] * _DAY
    assert chosen.quantile(0.99).tolist() == chosen.path.tolist()


def test_quantiles_cover_what_comes() -> None:
    real = _days(30, noise=3.0)
    inside = []
    for day in range(8, 29):
        chosen = choice.choose([_ALL[1]], real[: day * _DAY], _DAY, 5)
        inside.append(real[day * _DAY : (day + 1) * _DAY] <= chosen.quantile(0.95))
    assert 0.9 < np.mean(inside) < 0.99


def test_a_model_that_says_no_number_is_not_followed() -> None:
    class Wild:
        name, least_steps = "wild", 1

        def forecast(self, levels: np.ndarray, steps: int) -> np.ndarray:
            return np.full(steps, np.nan)

    assert choice.choose([Wild()], np.array([3.0, 4.0]), 5, 3).path.tolist() == [4.0] * 5
