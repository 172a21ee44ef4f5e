"""Replicas as processes: what is found again by its handle, and what is never taken for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from serving import endpoint
from serving.providers.process import ProcessLauncher
from serving.providers.record import Record
from tests.serving.served import document

WANTED = endpoint.load(yaml.safe_dump(document()), "e")


def _record(handle: str = "") -> Record:
    return Record("r", "v", ("127.0.0.1", 1), 0.0, handle=handle, limit=1)


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_killed_before_it_knew_the_handle_leaves_no_process(tmp_path: Path) -> None:
    launcher = ProcessLauncher(tmp_path)

    class Killed(BaseException):
        pass

    seen = []

    def known(handle: str) -> None:
        seen.append(int(handle.partition(":")[0]))
        raise Killed

    with pytest.raises(Killed):
        launcher.start(_record(), WANTED, tmp_path, known)
    child = launcher._sessions._children[seen[0]]
    assert child.stdin is not None
    child.stdin.close()  # as the kernel does for a process that is killed
    assert child.wait(30) != 0
    assert (tmp_path / "log").read_bytes() == b"", "the engine had begun"


def test_a_handle_is_good_for_another_launcher_and_the_whole_session_ends(tmp_path: Path) -> None:
    first, second = ProcessLauncher(tmp_path), ProcessLauncher(tmp_path)
    handles: list[str] = []
    first.start(_record(), WANTED, tmp_path, handles.append)
    record = _record(handles[0])
    assert second.ended(record) is None
    _until((tmp_path / "engine.sock").exists)  # the supervisor is up; its engine is a process of its own
    second.kill(record)
    _until(lambda: first.ended(record) is not None)
    assert first.ended(record) == "was killed by SIGKILL"
    assert second.ended(record) == "ended while no server watched it"
    leader = int(handles[0].partition(":")[0])
    _until(lambda: not _session(leader))


def test_somebody_else_with_the_same_pid_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        record = _record(f"{stranger.pid}:1")
        launcher = ProcessLauncher(tmp_path)
        assert launcher.ended(record) is not None
        launcher.stop(record)
        launcher.kill(record)
        assert stranger.poll() is None
    finally:
        stranger.send_signal(signal.SIGKILL)
        stranger.wait()


def _session(leader: int) -> list[str]:
    return [
        each
        for each in os.listdir("/proc")
        if each.isdigit() and Path(f"/proc/{each}").exists() and _is_in(each, leader)
    ]


def _is_in(pid: str, leader: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[3] == str(leader) and fields[0] not in "ZX"
