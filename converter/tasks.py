"""Threads of one conversion: a group that fails as one, and the bounded pipes between the stages of a layer.

Rules: the first error of a group is its result; it, or `cancel()` (from Ctrl-C in the main thread), makes
every other thread stop at its next pipe, token or `check`, raising Cancelled, which is never swallowed and
never reported. Threads are daemons: one that hangs in a socket's read cannot keep a cancelled process alive.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T")

_STOP_SECONDS = 1.0
"""How long a cancelled group waits for threads that are inside a call to the outside."""


class Cancelled(BaseException):
    """This thread's group was cancelled."""


class Group:
    """Threads that succeed or fail together."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._error: BaseException | None = None
        self._cancelled = False
        self._wakers: list[Callable[[], None]] = []

    def check(self) -> None:
        """Raise Cancelled if the group is."""
        if self._cancelled:
            raise Cancelled

    def start(self, name: str, function: Callable[[], None]) -> None:
        """Run `function` in a thread of the group."""
        thread = threading.Thread(target=self._run, args=(function,), name=name, daemon=True)
        with self._condition:
            if self._cancelled:
                return
            self._threads.append(thread)
            self._running += 1
        thread.start()

    def on_cancel(self, waker: Callable[[], None]) -> None:
        """Call `waker` once when the group is cancelled, at once if it is already."""
        with self._condition:
            if not self._cancelled:
                self._wakers.append(waker)
                return
        waker()

    def fail(self, error: BaseException) -> None:
        """Make `error` the group's result unless it has one, and cancel the rest."""
        with self._condition:
            if self._error is None and not self._cancelled:
                self._error = error
        self.cancel()

    def cancel(self) -> None:
        """Tell every thread to stop."""
        with self._condition:
            wakers, self._wakers = self._wakers, []
            self._cancelled = True
            self._condition.notify_all()
        for waker in wakers:
            waker()

    def wait(self) -> None:
        """Wait for all threads; raises the group's first error. Ctrl-C here cancels the group."""
        try:
            with self._condition:
                while self._running and not self._cancelled:
                    self._condition.wait()
        except BaseException:
            self.cancel()
            self._join()
            raise
        if self._cancelled:
            self._join()
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Cancelled:
            pass
        except BaseException as exc:
            self.fail(exc)
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()


class Pipe(Generic[_T]):
    """A bounded queue from one thread to another, ended by `close`, broken by the group's cancellation.

    Who has to wait, waits for `batch` items, or places, because every change of thread costs."""

    def __init__(self, group: Group, capacity: int, batch: int = 1) -> None:
        self._condition = threading.Condition()
        self._items: collections.deque[_T] = collections.deque()
        self._capacity = capacity
        self._batch = batch
        self._closed = False
        self._group = group
        group.on_cancel(self._wake)

    def put(self, item: _T) -> None:
        """Append, waiting for room."""
        with self._condition:
            if len(self._items) >= self._capacity:
                while len(self._items) > self._capacity - self._batch:
                    self._group.check()
                    self._condition.wait()
            self._group.check()
            self._items.append(item)
            if len(self._items) >= self._batch:
                self._condition.notify_all()

    def close(self) -> None:
        """No more items."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def __iter__(self) -> Iterator[_T]:
        """The items until `close`."""
        while True:
            with self._condition:
                if not self._items:
                    while len(self._items) < self._batch and not self._closed:
                        self._group.check()
                        self._condition.wait()
                    self._group.check()
                    if not self._items:
                        return
                item = self._items.popleft()
                if len(self._items) <= self._capacity - self._batch:
                    self._condition.notify_all()
            yield item

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()


class Tokens:
    """A counting semaphore that a group's cancellation breaks."""

    def __init__(self, group: Group, count: int) -> None:
        self._condition = threading.Condition()
        self._free = count
        self._group = group
        group.on_cancel(self._wake)

    def __enter__(self) -> None:
        with self._condition:
            while self._free == 0:
                self._group.check()
                self._condition.wait()
            self._group.check()
            self._free -= 1

    def __exit__(self, *exc: object) -> None:
        with self._condition:
            self._free += 1
            self._condition.notify()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()


class Promise(Generic[_T]):
    """A value that one thread of a group makes and others wait for."""

    def __init__(self, group: Group) -> None:
        self._condition = threading.Condition()
        self._values: list[_T] = []
        self._group = group
        group.on_cancel(self._wake)

    def set(self, value: _T) -> None:
        """Make the value known."""
        with self._condition:
            self._values.append(value)
            self._condition.notify_all()

    def get(self) -> _T:
        """The value, once it is known."""
        with self._condition:
            while not self._values:
                self._group.check()
                self._condition.wait()
            return self._values[0]

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()
