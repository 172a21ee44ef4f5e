"""The tree of one layer, built entry by entry from its tar."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True, eq=False)
class Node:
    """One inode. Hard links are several names for the same Node.

    `mode` is the full st_mode. `data_start` is the byte offset of the file's data in the layer image
    (multiple of 4096) for its first `size - len(tail)` bytes, -1 when all of it is in `tail`; `tail` is kept
    inline beside the inode. `implied` marks a directory that the tar did not list itself.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    rdev_major: int = 0
    rdev_minor: int = 0
    size: int = 0
    data_start: int = -1
    tail: bytes = b""
    target: bytes = b""
    xattrs: dict[bytes, bytes] | None = None
    children: dict[bytes, Node] | None = None
    links: int = 1
    implied: bool = False
