"""Which blocks the cache's directory holds, and how large they are: an answer without asking the disk.

Owned by one BlockCache: made anew by each look at the directory, kept true in between by what the cache does
itself. Other processes share the directory, so that it is a good guess (usage, coverage, room) and never a
promise: who needs a block opens its file. Any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from imagefs import eviction


class CacheIndex:
    """See the module. `ready` is set by the first look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes_by_digest: dict[bytes, int] = {}
        self._used_bytes = 0
        self.ready = threading.Event()

    def replace(self, entries: Iterable[eviction.Entry]) -> None:
        """The directory as it was found."""
        found = {entry.digest: entry.allocated_bytes for entry in entries}
        with self._lock:
            self._bytes_by_digest = found
            self._used_bytes = sum(found.values())
        self.ready.set()

    def add(self, digest: bytes, allocated_bytes: int) -> None:
        """A block got its name."""
        with self._lock:
            self._used_bytes += allocated_bytes - self._bytes_by_digest.get(digest, 0)
            self._bytes_by_digest[digest] = allocated_bytes

    def remove(self, digest: bytes) -> None:
        """A block lost its name."""
        with self._lock:
            self._used_bytes -= self._bytes_by_digest.pop(digest, 0)

    def __contains__(self, digest: object) -> bool:
        return digest in self._bytes_by_digest

    def __len__(self) -> int:
        return len(self._bytes_by_digest)

    @property
    def used_bytes(self) -> int:
        """What all blocks occupy on disk."""
        return self._used_bytes

    def occupied_bytes(self, digests: Iterable[bytes]) -> int:
        """What those of these blocks that are here occupy; each digest is to be named once."""
        sizes = self._bytes_by_digest
        return sum(sizes.get(digest, 0) for digest in digests)
