"""Reads of large files that nobody is expected to read again soon: source images, layer blobs in a folder.

What such a read brings into the page cache leaves it again at once, and its pages are used for the next piece
(Linux 6.14, RWF_DONTCACHE; elsewhere these are plain reads). So a conversion does not push out what others
have in memory, and where a virtual machine's host takes free memory back, it takes few pages from it: for
348 MB of source that was half a second of a processor's time.
"""

from __future__ import annotations

import os

_RWF_DONTCACHE = 0x80
"""uapi/linux/fs.h; `os` does not know it yet."""


def pread(fd: int, length: int, offset: int) -> bytes:
    """As os.pread. What was in the page cache before stays there."""
    buffer = bytearray(length)
    try:
        count = os.preadv(fd, [buffer], offset, _RWF_DONTCACHE)
    except OSError:
        return os.pread(fd, length, offset)  # the kernel or the filesystem has no such reads
    with memoryview(buffer) as view:
        return bytes(view[:count])
