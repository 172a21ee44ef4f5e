"""What a long wire does to bytes: they come out as they went in, in order, and later.

Pure: `now` is an argument, in seconds on any clock that does not go back. One line is one direction of one
connection; `delay.py` has two of them for each and moves the bytes. Invariants: nothing leaves before its
time, nothing is changed, merged or reordered, the end leaves after all that went in before it.
"""

from __future__ import annotations

import collections


class DelayLine:
    """Bytes on their way. `capacity_bytes` may be under way before `has_room` turns false; what is put in
    nevertheless is kept."""

    def __init__(self, delay_seconds: float, capacity_bytes: int) -> None:
        self._delay_seconds = delay_seconds
        self._capacity_bytes = capacity_bytes
        self._waiting: collections.deque[tuple[float, bytes]] = collections.deque()
        self._waiting_bytes = 0
        self._ends_at: float | None = None

    @property
    def has_room(self) -> bool:
        """Whether whoever puts bytes in should go on."""
        return self._waiting_bytes < self._capacity_bytes

    @property
    def due(self) -> float | None:
        """When the next bytes, or the end, arrive; None when nothing is under way."""
        return self._waiting[0][0] if self._waiting else self._ends_at

    def put(self, data: bytes, now: float) -> None:
        """Bytes go in."""
        assert self._ends_at is None, "bytes after the end"
        self._waiting.append((now + self._delay_seconds, data))
        self._waiting_bytes += len(data)

    def end(self, now: float) -> None:
        """No more bytes go in."""
        self._ends_at = now + self._delay_seconds

    def take(self, now: float) -> bytes | None:
        """The next bytes that have arrived, as they were put in; None when there are none."""
        if not self._waiting or self._waiting[0][0] > now:
            return None
        _, data = self._waiting.popleft()
        self._waiting_bytes -= len(data)
        return data

    def ended(self, now: float) -> bool:
        """Whether all has been taken, and the end has arrived."""
        return not self._waiting and self._ends_at is not None and self._ends_at <= now
