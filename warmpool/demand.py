"""Demand for nodes over time: what is remembered of it, and what models are made from. Pure.

`Record` is a path: how many nodes are wanted, from each change to the next, with gaps where nobody knows.
A gap is not zero, and the jump over a gap is not a request: nobody knows when it came, or whether it is one.
`Grid` is the same path cut into cells of equal length. Cells lie on multiples of their length, whatever the
record begins with, so that a record that grew gives the same cells and some more.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """`wanted[i]` nodes from `at[i]` until `at[i + 1]`, None in a gap; times rise strictly."""

    at: tuple[float, ...] = ()
    wanted: tuple[int | None, ...] = ()

    @property
    def last(self) -> int | None:
        """What is wanted now; None in a gap, or where nothing is known yet."""
        return self.wanted[-1] if self.wanted else None

    def seen(self, at: float, wanted: int | None) -> Record:
        """The record after one more look. A look that is no later than the last change is not kept: the
        clock went back, and time is put in order by forgetting."""
        if self.at and (at <= self.at[-1] or wanted == self.last):
            return self
        return Record((*self.at, at), (*self.wanted, wanted))

    def since(self, begin: float) -> Record:
        """Without what was before, but for the value that was true then."""
        keep = bisect.bisect_right(self.at, begin) - 1
        return self if keep <= 0 else Record(self.at[keep:], self.wanted[keep:])


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """Cells of `cell_seconds`, the first one from `begin` on. `level` is the mean number of nodes wanted in
    the known part of a cell, NaN where none of it is known; `rises` and `falls` count nodes asked for and
    released in it; `known` says that all of it is."""

    begin: float
    cell_seconds: float
    level: Floats
    rises: Floats
    falls: Floats
    known: Bools

    @property
    def end(self) -> float:
        return self.begin + self.cell_seconds * len(self.level)


def grid(record: Record, begin: float, end: float, cell_seconds: float) -> Grid:
    """The whole cells between `begin` and `end`, both cut to multiples of `cell_seconds`, and to where the
    record begins."""
    if record.at:
        begin = max(begin, record.at[0])
    first = math.ceil(begin / cell_seconds)
    count = max(0, math.floor(end / cell_seconds) - first)
    if not record.at:
        count = 0
    edges: Floats = (first + np.arange(count + 1, dtype=np.float64)) * cell_seconds
    at = np.array(record.at, float)
    wanted = np.array([math.nan if each is None else each for each in record.wanted], float)
    level, known = _means(at, wanted, edges)
    change = np.diff(wanted, prepend=math.nan)
    cells = np.searchsorted(edges, at, side="right") - 1
    counted = ~np.isnan(change) & (cells >= 0) & (cells < count)
    rises, falls = np.zeros(count), np.zeros(count)
    np.add.at(rises, cells[counted], np.maximum(change[counted], 0))
    np.add.at(falls, cells[counted], np.maximum(-change[counted], 0))
    return Grid(first * cell_seconds, cell_seconds, level, rises, falls, known)


def _means(at: Floats, wanted: Floats, edges: Floats) -> tuple[Floats, Bools]:
    """The mean of a step function over each cell's known part, and which cells are known as a whole. Both
    integrals (of the value, of being known) are taken at the edges and differenced."""
    if len(edges) < 2:
        return np.zeros(0), np.zeros(0, bool)
    inside = ~np.isnan(wanted)
    value = np.where(inside, wanted, 0.0)
    spans = np.diff(at)
    area = np.concatenate([[0.0], np.cumsum(value[:-1] * spans)])
    time = np.concatenate([[0.0], np.cumsum(inside[:-1] * spans)])
    piece = np.maximum(np.searchsorted(at, edges, side="right") - 1, 0)
    into = edges - at[piece]
    areas = np.diff(area[piece] + value[piece] * into)
    times = np.diff(time[piece] + inside[piece] * into)
    length = edges[1] - edges[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        level = np.where(times > 1e-6 * length, areas / times, math.nan)
    return level, times >= length * (1 - 1e-9)


def filled(level: Floats) -> Floats:
    """Levels for models that know no gaps: the last known value goes on; before the first, that one. Empty
    where nothing is known at all."""
    known = np.flatnonzero(~np.isnan(level))
    if not len(known):
        return np.zeros(0)
    last = np.maximum.accumulate(np.where(np.isnan(level), -1, np.arange(len(level))))
    return level[np.where(last < 0, known[0], last)]


def record_of(times: Sequence[float], wanted: Sequence[int | None]) -> Record:
    """A record from looks in order of time."""
    at: list[float] = []
    kept: list[int | None] = []
    for moment, value in zip(times, wanted, strict=True):
        if not at or (moment > at[-1] and value != kept[-1]):
            at.append(moment)
            kept.append(value)
    return Record(tuple(at), tuple(kept))
