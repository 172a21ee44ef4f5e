"""The models: statsforecast's, and the last value where history is short. Pure.

Each class is one adapter. statsforecast is imported when a model is first used: it brings numba and pandas,
which take seconds, and a controller without history needs none of it. MSTL sees the last weeks only, because
it looks at everything it is given each time.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from warmpool.demand import Floats
from warmpool.forecast import Model

DAY_SECONDS = 86_400.0
_WEEK_DAYS = 7


@dataclasses.dataclass(frozen=True, slots=True)
class LastValue:
    """It stays as it is."""

    name: str = "last value"
    least_steps: int = 1

    def forecast(self, levels: Floats, steps: int) -> Floats:
        return np.full(steps, levels[-1])


@dataclasses.dataclass(frozen=True, slots=True)
class SeasonalNaive:
    """As it was one season ago."""

    name: str
    season: int

    @property
    def least_steps(self) -> int:
        return self.season

    def forecast(self, levels: Floats, steps: int) -> Floats:
        from statsforecast.models import SeasonalNaive as Naive

        said = Naive(season_length=self.season).forecast(y=levels[-self.season :], h=steps)
        return np.asarray(said["mean"], float)


@dataclasses.dataclass(frozen=True, slots=True)
class AutoEts:
    """Level and damped trend, chosen by information criterion; no seasons: of 144 steps a day they are more
    than exponential smoothing can carry."""

    name: str = "AutoETS"
    least_steps: int = 12

    def forecast(self, levels: Floats, steps: int) -> Floats:
        from statsforecast.models import AutoETS

        said = AutoETS(model="ZZN", damped=True).forecast(y=levels[-2 * 144 :], h=steps)
        return np.asarray(said["mean"], float)


@dataclasses.dataclass(frozen=True, slots=True)
class Mstl:
    """Seasons of a day, and of a week where there are two of them; the rest smoothed."""

    name: str
    seasons: tuple[int, ...]

    @property
    def least_steps(self) -> int:
        return 2 * max(self.seasons)

    def forecast(self, levels: Floats, steps: int) -> Floats:
        from statsforecast.models import MSTL, SimpleExponentialSmoothingOptimized

        model = MSTL(list(self.seasons), trend_forecaster=SimpleExponentialSmoothingOptimized())
        weeks = 1 if len(self.seasons) == 1 else 4
        window = max(self.least_steps, weeks * _WEEK_DAYS * min(self.seasons))
        return np.asarray(model.forecast(y=levels[-window:], h=steps)["mean"], float)


def candidates(step_seconds: float) -> tuple[Model, ...]:
    """All models for a history of this grain, the simplest first: at a tie the simpler one is right."""
    day = round(DAY_SECONDS / step_seconds)
    week = _WEEK_DAYS * day
    return (
        LastValue(),
        SeasonalNaive("as yesterday", day),
        SeasonalNaive("as a week ago", week),
        AutoEts(),
        Mstl("MSTL, daily", (day,)),
        Mstl("MSTL, daily and weekly", (day, week)),
    )
