"""The time line of one start: from the command, over mounted and first output, to ready.

`follow` starts a program and watches it from outside, the same way for every kind of start. Times are
seconds since its `Clock` was made, by the monotonic clock. One thread of ours samples what the link moved,
one looks for the mount; both end with the start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from glowplug import readiness
from glowplug.startup import machine
from glowplug.startup.result import FIRST_OUTPUT, MOUNTED, READY, Start
from glowplug.until import Until

_WATCH_SECONDS = 0.005
_SAMPLE_SECONDS = 0.05
_TAIL_BYTES = 4000


class Clock:
    """Marks the time line of one start, counts what the link moved and the registry answered."""

    def __init__(self, received_bytes: Callable[[], int], requests: Callable[[], int]) -> None:
        self._received_bytes, self._requests = received_bytes, requests
        self._before_bytes, self._before_requests = received_bytes(), requests()
        self._seconds: dict[str, float] = {}
        self._moved_bytes = self._answered = 0
        self._flow: list[tuple[float, int]] = [(0.0, 0)]
        self._began_ns = time.monotonic_ns()

    def mark(self, name: str) -> None:
        """It is so far now; the first time counts."""
        self._seconds.setdefault(name, self._since())
        if name == READY:
            self._moved_bytes = self._received_bytes() - self._before_bytes
            self._answered = self._requests() - self._before_requests

    @contextlib.contextmanager
    def sampled(self) -> Iterator[None]:
        """Note the flow until the block is left."""
        done = threading.Event()

        def sample() -> None:
            while not done.wait(_SAMPLE_SECONDS):
                self._flow.append((self._since(), self._received_bytes() - self._before_bytes))

        thread = threading.Thread(target=sample, name="link-flow", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def start(self) -> Start:
        """What was marked."""
        seconds = dict(self._seconds)
        if MOUNTED in seconds and FIRST_OUTPUT in seconds:
            # Who prints has its root filesystem, however late the look for it was.
            seconds[MOUNTED] = min(seconds[MOUNTED], seconds[FIRST_OUTPUT])
        ready = seconds[READY]
        flow = [each for each in self._flow if each[0] < ready]
        flow.append((ready, self._moved_bytes))
        return Start(self._began_ns, seconds, self._moved_bytes, self._answered, tuple(flow))

    def _since(self) -> float:
        return (time.monotonic_ns() - self._began_ns) / 1e9


@dataclasses.dataclass(frozen=True, slots=True)
class Watch:
    """What is done while a program is followed: `mounted`, given its process id, says whether its root
    filesystem stands, and `when_mounted` is called then, on a thread of ours; `when_ready` is called once it
    is ready, before it is ended by `end`."""

    mounted: Callable[[int], bool] | None = None
    when_mounted: Callable[[], None] | None = None
    when_ready: Callable[[], None] | None = None
    end: Callable[[], None] | None = None


def follow(command: Sequence[str], clock: Clock, until: Until, watch: Watch) -> None:
    """Start `command`, mark its first output and when it is ready, then end it. Its standard input stays open
    till then: it may be a program that serves until its input ends. Raises CommandError, with its last
    words, when it ends before."""
    tail = b""

    def heard(data: bytes) -> None:
        nonlocal tail
        clock.mark(FIRST_OUTPUT)
        tail = (tail + data)[-_TAIL_BYTES:]

    reader, writer = os.pipe2(os.O_CLOEXEC)

    def work() -> NoReturn:
        os.dup2(reader, 0)
        os.execvp(command[0], list(command))  # noqa: S606

    try:
        with readiness.child(work, until, heard) as child, _watching(child, clock, watch):
            if not child.wait() and (child.exit_code or until.log or until.address):
                child.raise_failure()
                said = tail.decode(errors="replace").strip()
                raise machine.CommandError(
                    f"{' '.join(command)[:300]}: ended with {child.exit_code} before {until}\n{said}"
                )
            clock.mark(READY)
            if watch.when_ready is not None:
                watch.when_ready()
            os.close(writer)
            writer = -1
            if watch.end is not None:
                watch.end()
            child.end()
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


@contextlib.contextmanager
def _watching(child: readiness.Child, clock: Clock, watch: Watch) -> Iterator[None]:
    """Mark when its root filesystem stands, until the block is left."""
    done = threading.Event()
    if watch.mounted is not None:
        threading.Thread(target=_await_mounted, args=(child, clock, watch, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _await_mounted(child: readiness.Child, clock: Clock, watch: Watch, done: threading.Event) -> None:
    assert watch.mounted is not None
    while child.exit_code is None and not done.wait(_WATCH_SECONDS):
        if watch.mounted(child.pid):
            clock.mark(MOUNTED)
            if watch.when_mounted is not None:
                watch.when_mounted()
            return
