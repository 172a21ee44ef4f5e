"""A torn data file costs its own figures, not the run."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torncoverage import remove_torn


def _coverage(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Not as a part of the run that measures us.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    command = (sys.executable, "-m", "coverage", *arguments)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def measured(tmp_path: Path) -> list[Path]:
    """Data files of three processes."""
    (tmp_path / "program.py").write_text("print(1)\n")
    for _ in range(3):
        assert _coverage("run", "-p", "program.py", cwd=tmp_path).returncode == 0
    return sorted(tmp_path.glob(".coverage.*"))


def _lose_paths(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("update file set path = null")
        connection.commit()


def test_what_cannot_be_combined_goes_and_the_rest_is_reported(tmp_path: Path, measured: list[Path]) -> None:
    _lose_paths(measured[0])
    os.truncate(measured[1], 4096)

    assert remove_torn(tmp_path) == measured[:2]

    combined = _coverage("combine", "-q", cwd=tmp_path)
    assert combined.returncode == 0, combined.stdout + combined.stderr
    assert "program.py" in _coverage("report", cwd=tmp_path).stdout


def test_a_file_without_paths_is_what_combine_fails_at(tmp_path: Path, measured: list[Path]) -> None:
    """If coverage learns to pass by such files, torncoverage.py can go."""
    _lose_paths(measured[0])
    assert _coverage("combine", "-q", cwd=tmp_path).returncode != 0
