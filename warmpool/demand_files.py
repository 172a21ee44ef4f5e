"""Demand over time from a CSV or Parquet file, for the back-test and for looking at it.

One row a moment: a column of times (numbers in seconds, or dates) and one of values. Rows may lack; empty,
missing and NaN values are gaps, and so are zeros where the caller says so. Errors name file, column and row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from warmpool import errors
from warmpool.demand import Floats

TIME_COLUMNS = ("start_s", "time_seconds", "timestamp", "time")
VALUE_COLUMNS = ("total_rate_rps", "rate_rps", "rate", "nodes", "value")


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """`values[i]` from `begin + i * step_seconds` for one step; NaN in a gap."""

    name: str
    begin: float
    step_seconds: float
    values: Floats


def read(path: Path, time: str | None, value: str | None, *, zeros_are_gaps: bool) -> Series:
    """The series in a file. InvalidInputError."""
    import pandas as pd

    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except FileNotFoundError as exc:
        raise errors.NotFoundError(f"{path}: no such file") from exc
    except (ValueError, OSError) as exc:
        raise errors.InvalidInputError(
            f"{path}: neither CSV with a header nor Parquet ({str(exc).splitlines()[0]})"
        ) from exc
    names = [str(each) for each in frame.columns]
    times = frame[_column(path, names, time, TIME_COLUMNS, "times", "--time-column")]
    column = _column(path, names, value, VALUE_COLUMNS, "values", "--column")
    at = _seconds(path, times)
    values = pd.to_numeric(frame[column], errors="coerce").to_numpy(float, copy=True)
    words = frame[column].notna().to_numpy() & np.isnan(values)
    for wrong, what in (
        (words, "is no number"),
        (values < 0, "is negative"),
        (np.isinf(values), "is infinite"),
    ):
        if wrong.any():
            row = int(np.argmax(wrong))
            raise errors.InvalidInputError(
                f"{path}: column {column}, data row {row + 1}: {frame[column].iloc[row]!r} {what}; "
                "leave a cell empty to say that nobody knows"
            )
    if zeros_are_gaps:
        values[values == 0] = np.nan
    return _even(path, at, values)


def _column(
    path: Path, names: Sequence[str], asked: str | None, usual: Sequence[str], what: str, option: str
) -> str:
    if asked is not None:
        if asked not in names:
            raise errors.InvalidInputError(f"{path}: no column {asked!r}; it has {', '.join(names)}")
        return asked
    found = next((each for each in usual if each in names), None)
    if found is None:
        raise errors.InvalidInputError(
            f"{path}: which column has the {what}? It has {', '.join(names)}; name one with {option}"
        )
    return found


def _seconds(path: Path, column: object) -> Floats:
    import pandas as pd

    assert isinstance(column, pd.Series)
    if pd.api.types.is_numeric_dtype(column):
        at = column.to_numpy(float)
    else:
        try:
            dates = pd.to_datetime(column, utc=True, format="ISO8601")
        except (ValueError, TypeError, OverflowError) as exc:
            raise errors.InvalidInputError(
                f"{path}: column {column.name}: neither seconds nor ISO 8601 ({str(exc).splitlines()[0]})"
            ) from exc
        at = (dates - pd.Timestamp(0, tz="UTC")).dt.total_seconds().to_numpy(float)
    rises = np.diff(at)
    if len(at) < 2 or not np.isfinite(at).all() or (rises <= 0).any():
        row = int(np.argmax(~(rises > 0))) + 2 if len(at) > 1 else len(at)
        raise errors.InvalidInputError(
            f"{path}: column {column.name}: times must rise from row to row, and there must be two at least; "
            f"look at data row {row}"
        )
    return at


def _even(path: Path, at: Floats, values: Floats) -> Series:
    """On even steps of the smallest distance; rows that lack are gaps."""
    step = float(np.diff(at).min())
    places = (at - at[0]) / step
    index = np.rint(places).astype(int)
    if np.abs(places - index).max() > 0.01:
        row = int(np.argmax(np.abs(places - index))) + 1
        raise errors.InvalidInputError(
            f"{path}: data row {row} is not a whole number of steps of {step:g} s from the first; "
            "give one row a step"
        )
    if index[-1] > 100 * len(at) + 1_000:
        raise errors.InvalidInputError(f"{path}: steps of {step:g} s, but hardly any of them has a row")
    even = np.full(int(index[-1]) + 1, np.nan)
    even[index] = values
    return Series(path.name, float(at[0]), step, even)
