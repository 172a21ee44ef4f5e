"""How many nodes will be asked for within a lead time: a distribution, from what was asked for lately and
from what the forecast says of the hour. Pure.

What a pool must cover is not the level of demand but the requests that come while a new node is on its way.
They come in bursts: given the hour, what tells most is how many came, and were released, in the last minutes.
So the expected number is a regression on

- rises and falls of demand, as sums that fade with four time constants (`Rhythm`),
- the level, and the rise and the fall that the chosen forecast expects around the lead time,
- products of the short sums: rises after rises go on, rises among falls do not;

with a log link, and a negative binomial around it, which is a Poisson process whose rate is not known
exactly: what comes early then raises what is still expected (`warmpool.size` relies on that). Fitted by
penalized Fisher scoring in numpy; the dispersion by moments, in turns.

`reactive` is the same distribution from the fading sums alone: it needs no fit and cannot go wild.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from warmpool.demand import Bools, Floats, Grid

FADES_SECONDS = (75.0, 300.0, 1_200.0, 4_800.0)
"""From half of a node's boot to over an hour, in equal ratios."""
CELL_SECONDS = 60.0
"""The grain that is learned from."""
FEATURES = 2 * len(FADES_SECONDS) + 8
REACTIVE_DISPERSION = 1.0
_PENALTY = 10.0
_HALF_LIFE_SECONDS = 2 * 86_400.0
"""What was two days ago counts half: how bursts go on changes from week to week."""
_WINDOW = 1.5
"""In lead times: a node that is asked for now is of use from one lead time on."""
_ROUNDS, _STEPS = 3, 6


@dataclasses.dataclass(frozen=True, slots=True)
class Rhythm:
    """Rises and falls of demand up to `at`, each sum fading with one of FADES_SECONDS."""

    at: float
    rises: tuple[float, ...] = (0.0,) * len(FADES_SECONDS)
    falls: tuple[float, ...] = (0.0,) * len(FADES_SECONDS)

    def after(self, at: float, rises: float, falls: float, unseen_rate: float = 0.0) -> Rhythm:
        """At a later moment, with what came since; an earlier moment fades nothing. `unseen_rate` is how many
        requests a second are thought to have come, where nobody looked."""
        fade = [math.exp(-max(0.0, at - self.at) / seconds) for seconds in FADES_SECONDS]
        came = [
            rises + unseen_rate * seconds * (1.0 - factor)
            for seconds, factor in zip(FADES_SECONDS, fade, strict=True)
        ]
        return Rhythm(
            at,
            tuple(each * factor + new for each, factor, new in zip(self.rises, fade, came, strict=True)),
            tuple(each * factor + falls for each, factor in zip(self.falls, fade, strict=True)),
        )


def rhythms(grid: Grid) -> tuple[Floats, Floats]:
    """The rhythm at the end of every cell: rises and falls, each (cells, fades)."""
    fade = np.exp(-grid.cell_seconds / np.array(FADES_SECONDS))
    fade = np.concatenate([fade, fade])
    new = np.repeat(np.column_stack([grid.rises, grid.falls]), len(FADES_SECONDS), axis=1)
    sums = np.empty_like(new)
    now = np.zeros(2 * len(FADES_SECONDS))
    for cell in range(len(new)):
        now = now * fade + new[cell]
        sums[cell] = now
    return sums[:, : len(FADES_SECONDS)], sums[:, len(FADES_SECONDS) :]


@dataclasses.dataclass(frozen=True, slots=True)
class Outline:
    """A forecast path: mean levels of steps, the first from `begin` on. Outside of it nothing is said."""

    begin: float
    step_seconds: float
    levels: tuple[float, ...]

    def turns(self, at: Floats, lead_seconds: float) -> tuple[Floats, Floats]:
        """By how much the level is to rise, and to fall, from one lead time before to three after."""
        if len(self.levels) < 2:
            return np.zeros(len(at)), np.zeros(len(at))
        middles = self.begin + (np.arange(len(self.levels)) + 0.5) * self.step_seconds
        change = np.interp(at + 3 * lead_seconds, middles, self.levels) - np.interp(
            at - lead_seconds, middles, self.levels
        )
        return np.maximum(change, 0.0), np.maximum(-change, 0.0)


NOTHING_SAID = Outline(0.0, 1.0, ())


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """What was learned: requests within `window_seconds` have mean `exp(weights . features)`, never more than
    `most`, and variance `mean + mean**2 / dispersion`."""

    lead_seconds: float
    window_seconds: float
    weights: tuple[float, ...]
    dispersion: float
    most: float

    def rates(self, features: Floats) -> Floats:
        """Expected requests a second, for each row."""
        exponent = np.clip(features @ np.array(self.weights), -20.0, math.log(self.most))
        return np.asarray(np.exp(exponent) / self.window_seconds, float)


def features(rises: Floats, falls: Floats, level: Floats, turns: tuple[Floats, Floats]) -> Floats:
    """One row for each moment: of the fading sums (rows, fades), the level, the forecast's rise and fall."""
    up, down = np.log1p(rises), np.log1p(falls)
    return np.column_stack(
        [
            np.ones(len(level)),
            up,
            down,
            np.log1p(level),
            np.log1p(turns[0]),
            np.log1p(turns[1]),
            up[:, :2] * down[:, :2],
            up[:, 1] ** 2,
            down[:, 1] ** 2,
        ]
    )


def fit(grid: Grid, outline: Outline, lead_seconds: float) -> Fit | None:
    """Learn from a record's cells; None if there is too little to learn from. `outline` must have been made
    without knowing the cells that it is about."""
    ahead = max(1, round(_WINDOW * lead_seconds / grid.cell_seconds))
    count = len(grid.level) - ahead
    if count < 10 * ahead:
        return None
    rows = _usable(grid.known, ahead)
    sums = np.concatenate([[0.0], np.cumsum(grid.rises)])
    came = (sums[1 + ahead :] - sums[1:-ahead])[rows]
    if len(came) < 10 * ahead or came.sum() < 10:
        return None
    rises, falls = rhythms(grid)
    ends: Floats = grid.begin + np.arange(1, count + 1, dtype=np.float64) * grid.cell_seconds
    level = np.nan_to_num(grid.level[:count])
    known = features(rises[:count], falls[:count], level, outline.turns(ends, lead_seconds))[rows]
    age = (grid.end - ends)[rows]
    weights, dispersion = _scored(known, came, 0.5 ** (age / _HALF_LIFE_SECONDS))
    window_seconds = ahead * grid.cell_seconds
    return Fit(lead_seconds, window_seconds, tuple(weights.tolist()), dispersion, 4.0 * (1.0 + came.max()))


def _usable(known: Bools, ahead: int) -> Bools:
    """Cells that are known together with the `ahead` cells after them."""
    unknown = np.concatenate([[0], np.cumsum(~known)])
    return np.asarray(unknown[1 + ahead :] - unknown[: len(known) - ahead] == 0)


def _scored(rows: Floats, came: Floats, counts: Floats) -> tuple[Floats, float]:
    """Weights and dispersion of the negative binomial, each row counting so much."""
    weights = np.zeros(rows.shape[1])
    weights[0] = math.log(float(np.average(came, weights=counts)) + 1e-6)
    penalty = np.full(rows.shape[1], _PENALTY)
    penalty[0] = 0.0
    dispersion = 1.0
    ceiling = math.log(4.0 * (1.0 + came.max()))
    for _ in range(_ROUNDS):
        for _ in range(_STEPS):
            mean = np.exp(np.clip(rows @ weights, -20.0, ceiling))
            part = counts * dispersion / (dispersion + mean)
            slope = rows.T @ ((came - mean) * part) - penalty * weights
            curve = (rows * (mean * part)[:, None]).T @ rows + np.diag(penalty + 1e-9)
            step = np.linalg.solve(curve, slope)
            weights = weights + step / max(1.0, float(np.abs(step).max()))
        mean = np.exp(np.clip(rows @ weights, -20.0, ceiling))
        spread = float((counts * ((came - mean) ** 2 - mean)).sum())
        squares = float((counts * mean**2).sum())
        dispersion = min(100.0, max(0.05, squares / spread)) if spread > 0 else 100.0
    return weights, dispersion


def reactive(rhythm: Rhythm) -> float:
    """Expected requests a second, if what came lately goes on: the fastest of the slower sums. The fastest of
    all would make a trend of one request."""
    return max(each / seconds for each, seconds in zip(rhythm.rises[1:], FADES_SECONDS[1:], strict=True))
