"""Who acts, when several controllers run for one pool: a Lease of the cluster, or a lock on this machine.

`holds` is asked right before each act. The lock is the kernel's to let go of when its holder dies, however it
dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Protocol

from cluster import api, leader
from cluster.lease import Timing
from warmpool import errors


class Election(Protocol):
    """See the module."""

    def start(self) -> None:
        """Become a candidate."""

    def holds(self) -> bool:
        """Whether this process leads now."""

    def holder(self) -> str:
        """Who leads, as far as is known."""

    def stop(self) -> None:
        """Let another lead at once."""


class LockElection:
    """A file that one process holds locked. ConfigurationError where it cannot be had at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._held = False

    def start(self) -> None:
        """See Election."""
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise errors.ConfigurationError(f"{self._path}: {exc.strerror}: mend state_directory") from exc

    def holds(self) -> bool:
        """See Election. Tries again each time."""
        if not self._held and self._file >= 0:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, str(os.getpid()).encode(), 0)
                self._held = True
        return self._held

    def holder(self) -> str:
        """See Election."""
        return f"process {os.pread(self._file, 32, 0).decode('ascii', 'replace')}" if self._file >= 0 else ""

    def stop(self) -> None:
        """See Election."""
        if self._file >= 0:
            os.close(self._file)
            self._file, self._held = -1, False


class LeaseElection:
    """A Lease."""

    def __init__(self, cluster: api.Api, name: str, lease_seconds: float) -> None:
        # The shares are those of the lease's defaults: two renewals may fail before it is let go of.
        timing = Timing(max(3, round(lease_seconds)), lease_seconds * 2 / 3, lease_seconds * 2 / 15)
        self._leader = leader.Leader(cluster, name, timing=timing)

    def start(self) -> None:
        """See Election."""
        self._leader.start()

    def holds(self) -> bool:
        """See Election."""
        return self._leader.holds()

    def holder(self) -> str:
        """See Election."""
        return self._leader.holder

    def stop(self) -> None:
        """See Election."""
        self._leader.stop()
