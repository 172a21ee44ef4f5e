"""How much memory a conversion uses, whatever the bytes: its shares, and the pool of block buffers.

The promise is 256 MB and 1 KB per entry. `shares` divides what is left of it beside the interpreter among
compression contexts, block buffers and layers in parallel; pure. `BufferPool` holds the buffers that all
layers of a conversion take from. `return_what_is_freed` is for the process that converts, at its start.

No layer can wait for another here for ever: a layer image writer holds at most `MOST_BUFFERS` and waits for
nothing but this pool while it holds that many; every buffer that was put comes back; and there is at least
one buffer more than layers can hold while each still wants one.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import threading
from collections.abc import Callable
from typing import Final

import zstandard

from converter import erofs_writer, tasks

BUDGET_BYTES: Final = 180_000_000
"""The promise less 60 MB for the interpreter with all modules, and a margin."""
_LAYER_BYTES: Final = 8_000_000
"""Pieces of 1 MiB in a layer's pipes and its reader's hands, and the piece being uploaded."""
_CONTEXT_BYTES: Final = 110_000_000
"""Of the budget for compression contexts, which have 1 MB at level 2 and 50 to 85 at level 19."""
_MOST_BUFFERS: Final = 64
_MOST_THREADS: Final = 16


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE_BYTES = 5 << 20
_KEPT_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Shares:
    """Threads that compress, block buffers, and layers converted at once."""

    threads: int
    buffers: int
    layers: int


def shares(block_bytes: int, frame_bytes: int, level: int, jobs: int, processors: int) -> Shares:
    """What fits the budget: at most `jobs` layers, at most one thread per processor."""
    parameters = zstandard.ZstdCompressionParameters.from_level(level, source_size=frame_bytes)
    context_bytes = parameters.estimated_compression_context_size()
    threads = max(1, min(processors, _MOST_THREADS, _CONTEXT_BYTES // context_bytes))
    # A block of random bytes is as large compressed as it is in its buffer.
    buffer_bytes = 2 * block_bytes
    for layers in range(jobs, 0, -1):
        left = BUDGET_BYTES - threads * context_bytes - layers * _LAYER_BYTES
        buffers = min(_MOST_BUFFERS, left // buffer_bytes)
        if buffers >= layers * erofs_writer.MOST_BUFFERS:
            return Shares(min(threads, buffers), buffers, layers)
    return Shares(1, erofs_writer.MOST_BUFFERS, 1)


def return_what_is_freed() -> None:
    """Have glibc give freed compressed blocks and upload parts back to the system; other libraries do.

    Left to itself, it keeps them in an arena for each thread: 359 MB instead of 235 at eight incompressible
    layers in 16 MiB blocks to S3. But each arena keeps a few pieces' worth at its top: given back after every
    piece of 1 MiB, and faulted in again for the next, it was 210,000 page faults for 1.2 GB of tar, not
    60,000, and 0.2 of 8.8 processor seconds. The room for a compressed block of 4 MiB counts as a piece: each
    in pages of its own was 107,000 faults, not 40,000, and 0.4 of 9.0 processor seconds."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _huge_pages(size: int) -> memoryview:
    """Memory that the kernel is asked to back by huge pages, which it may decline.

    A block is written once and read twice, by the hash and at random by zstd: with pages of 4 KiB that was
    8.9 processor seconds for 1.2 GB of tar, with huge ones 8.3."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        area.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(area)


class BufferPool:
    """Block buffers, made when first needed and used again; `count` at most. Thread-safe."""

    def __init__(self, group: tasks.Group, block_bytes: int, count: int) -> None:
        self._group = group
        self._block_bytes = block_bytes
        self._left = count
        self._free: list[memoryview] = []
        self._condition = threading.Condition()
        group.on_cancel(self.wake)

    def acquire(self, check: Callable[[], None]) -> memoryview:
        """A buffer, whatever it holds. Waits for one; raises what `check` raises, and Cancelled."""
        with self._condition:
            while True:
                self._group.check()
                check()
                if self._free:
                    return self._free.pop()
                if self._left:
                    self._left -= 1
                    return _huge_pages(self._block_bytes)
                self._condition.wait()

    def release(self, buffer: memoryview) -> None:
        """Give a buffer back."""
        with self._condition:
            self._free.append(buffer)
            self._condition.notify()

    def wake(self) -> None:
        """Make those who wait check again."""
        with self._condition:
            self._condition.notify_all()
