"""A small file in shared memory: 64-bit words that several processes read and write, and one lock.

What `ledger` and `budget` stand on; they own the layouts. Word 0 says what the file is. Words are native
(all processes run on one machine). The lock is a flock, so that the kernel lets go of it when its holder is
killed. Needs nothing but Python's library: the engine's own interpreter imports it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path


class WordFile:
    """`words`, `whole` and `real` are the same memory: unsigned, signed, floating point."""

    def __init__(self, path: Path, magic: int, count: int, called: str) -> None:
        """Map an existing file of `count` words. OSError where there is none; ValueError where it is
        something else."""
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(self._fd, 8 * count)
        except (ValueError, OSError):
            os.close(self._fd)
            raise
        with memoryview(self._map) as bytes_:
            self.words, self.whole, self.real = bytes_.cast("Q"), bytes_.cast("q"), bytes_.cast("d")
        if self.words[0] != magic:
            self.close()
            raise ValueError(f"{path} is not the {called} of an engine")

    def close(self) -> None:
        """Let go of the file; the views are of no use any more."""
        for view in (self.words, self.whole, self.real):
            view.release()
        self._map.close()
        os.close(self._fd)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all processes that have mapped it."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)


def create(path: Path, magic: int, count: int) -> None:
    """A file of zeros but for its first word, readable by its owner alone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, magic.to_bytes(8, sys.byteorder))
        os.ftruncate(descriptor, 8 * count)
    finally:
        os.close(descriptor)
