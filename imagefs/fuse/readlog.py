"""What a worker notes of the reads that the kernel asks of it, while somebody records a device.

Owned by the worker, on its one thread. What was noted goes to the server a message at a time: when one is
full, and whenever the server says what to record. Reads that go on where the last one of the same device
ended are one, so that a big file costs a few entries and not thousands.

Nothing is read and nothing copied for it, and while nothing is recorded it costs a look at an empty set a
read. A worker that is killed takes with it what it has not sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from imagefs.fuse import wire


class ReadLog:
    """See the module. `send` gets each message."""

    def __init__(self, send: Callable[[wire.Reads], None]) -> None:
        self.nodes: frozenset[int] = frozenset()
        """What is recorded: `note` is to be called for reads of these alone."""
        self._send = send
        self._reads: list[wire.Access] = []

    def watch(self, request: wire.Watch) -> None:
        """Record these devices from now on, and no others; answer with what was noted before."""
        self._send(wire.Reads(request.tag, tuple(self._reads)))
        self._reads.clear()
        self.nodes = frozenset(request.nodes)

    def note(self, node: int, offset: int, length: int) -> None:
        """A read that the kernel asked for just now."""
        if self._reads:
            last = self._reads[-1]
            joined = last.length + length
            if last.node == node and last.offset + last.length == offset and joined <= wire.MAX_ACCESS_BYTES:
                self._reads[-1] = last._replace(length=joined)
                return
        if len(self._reads) == wire.ACCESSES:
            self._send(wire.Reads(0, tuple(self._reads)))
            self._reads.clear()
        self._reads.append(wire.Access(node, offset, length, time.monotonic_ns() // 1000))
