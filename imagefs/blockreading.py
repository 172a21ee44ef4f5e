"""Bytes of a layer image, read through its blocks: for who wants bytes, and has no kernel in between.

Used by `Fetcher.read`, in the reader's thread. A few blocks are asked for ahead of the one that is read, each
for the frames that the range touches.
"""

from __future__ import annotations

import collections
import concurrent.futures
import os
from collections.abc import Callable

from imagefs import blockmap, framemask
from imagefs.answering import PartDone
from imagefs.arrival import Part

_WINDOW_BLOCKS = 8

Ask = Callable[[int, int, PartDone], None]
"""For a block, by index, of which some frames are enough."""


def read(block_map: blockmap.BlockMap, offset: int, length: int, ask: Ask) -> bytes:
    """Raises what `ask` answers."""
    ahead: collections.deque[tuple[concurrent.futures.Future[int], int, int]] = collections.deque()
    end = offset + length
    out = bytearray()
    try:
        while len(out) < length:
            while offset < end and len(ahead) < _WINDOW_BLOCKS:
                index, start = divmod(offset, block_map.block_bytes)
                count = min(block_map.block_bytes - start, end - offset)
                needed = framemask.touched(start, count, block_map.frame_bytes)
                ahead.append((_future(ask, index, needed), start, count))
                offset += count
            future, start, count = ahead.popleft()
            fd = future.result()
            try:
                out += os.pread(fd, count, start)
            finally:
                os.close(fd)
    finally:
        for future, _, _ in ahead:
            future.add_done_callback(_close_result)
    return bytes(out)


def _future(ask: Ask, index: int, needed: int) -> concurrent.futures.Future[int]:
    future: concurrent.futures.Future[int] = concurrent.futures.Future()

    def done(result: int | Part | Exception) -> None:
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result.fd if isinstance(result, Part) else result)

    ask(index, needed, done)
    return future


def _close_result(future: concurrent.futures.Future[int]) -> None:
    if future.exception() is None:
        os.close(future.result())
