"""One block's bytes, from the descriptor that the server sent into a worker's buffer, past the page cache.

Used by worker.py, on its one thread. The kernel keeps what a process reads above us (as pages of the file in
the image), so a second copy, as pages of the block's file, is waste: of memory, and of the processor time
that it takes to fill and to drop it.

* A large read of what the page cache does not have goes by O_DIRECT: 110 us of processor time a MiB less
  than through it. Whether it has it, cachestat(2) says (Linux 6.5): a block that has just been fetched is
  read from memory.
* A small read goes through the page cache, because many small files lie side by side, and because a fault on
  a mapped library comes as a burst of reads of 64 KiB, in order. One that finds nothing there has the whole
  window of `_WINDOW_BYTES` around it read at once, without waiting for more than its own part, so that the
  rest of the burst comes from memory. One that goes on where the window before ended has the next window read
  as well: small files lie in the order in which they are found. The kernel's own read-ahead is off: on top of
  the windows it read 382 instead of 340 MB for one `import torch`, and slower (docs/benchmarks.md).
  The pages are dropped with the block, all at once: POSIX_FADV_DONTNEED after every small read made `import
  torch` 0.1 s (6%) slower, as it may have to empty every processor's list of new pages.
* A large read from the page cache drops everything before its end, not only its own part: of a block that has
  just come the disk had not all when its beginning was read, and such pages stay. A file of 2 GB left
  521 MB in memory a second time, now 20 MB.
"""

from __future__ import annotations

import os

from imagefs import syscalls

_LARGE_BYTES = 256 << 10
_WINDOW_BYTES = 512 << 10
_ALIGNMENT_BYTES = 4096


class BlockFile:
    """Owns `fd`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._direct_fd = -1
        self._direct = True
        self._leaves_pages = False
        self._window = -2
        status = os.fstat(fd)
        # A memfd never had a name; a cache file has one when it is sent.
        self.in_memory = status.st_nlink == 0
        self._identity = (status.st_dev, status.st_ino)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def is_same(self, fd: int) -> bool:
        """Whether `fd` is of the very file: a block of which more has come."""
        status = os.fstat(fd)
        return (status.st_dev, status.st_ino) == self._identity

    def read(self, view: memoryview, offset: int) -> bool:
        """Read exactly `view` from byte `offset`. False if the file is shorter, or the disk fails."""
        try:
            if len(view) < _LARGE_BYTES:
                self._read_ahead(offset // _WINDOW_BYTES)
                if self._read_cached(view, offset):
                    return True
                start = offset - offset % _WINDOW_BYTES
                end = offset + len(view) + -(offset + len(view)) % _WINDOW_BYTES
                os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_WILLNEED)
            elif self._direct and self._read_direct(view, offset):
                return True
            if os.preadv(self._fd, [view], offset) != len(view):
                return False
            if len(view) >= _LARGE_BYTES:
                os.posix_fadvise(self._fd, 0, offset + len(view), os.POSIX_FADV_DONTNEED)
                self._leaves_pages = True
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Give the descriptor back, and the page cache what it holds of the block."""
        if self._leaves_pages:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
        os.close(self._fd)

    def _read_ahead(self, window: int) -> None:
        """Have the window behind `window` read, when that follows the one of the last small read."""
        if window == self._window + 1:
            os.posix_fadvise(self._fd, (window + 1) * _WINDOW_BYTES, _WINDOW_BYTES, os.POSIX_FADV_WILLNEED)
        self._window = window

    def _read_cached(self, view: memoryview, offset: int) -> bool:
        """False where a part of the bytes is not in memory."""
        self._leaves_pages = True
        try:
            return os.preadv(self._fd, [view], offset, os.RWF_NOWAIT) == len(view)
        except OSError:
            return False  # EAGAIN, or a filesystem that has no such reads

    def _read_direct(self, view: memoryview, offset: int) -> bool:
        """False where the bytes are in memory already, or cannot be read in this way."""
        if (offset | len(view)) % _ALIGNMENT_BYTES:
            return False
        try:
            if syscalls.cached_pages(self._fd, offset, len(view)):
                return False
            if self._direct_fd < 0:
                # An open file of our own: the one that came is shared with whoever else got it.
                self._direct_fd = os.open(
                    f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC
                )
            return os.preadv(self._direct_fd, [view], offset) == len(view)
        except OSError:
            self._direct = False  # an older kernel, or a filesystem that has no such reads
            return False
