"""The in-flight limit, as one server process sees it: a place in the ledger, or a place in the queue.

Runs on the event loop of the process that serves the requests: vLLM's API servers (`gate`) or the supervisor
(`proxy`). Queues are per process, order is global: whoever gives a place back wakes the process in which
somebody has waited longest, by a datagram to its socket. A datagram that is lost costs time, not the request:
`beat` looks, every second.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from serving.engine import admission
from serving.engine.ledger import Ledger

BEAT_SECONDS = 1.0
_WEIGHT = 0.1
"""Of the latest request in the mean duration."""


class RejectedError(Exception):
    """No place in flight, none in the queue, or none within the queue's time."""

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__(f"at its limit; retry after {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class Limiter:
    """One per server process. `start` before the first request."""

    def __init__(
        self,
        ledger: Ledger,
        directory: Path,
        progress: Callable[[], int],
        cache: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`progress` is asked once a second for a number that grows when the engine gets on, `cache` for the
        part of its KV cache that is in use."""
        self._ledger, self._directory = ledger, directory
        self._progress, self._cache = progress, cache
        self._slot = ledger.claim(os.getpid())
        self._queue: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()
        self._mean_seconds = 0.0
        self._socket: socket.socket | None = None
        self._beating: asyncio.Task[None] | None = None

    @property
    def slot(self) -> int:
        """The number of this process in the ledger."""
        return self._slot

    async def start(self) -> None:
        """Listen for wake-ups, and begin to beat."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        path = wake_path(self._directory, self._slot)
        path.unlink(missing_ok=True)
        self._socket.bind(os.fspath(path))
        asyncio.get_running_loop().add_reader(self._socket, self._woken)
        self._beating = asyncio.create_task(self._beat())

    async def stop(self) -> None:
        """Stop beating; the slot is the supervisor's to free."""
        if self._beating is not None:
            self._beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._beating
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def enter_at_once(self) -> int | None:
        """A place in flight if there is one: its start, for `leave`, in monotonic nanoseconds."""
        return time.monotonic_ns() if self._ledger.enter(self._slot) else None

    async def enter(self) -> int:
        """Wait for a place in flight; as `enter_at_once`. RejectedError."""
        if (entered_ns := self.enter_at_once()) is not None:
            return entered_ns
        now_ns = time.monotonic_ns()
        limits = self._ledger.limits
        waiting = self._ledger.waiting()
        if waiting >= limits.queue_requests:
            raise self._rejected(waiting)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (now_ns, place)
        self._queue.append(entry)
        self._publish()
        self._let_in()  # a place may have been given back before we were seen to wait
        try:
            async with asyncio.timeout(limits.queue_seconds):
                await place
        except TimeoutError:
            if place.done() and not place.cancelled():  # let in just in time
                return time.monotonic_ns()
            raise self._rejected(self._ledger.waiting()) from None
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # let in at the very moment its client went away
                self.leave(now_ns, failed=False)
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._queue.remove(entry)
                self._publish()
        return time.monotonic_ns()

    def leave(self, entered_ns: int, *, failed: bool) -> None:
        """Give the place back, and wake whoever is next."""
        busy_ns = max(0, time.monotonic_ns() - entered_ns)
        self._mean_seconds += _WEIGHT * (busy_ns / 1e9 - self._mean_seconds)
        self._wake(self._ledger.leave(self._slot, busy_ns, failed=failed))

    def _rejected(self, waiting: int) -> RejectedError:
        self._ledger.reject(self._slot)
        limit = self._ledger.limits.in_flight
        return RejectedError(admission.retry_after_seconds(waiting + 1, limit, self._mean_seconds))

    def _let_in(self) -> None:
        while self._queue and self._ledger.enter(self._slot, queued=True):
            _, place = self._queue.popleft()
            self._publish()
            if place.done():
                self._ledger.leave(self._slot, 0, failed=False)
            else:
                place.set_result(None)

    def _publish(self) -> None:
        self._ledger.queue(self._slot, len(self._queue), self._queue[0][0] if self._queue else 0)

    def _wake(self, slot: int | None) -> None:
        if slot == self._slot:
            self._let_in()
        elif slot is not None and self._socket is not None:
            wake(self._socket, self._directory, slot)

    def _woken(self) -> None:
        assert self._socket is not None
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(1)
        self._let_in()
        self._wake(self._ledger.next_waiting())  # one datagram may stand for several places

    async def _beat(self) -> None:
        while True:
            self._ledger.beat(self._slot, time.monotonic_ns(), self._progress(), self._cache())
            self._let_in()
            await asyncio.sleep(BEAT_SECONDS)


def wake_path(directory: Path, slot: int) -> Path:
    """Where the process of a slot listens for wake-ups."""
    return directory / f"wake-{slot}"


def wake(sender: socket.socket, directory: Path, slot: int) -> None:
    """Tell a process that there may be a place. One that is gone, or has been told often, is no error."""
    with contextlib.suppress(OSError):
        sender.sendto(b"\0", os.fspath(wake_path(directory, slot)))


def wake_all(directory: Path, ledger: Ledger) -> None:
    """The limit was raised: whoever waits looks again."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        for slot in ledger.slots():
            if slot.waiting:
                wake(sender, directory, slot.number)
