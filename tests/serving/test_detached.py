"""Programs that outlive who started them, and their end, to the last process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import detached

_FAMILY = """
import os, subprocess, sys, time
child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child, sys.argv[1]], start_new_session=True)
time.sleep(600)
"""


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _until_written(path: Path) -> int:
    until = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return int(path.read_text())


@pytest.fixture
def family(tmp_path: Path) -> Iterator[tuple[detached.Sessions, str, int]]:
    """A program with a child that has a session of its own, as engines have; its handle, the child's pid."""
    sessions, handles = detached.Sessions(), list[str]()
    command = [sys.executable, "-c", _FAMILY, str(tmp_path / "child")]
    sessions.start(command, tmp_path / "log", handles.append)
    child = _until_written(tmp_path / "child")
    yield sessions, handles[0], child
    for pid in (int(handles[0].partition(":")[0]), child):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("killed_before", [False, True])
def test_what_a_program_started_ends_with_it(
    family: tuple[detached.Sessions, str, int], killed_before: bool
) -> None:
    """Whoever is killed from outside, as for want of memory, leaves its children to us."""
    sessions, handle, child = family
    if killed_before:
        os.kill(int(handle.partition(":")[0]), signal.SIGKILL)
        until = time.monotonic() + 30
        while sessions.ended(handle) is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert _alive(child)
    detached.Sessions().kill(handle)
    until = time.monotonic() + 30
    while _alive(child):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_others_stay(family: tuple[detached.Sessions, str, int]) -> None:
    sessions, handle, child = family
    pid, _, started = handle.partition(":")
    sessions.kill(f"{pid}:{int(started) + 1}")
    assert sessions.ended(handle) is None
    assert _alive(child)
