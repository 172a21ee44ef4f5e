"""Removes what `coverage combine` cannot take in: data files of processes that were killed while they wrote.

`make test` runs it before `coverage combine`. The fault tests end servers and agents with SIGKILL, and
coverage writes its SQLite files without a journal, so now and then one is torn. `combine` passes by a file
that it cannot open, but not by one that opens and holds nonsense: it fails, and with it a run whose every
test passed. So each file is combined alone first, into memory; what fails is named and removed, and the
rest is reported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import coverage


def remove_torn(directory: Path) -> list[Path]:
    """The data files in `directory` that could not be combined, which are gone now."""
    torn = []
    for path in sorted(directory.glob(".coverage.*")):
        if not _combines(path):
            path.unlink()
            torn.append(path)
    return torn


def _combines(path: Path) -> bool:
    try:
        one = coverage.CoverageData(str(path))
        one.read()
        coverage.CoverageData(no_disk=True).update(one, map_path=str.strip)
    except Exception:  # whatever a torn file makes of coverage, `combine` would end with it
        return False
    return True


if __name__ == "__main__":
    for torn in remove_torn(Path.cwd()):
        print(
            f"coverage: {torn.name} was being written when its process was killed; left out", file=sys.stderr
        )
