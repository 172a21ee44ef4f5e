"""`warmpool.demand_files`: CSV and Parquet in, a series or an error that says where."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from warmpool import demand_files, errors


def _read(path: Path, **more: str) -> demand_files.Series:
    return demand_files.read(path, more.get("time"), more.get("value"), zeros_are_gaps=True)


def test_rows_that_lack_and_zeros_are_gaps(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"start_s,rate\n0,5\n600,0\n1800,7\n2400,\n"))
    series = _read(path)
    assert series.step_seconds == 600
    assert np.array_equal(series.values, [5, np.nan, np.nan, 7, np.nan], equal_nan=True)
    zeros = demand_files.read(path, None, None, zeros_are_gaps=False)
    assert zeros.values[1] == 0


def test_parquet_with_dates(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    times = pd.date_range("2026-01-01", periods=3, freq="1min", tz="UTC")
    pd.DataFrame({"when": times, "n": [1, 2, 3]}).to_parquet(path)
    series = _read(path, time="when", value="n")
    assert (series.begin, series.step_seconds) == (times[0].timestamp(), 60.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "which column has the times"),
        ("start_s,b\n0,2\n", "name one with --column"),
        ("start_s,rate\n0,1\n0,2\n", "data row 2"),
        ("start_s,rate\n0,1\n600,many\n", "data row 2: 'many' is no number"),
        ("start_s,rate\n0,1\n600,-4\n", "is negative"),
        ("start_s,rate\n0,1\n600,2\n1000,3\n", "whole number of steps"),
        ("time,rate\nsoon,1\nlater,2\n", "neither seconds nor ISO 8601"),
        ("start_s,rate\n0,1\n1,1\n9000000000,2\n", "hardly any of them"),
        ("start_s,rate\n", "two at least"),
        ("", "neither CSV"),
    ],
)
def test_errors_say_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(errors.InvalidInputError, match=says):
        _read(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError):
        _read(tmp_path / "none.csv")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.binary(max_size=120), st.sampled_from(["t.csv", "t.csv.gz", "t.parquet"]))
def test_any_bytes_are_a_series_or_an_error_of_ours(tmp_path: Path, data: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"start_s,rate\n" + data if name == "t.csv" else data)
    try:
        series = _read(path)
    except errors.InvalidInputError:
        return
    assert len(series.values) >= 2
