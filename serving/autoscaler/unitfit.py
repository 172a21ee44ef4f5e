"""The coefficients of model units, from what a full engine did. Pure.

Called by `glowplug engine calibrate` (`serving.stress.calibration` measures). A `Point` is one kind of
request, offered in a closed loop until the replica was full: if it answered n of them a second, each cost 1/n
seconds of the replica. The coefficients are the non-negative ones whose *relative* error over the points is
least in squares, so that a cheap request counts as much as a dear one.

How good they are is judged on points that were held out: each in turn is predicted by coefficients that were
fitted to the others (`mape_percent`, `r_squared`). A fit whose own points look well and whose held-out ones
do not has too few kinds of request.

With four coefficients, all sets of those that may be above 0 are tried: the least squares of the best set
that comes out non-negative is the solution, and no iteration has to end.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from serving import errors
from serving.autoscaler import units
from serving.autoscaler.units import Coefficients

LEAST_POINTS = 5
"""One more than there are coefficients: without one to spare, nothing can be held out."""
_LEAST_TOKENS = 1e-9
"""Of a mean that is not 0: less is no count, and a number to divide by that has no digits left."""
_RIDGE = 1e-12
"""Of the diagonal: columns that depend on one another share their weight, not cancel."""
_FIELDS = ("request", "input", "cached", "output")


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """Means over the requests of one kind; `seconds` of a replica each."""

    input_tokens: float
    cached_tokens: float
    output_tokens: float
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """Errors are of points that were held out, but for `own_mape_percent`."""

    coefficients: Coefficients
    mape_percent: float
    worst_percent: float
    r_squared: float
    own_mape_percent: float


def fit(points: Sequence[Point]) -> Fit:
    """DocumentError where the points cannot say it."""
    if len(points) < LEAST_POINTS:
        raise errors.DocumentError(
            f"{len(points)} kinds of request were measured, and at least {LEAST_POINTS} are needed; "
            "name more lengths, or give each more time"
        )
    for each in points:
        numbers = dataclasses.astuple(each)
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or each.seconds <= 0:
            raise errors.DocumentError(f"no cost can be fitted to {each}")
        if any(0 < number < _LEAST_TOKENS for number in numbers[:3]):
            raise errors.DocumentError(f"{each} is no mean of counts")
    found = _solve(points)
    predicted = [_cost(_solve([*points[:at], *points[at + 1 :]]), point) for at, point in enumerate(points)]
    off = [abs(guess / point.seconds - 1.0) for guess, point in zip(predicted, points, strict=True)]
    own = [abs(_cost(found, point) / point.seconds - 1.0) for point in points]
    mean = math.fsum(point.seconds for point in points) / len(points)
    left = math.fsum((guess - point.seconds) ** 2 for guess, point in zip(predicted, points, strict=True))
    spread = math.fsum((point.seconds - mean) ** 2 for point in points)
    return Fit(
        found,
        100.0 * math.fsum(off) / len(off),
        100.0 * max(off),
        1.0 - left / spread if spread > 0 else 0.0,
        100.0 * math.fsum(own) / len(own),
    )


def _cost(by: Coefficients, point: Point) -> float:
    return units.cost(by, point.input_tokens, point.output_tokens, point.cached_tokens)


def _solve(points: Sequence[Point]) -> Coefficients:
    rows = [
        [
            value / point.seconds
            for value in (
                1.0,
                max(0.0, point.input_tokens - point.cached_tokens),
                point.cached_tokens,
                point.output_tokens,
            )
        ]
        for point in points
    ]
    scales = [max(row[column] for row in rows) or 1.0 for column in range(4)]
    scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    best, least = [0.0] * 4, math.inf
    for columns in _sets(scaled):
        weights = _least_squares(scaled, columns)
        if weights is None or min(weights) < 0:
            continue
        full = [0.0] * 4
        for column, weight in zip(columns, weights, strict=True):
            full[column] = weight
        error = math.fsum(
            (math.fsum(a * b for a, b in zip(row, full, strict=True)) - 1.0) ** 2 for row in scaled
        )
        if error < least:
            best, least = full, error
    values = {name: best[at] / scales[at] for at, name in enumerate(_FIELDS)}
    return Coefficients(**values)


def _sets(rows: Sequence[Sequence[float]]) -> Iterator[tuple[int, ...]]:
    """Of columns in which there is something."""
    there = [column for column in range(4) if any(row[column] > 0 for row in rows)]
    for size in range(1, len(there) + 1):
        yield from itertools.combinations(there, size)


def _least_squares(rows: Sequence[Sequence[float]], columns: Sequence[int]) -> list[float] | None:
    """Weights of these columns whose sum is nearest to 1 in every row; None where there are none."""
    matrix = [
        [
            math.fsum(row[one] * row[other] for row in rows) * (1.0 + _RIDGE * (one == other))
            for other in columns
        ]
        + [math.fsum(row[one] for row in rows)]
        for one in columns
    ]
    size = len(columns)
    for at in range(size):
        column = [abs(row[at]) for row in matrix]
        pivot = max(range(at, size), key=column.__getitem__)
        if matrix[pivot][at] == 0:
            return None
        matrix[at], matrix[pivot] = matrix[pivot], matrix[at]
        for row in range(size):
            if row != at:
                factor = matrix[row][at] / matrix[at][at]
                matrix[row] = [a - factor * b for a, b in zip(matrix[row], matrix[at], strict=True)]
    return [matrix[at][size] / matrix[at][at] for at in range(size)]
