"""Replicas as processes of this machine: the fleet's launcher that needs nothing but the engine.

A replica is a session of its own, so that Ctrl-C in the server's terminal does not reach it and all that it
started can be ended together; it goes on when the server is killed. Its handle is `PID:STARTED`, the start
time in the kernel's ticks, so that another process that got the same number is never taken for it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from serving import endpoint, errors
from serving.endpoint import Endpoint
from serving.providers import enginecommand
from serving.providers.record import Record

GLOWPLUG = (sys.executable, "-c", "from glowplug.cli import main; main()")
"""The command, of this very installation."""
_GATE = ("sh", "-c", 'read -r _ && exec "$@" </dev/null', "sh")
"""Becomes the program once it is told to; ends when whoever would have told it ends."""
_STAT_STATE, _STAT_SESSION, _STAT_STARTED = 0, 3, 19
"""Fields of /proc/PID/stat, counted from behind the command's name."""


class ProcessLauncher:
    """See the module; one thread. `cache`: what engines keep from one start for the next."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def check(self, wanted: Endpoint) -> None:
        """See fleet.Launcher."""
        engine = wanted.engine
        match engine:
            case endpoint.CommandEngine():
                require_program("engine.command", engine.command[0])
            case endpoint.VllmEngine():
                require_program("engine.python", engine.python)
        require_model(wanted)

    def start(self, record: Record, wanted: Endpoint, folder: Path, known: Callable[[str], None]) -> None:
        """See fleet.Launcher."""
        settings = folder / enginecommand.SETTINGS
        settings.write_text(
            enginecommand.settings(
                wanted,
                address=record.address[0],
                port=record.address[1],
                limit=record.limit,
                folder=folder,
                cache=self._cache,
            )
        )
        settings.chmod(0o600)  # the engine's environment may hold secrets
        try:
            with (folder / enginecommand.LOG).open("ab") as log:
                child = subprocess.Popen(
                    [*_GATE, *GLOWPLUG, "engine", "--config", str(settings)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as exc:
            raise errors.ConfigurationError(f"the engine cannot be started: {exc}") from exc
        self._children[child.pid] = child
        known(f"{child.pid}:{_started(child.pid)}")
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that is gone already has `ended`
            child.stdin.write(b"\n")

    def ended(self, record: Record) -> str | None:
        """See fleet.Launcher."""
        if not record.handle:
            return "the server ended while it was starting it"
        pid, _, started = record.handle.partition(":")
        child = self._children.get(int(pid))
        if child is not None:
            code = child.poll()
            if code is None:
                return None
            return f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        return None if _started(int(pid)) == started else "ended while no server watched it"

    def stop(self, record: Record) -> None:
        """See fleet.Launcher."""
        self._signal(record, signal.SIGTERM, whole=False)

    def kill(self, record: Record) -> None:
        """See fleet.Launcher."""
        self._signal(record, signal.SIGKILL, whole=True)

    def close(self) -> None:
        """See fleet.Launcher."""

    def _signal(self, record: Record, number: signal.Signals, *, whole: bool) -> None:
        """To the process, or to all of its session; to nobody who came by its number later."""
        if not record.handle:
            return
        pid, _, started = record.handle.partition(":")
        now = _started(int(pid))
        targets = [int(pid)] if now == started else []
        if whole and now in (started, None):
            # A leader that is gone keeps its number for as long as there are members.
            targets += [each for each in _session(int(pid)) if each not in targets]
        for target in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, number)
        child = self._children.get(int(pid))
        if child is not None and child.poll() is not None:
            del self._children[int(pid)]


def require_program(key: str, program: str) -> None:
    """DocumentError where there is no such program."""
    if shutil.which(program) is None:
        raise errors.DocumentError(
            f"{key}: {program!r} is no program on this machine; install it or name its path"
        )


def require_model(wanted: Endpoint) -> None:
    """DocumentError where the model is a directory that is not there."""
    local = wanted.model is not None and "://" not in wanted.model and not wanted.model.startswith("oci:")
    if local and not Path(str(wanted.model)).exists():
        raise errors.DocumentError(
            f"model: {wanted.model} does not exist on this machine; name a directory that does"
        )


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
    for each in os.listdir("/proc"):
        if each.isdigit():
            fields = _stat(int(each))
            if (
                fields is not None
                and fields[_STAT_SESSION] == str(leader)
                and fields[_STAT_STATE] not in "ZX"
            ):
                found.append(int(each))
    return found
