"""`glowplug top` and the agent's part of `glowplug status`, on an agent's real socket."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich import console

from glowplug.verbs import top
from tests.agent import outside_world
from tests.agent.outside_world import REFERENCE, event


def _glowplug(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from glowplug import cli; cli.main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_without_an_agent(tmp_path: Path) -> None:
    result = _glowplug("top", "--once", "--state", str(tmp_path))
    assert result.returncode == 7
    assert result.stdout == ""
    assert "glowplug agent run" in result.stderr


def test_one_frame_and_the_status_of_a_running_agent(tmp_path: Path) -> None:
    server = outside_world.DeviceServer(tmp_path)
    with outside_world.running(tmp_path) as world:
        world.outside.observer.pulled(REFERENCE, lazy=True, seconds=0.2, layers=3)
        world.outside.observer.event("quarantined", "[red]no[/] \x1b[2Jmarkup", level="warning")
        frame = _glowplug("top", "--once", "--state", str(tmp_path))
        assert frame.returncode == 0, frame.stderr
        for part in (REFERENCE, "3 GiB of 20 GiB", "2 demand, 5 read_ahead", "[red]no[/]", "from peers"):
            assert part in frame.stdout
        assert "\x1b" not in frame.stdout
        document = json.loads(_glowplug("status", "--json", "--state", str(tmp_path)).stdout)
        assert document["agent"]["images"][0]["reference"] == REFERENCE
        assert "server" not in document["agent"]
        text = _glowplug("status", "--state", str(tmp_path)).stdout
        assert "agent      pid" in text
        assert f"{REFERENCE}  3 layers, 150 MiB compressed" in text
    server.close()
    gone = _glowplug("status", "--state", str(tmp_path))
    assert "no agent listens" in gone.stdout + gone.stderr


def _sample(at: float, fetched: int, **status: Any) -> top.Sample:
    document = {
        "version": "1", "node": "n", "pid": 1, "up_seconds": 5.0, "not_ready": {},
        "server": outside_world.server_status(fetched_bytes=fetched),
        "replaced": {"server": 0, "worker": 0, "keeper": 0}, "misses": {"start": 0, "running": 0},
        "mounts": [], "snapshots": {"active": 1}, "quarantined": [], "images": [], **status,
    }  # fmt: skip
    return top.Sample(document, [], [], at, 1000.0)


def _drawn(frame: Any, columns: int = 110) -> str:
    out = io.StringIO()
    console.Console(file=out, width=columns).print(frame)
    return out.getvalue()


def test_rates_are_of_the_time_between_two_looks() -> None:
    before, now = _sample(10.0, 1 << 20), _sample(12.0, 5 << 20)
    assert "5 MiB  2 MiB/s" in _drawn(top.frame(now, before, 110, None))
    replaced = _sample(14.0, 0)
    assert "0 B  0 B/s" in _drawn(top.frame(replaced, now, 110, None))


def test_a_dead_device_server_and_a_small_screen() -> None:
    dead = _sample(1.0, 0, server=None, not_ready={"device server": "it does not answer"})
    text = _drawn(top.frame(dead, _sample(0.0, 5), 110, None))
    assert "not ready" in text
    assert "it does not answer" in text
    assert len(_drawn(top.frame(_sample(1.0, 0), None, 80, 24), 80).splitlines()) <= 24


@pytest.mark.parametrize("rows", [24, 50, None])
def test_starts_show_their_phases(tmp_path: Path, rows: int | None) -> None:
    with outside_world.running(tmp_path) as world:
        seen = world.outside.observer
        seen.phase(REFERENCE, "lookup", 0.2)
        seen.phase(REFERENCE, "mount", 0.1)
        now = time.monotonic()
        world.outside._starts.absorb([event(1, now + 1, now + 1.5)])
        status, began = _sample(0.0, 0), world.outside._starts.to_json()
        text = _drawn(top.frame(status._replace(starts=began), None, 110, rows))
    assert REFERENCE in text
    assert "█" in text


def test_live_it_outlives_the_agent_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    code = "from glowplug import cli; cli.main()"
    command = [sys.executable, "-c", code, "top", "--interval", "0.2", "--state", str(tmp_path)]
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 65536)
        seen = seen.partition(text)[2]

    with outside_world.running(tmp_path):
        # A session of its own, with the terminal as its own: else Ctrl-C would be a character.
        process = subprocess.Popen(
            [sys.executable, "-c", _IN_TERMINAL, *command], stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        until(REFERENCE.encode())
    until(b"no agent listens")
    with outside_world.running(tmp_path):
        until(b"glowplug")
        os.write(ours, b"\x03")
        with contextlib.suppress(OSError):  # the terminal is gone with its last process
            while os.read(ours, 65536):
                pass
        assert process.wait(60) == 0
    os.close(ours)


_IN_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
