"""Which model is right for a pool: rolling back-test over its own last days. Pure.

Each window's forecast is made from what was known at the window's begin. Scored is the pinball loss of the
model's quantiles, those being its path and the quantiles of its errors in the *other* windows, at the same
distance from the origin (split conformal: no distribution is assumed, and no error helps to judge itself).
With fewer than two windows nothing can be judged, and the simplest model stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from warmpool.demand import Floats
from warmpool.forecast import Model

LEVELS = (0.5, 0.8, 0.95, 0.99)
_DISTANCES = 4
"""Errors are kept apart by quarters of the horizon: they grow with distance, and not by the step."""


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """The model, and what it says. `path` are the levels after the history; `past` those that it would have
    said for the history's last steps at the windows' begins, the most recent last; `errors` are by quarter of
    the horizon; `losses` are what all that were judged lost."""

    model: str
    path: Floats
    past: Floats
    errors: tuple[Floats, ...]
    losses: dict[str, float]

    def quantile(self, level: float) -> Floats:
        """The path's upper quantile: conformal, from the errors of the back-test. The path itself, where
        there was none."""
        if not self.errors:
            return self.path
        rows = np.array([np.quantile(each, level) for each in self.errors])
        return np.asarray(np.maximum(self.path + rows[_quarters(len(self.path))], 0.0), float)


def choose(models: Sequence[Model], levels: Floats, steps: int, windows: int) -> Chosen:
    """The model that would have done best over the last `windows` windows of `steps`. `levels` has no gaps,
    and at least one value."""
    best: tuple[float, Model, Floats] | None = None
    losses: dict[str, float] = {}
    possible = min(windows, max(0, len(levels) - 1) // steps)
    for model in models:
        begin = len(levels) - possible * steps
        if possible < 2 or begin < model.least_steps:
            continue
        said = np.array([_path(model, levels[: begin + each * steps], steps) for each in range(possible)])
        loss = _loss(said, levels[begin:].reshape(possible, steps))
        losses[model.name] = loss
        if best is None or loss < best[0]:
            best = loss, model, said
    if best is None:
        model = models[0]
        return Chosen(model.name, _path(model, levels, steps), np.zeros(0), (), losses)
    _, model, said = best
    errors = levels[len(levels) - possible * steps :].reshape(possible, steps) - said
    return Chosen(model.name, _path(model, levels, steps), said.ravel(), _by_quarter(errors), losses)


def _path(model: Model, levels: Floats, steps: int) -> Floats:
    """What the model says, within reason: a model that gives no number says that nothing changes."""
    said = model.forecast(levels, steps)
    return np.maximum(np.where(np.isfinite(said), said, levels[-1]), 0.0)


def _quarters(steps: int) -> npt.NDArray[np.int64]:
    return np.minimum(np.arange(steps) * _DISTANCES // steps, _DISTANCES - 1)


def _by_quarter(errors: Floats) -> tuple[Floats, ...]:
    """Errors of all windows, by quarter of the horizon."""
    quarter = _quarters(errors.shape[1])
    return tuple(errors[:, quarter == each].ravel() for each in range(_DISTANCES))


def _loss(said: Floats, real: Floats) -> float:
    """Mean pinball loss, each window's quantiles being of the other windows' errors."""
    errors = real - said
    quarter = _quarters(said.shape[1])
    total = 0.0
    for window in range(len(said)):
        rows = _by_quarter(np.delete(errors, window, axis=0))
        for level in LEVELS:
            off = errors[window] - np.array([np.quantile(each, level) for each in rows])[quarter]
            total += float(np.mean(np.maximum(level * off, (level - 1) * off)))
    return total / (len(said) * len(LEVELS))
