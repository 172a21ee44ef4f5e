"""How much of each layer is in the cache, as of at most a few seconds ago: for the usage of lazy snapshots.

Owned by images.py; any thread. The device server counts all layers at once (14,000 of them in 0.1 s), because
kubelet, through containerd, asks for the usage of every snapshot every ten seconds or so.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Protocol

from imagefs import errors
from imagefs.fuse.coverage import Coverage

_FRESH_SECONDS = 10.0


class Devices(Protocol):
    """What of the device client is used here; imagefs.fuse.control.DeviceClient."""

    def coverage(self, owner: str | None = None) -> dict[str, Coverage]:
        """See DeviceClient."""
        ...


class Coverages:
    """See the module."""

    def __init__(self, devices: Devices, clock: Callable[[], float] = time.monotonic) -> None:
        self._devices = devices
        self._clock = clock
        self._lock = threading.Lock()
        self._counted: dict[str, Coverage] = {}
        self._counted_at = float("-inf")

    def present_bytes(self, map_digest: str) -> int:
        """Bytes of a layer that are on this node's disk. While the device server does not answer, what was
        true before."""
        with self._lock:
            if self._clock() - self._counted_at >= _FRESH_SECONDS:
                with contextlib.suppress(errors.UnavailableError, errors.NotFoundError):
                    self._counted = self._devices.coverage()
                self._counted_at = self._clock()
            coverage = self._counted.get(map_digest)
        return coverage.present_bytes if coverage is not None else 0
