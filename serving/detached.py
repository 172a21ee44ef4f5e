"""Programs that outlive whoever starts them: each the leader of a session of its own, known by a handle.

Used by launchers (replicas) and by the server (its activator), by one thread each. A handle is `PID:STARTED`,
the start time in the kernel's ticks, so that another process that got the same number is never taken for it.

The handle stands in the program's environment, and so in that of whatever it starts: an engine is a session
of its own, its workers hold the accelerator's memory, and when both their parents were killed it is all by
which they are found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from serving import errors

GLOWPLUG = (sys.executable, "-c", "from glowplug.cli import main; main()")
"""The command, of this very installation."""
MARK = "GLOWPLUG_SESSION"
_GATE = ("sh", "-c", f'read -r {MARK} && export {MARK} && exec "$@" </dev/null', "sh")
"""Becomes the program once it is told its handle; ends when whoever would have told it ends."""
_STAT_STATE, _STAT_SESSION, _STAT_STARTED = 0, 3, 19
"""Fields of /proc/PID/stat, counted from behind the command's name."""


class Sessions:
    """See the module."""

    def __init__(self) -> None:
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, command: Sequence[str], log: Path, known: Callable[[str], None]) -> None:
        """Start it, its output at the end of `log`. `known` gets the handle before the program begins.
        ConfigurationError."""
        try:
            with log.open("ab") as output:
                child = subprocess.Popen(
                    [*_GATE, *command],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as exc:
            raise errors.ConfigurationError(f"{command[0]} cannot be started: {exc}") from exc
        self._children[child.pid] = child
        handle = f"{child.pid}:{_started(child.pid)}"
        known(handle)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that is gone already has `ended`
            child.stdin.write(f"{handle}\n".encode())

    def ended(self, handle: str) -> str | None:
        """Why it is no more; None while it is."""
        if not handle:
            return "the server ended while it was starting it"
        pid, _, started = handle.partition(":")
        child = self._children.get(int(pid))
        if child is not None:
            code = child.poll()
            if code is None:
                return None
            return f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        return None if _started(int(pid)) == started else "ended while no server watched it"

    def tell(self, handle: str, number: signal.Signals) -> None:
        """A signal to the program; to nobody who came by its number later."""
        self._signal(handle, number, whole=False)

    def kill(self, handle: str) -> None:
        """End the program, all of its session, and whatever any of them started."""
        self._signal(handle, signal.SIGKILL, whole=True)

    def _signal(self, handle: str, number: signal.Signals, *, whole: bool) -> None:
        if not handle:
            return
        pid, _, started = handle.partition(":")
        now = _started(int(pid))
        targets = [int(pid)] if now == started else []
        if whole and now in (started, None):
            # A leader that is gone keeps its number for as long as there are members.
            targets += [each for each in _session(int(pid)) if each not in targets]
        if whole:
            targets += [each for each in _marked(handle) if each not in targets]
        for target in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, number)
        child = self._children.get(int(pid))
        if child is not None and child.poll() is not None:
            del self._children[int(pid)]


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _started(pid: int) -> str | None:
    """When a living process began; None for one that is gone or only waits to be reaped."""
    fields = _stat(pid)
    return None if fields is None or fields[_STAT_STATE] in "ZX" else fields[_STAT_STARTED]


def _session(leader: int) -> list[int]:
    """The processes of a session. Its number cannot be another's while any of them lives."""
    found = []
    for each in filter(str.isdigit, os.listdir("/proc")):
        fields = _stat(int(each))
        if fields is not None and fields[_STAT_SESSION] == str(leader) and fields[_STAT_STATE] not in "ZX":
            found.append(int(each))
    return found


def _marked(handle: str) -> list[int]:
    """The processes with that handle in their environment."""
    found, mark = [], f"{MARK}={handle}".encode()
    for each in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # gone, or somebody else's
            if mark in Path(f"/proc/{each}/environ").read_bytes().split(b"\0"):
                found.append(int(each))
    return found
