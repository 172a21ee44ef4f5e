"""What an engine uses of its machine: processor time and memory, of its process tree or of its control group.

Read by the supervisor when its status is asked for, about once a second, on its event loop; so it opens a few
files a process and never walks all of /proc. A process that ended took its time out of the tree's, therefore
the sum can fall: whoever makes a rate of it must know. Specs: proc(5), the kernel's cgroup-v1 and cgroup-v2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MOST_PROCESSES = 256
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Processor seconds of the processes that run, and what they have in memory (pages that they share count
    for each)."""

    cpu_seconds: float
    memory_bytes: int


def of_tree(pid: int) -> Usage:
    """A process and all that it started, as far as they still run."""
    cpu_ticks = pages = 0
    waiting, seen = [pid], set[int]()
    while waiting and len(seen) < _MOST_PROCESSES:
        each = waiting.pop()
        if each in seen:
            continue
        seen.add(each)
        folder = _PROC / str(each)
        with contextlib.suppress(OSError, ValueError, IndexError):  # it ended meanwhile
            fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            cpu_ticks += int(fields[11]) + int(fields[12])
            pages += int((folder / "statm").read_text().split()[1])
            for thread in os.scandir(folder / "task"):
                children = Path(thread.path, "children").read_text()
                waiting += [int(child) for child in children.split()]
    return Usage(cpu_ticks / _TICKS, pages * _PAGE_BYTES)


def of_cgroup(path: str, root: Path = _CGROUPS) -> Usage | None:
    """A control group, by its path from the root of its hierarchy; None where there is none such."""
    name = path.lstrip("/")
    try:
        if (root / name / "cpu.stat").exists():
            stat = (root / name / "cpu.stat").read_text().split()
            microseconds = int(stat[stat.index("usage_usec") + 1])
            return Usage(microseconds / 1e6, int((root / name / "memory.current").read_text()))
        nanoseconds = int((root / "cpuacct" / name / "cpuacct.usage").read_text())
        memory_bytes = int((root / "memory" / name / "memory.usage_in_bytes").read_text())
        return Usage(nanoseconds / 1e9, memory_bytes)
    except (OSError, ValueError):
        return None


def machine_memory_bytes() -> int:
    """What the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES
