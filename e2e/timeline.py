"""The time line of one start: from the command, over mounted and first output, to ready.

`Clock` is started with the start; `follow` reads a program's output and marks what its lines say. Times are
seconds since the clock was made, by the monotonic clock.
"""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

from e2e import workloads
from glowplug.startup import machine

MOUNTED = "mounted"
FIRST_OUTPUT = "first output"
READY = "ready"
_WATCH_SECONDS = 0.005
MARKS = (MOUNTED, FIRST_OUTPUT, READY)


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """A start, measured. `began_ns` is on the monotonic clock, `seconds` by mark, since then."""

    began_ns: int
    seconds: dict[str, float]
    moved_bytes: int

    @property
    def ready_seconds(self) -> float:
        """Seconds from the command to ready."""
        return self.seconds[READY]


class Clock:
    """Marks the time line of one start, and counts the bytes that the link moved meanwhile."""

    def __init__(self, received_bytes: Callable[[], int]) -> None:
        self._received_bytes = received_bytes
        self._before_bytes = received_bytes()
        self._seconds: dict[str, float] = {}
        self._moved_bytes = 0
        self._began_ns = time.monotonic_ns()

    def mark(self, name: str) -> None:
        """It is so far now; the first time counts."""
        self._seconds.setdefault(name, (time.monotonic_ns() - self._began_ns) / 1e9)
        if name == READY:
            self._moved_bytes = self._received_bytes() - self._before_bytes

    def start(self) -> Start:
        """What was marked. Raises CommandError when the program ended without becoming ready."""
        missing = [mark for mark in MARKS if mark not in self._seconds]
        if missing:
            raise machine.CommandError(f"the program ended, and was never seen {' or '.join(missing)}")
        return Start(self._began_ns, dict(self._seconds), self._moved_bytes)


def follow(
    command: Sequence[str],
    clock: Clock,
    *,
    mounted: Callable[[int], bool] | None = None,
    when_ready: Callable[[], None] | None = None,
) -> None:
    """Start `command`, mark the first line of output and the one that says ready, call `when_ready`, then let
    it end by closing its standard input. `mounted` is asked, with the process id, until it says yes."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)
        if mounted is not None:
            threading.Thread(target=_watch, args=(process, clock, mounted), daemon=True).start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                clock.mark(FIRST_OUTPUT)
                if line.split()[:1] == [workloads.READY.encode()]:
                    clock.mark(READY)
                    if when_ready is not None:
                        when_ready()
                    process.stdin.close()
            status = process.wait()
        finally:
            machine.end(process)
        if status:
            stderr.seek(0)
            said = stderr.read()[-2000:].decode(errors="replace").strip()
            raise machine.CommandError(f"{' '.join(command)[:300]}: exit status {status}\n{said}")


def _watch(process: subprocess.Popen[bytes], clock: Clock, mounted: Callable[[int], bool]) -> None:
    while process.returncode is None:
        if mounted(process.pid):
            clock.mark(MOUNTED)
            return
        time.sleep(_WATCH_SECONDS)
