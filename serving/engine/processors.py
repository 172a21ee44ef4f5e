"""How many processors this process may really use: what its cgroup's quota and its affinity leave.

`os.cpu_count` is the host's, also in a container with two of 128: libraries that size their thread pools by
it spend their time switching. Read once, when an engine is planned.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path

_PROC_CGROUP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def available(proc_cgroup: Path = _PROC_CGROUP, root: Path = _ROOT) -> int:
    """At least 1. A quota of 1.5 is 1: a second thread would be throttled for half of its time."""
    quotas = [len(os.sched_getaffinity(0)), *_quotas(proc_cgroup, root)]
    return max(1, math.floor(min(quotas)))


def _quotas(proc_cgroup: Path, root: Path) -> list[float]:
    """The quotas of this cgroup and of all above it: the narrowest counts."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in proc_cgroup.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                found += _upwards(root, path, version_2)
            elif "cpu" in controllers.split(","):
                found += _upwards(root / "cpu", path, version_1)
    return found


def _upwards(root: Path, path: str, read: Callable[[Path], float | None]) -> list[float]:
    below = root / path.strip("/")
    folders = [each for each in (below, *below.parents) if each == root or root in each.parents]
    # In a container with a cgroup namespace of its own the path is not below the mount: the root is ours.
    return [quota for each in {root, *folders} if (quota := read(each)) is not None]


def version_2(folder: Path) -> float | None:
    """`cpu.max`: quota and period, or the word max."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def version_1(folder: Path) -> float | None:
    """`cpu.cfs_quota_us`, -1 for none, over its period."""
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
