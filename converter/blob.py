"""A layer image's blocks -> its layer blob and block map: hash, compress, and write in order.

A `LayerBlobWriter` is the `BlockSink` of one layer. Its caller, one thread, puts blocks; threads of the
shared executor hash and compress them; whichever thread completes the next block in order writes it to the
spool file, and those that waited for it. While it is written, the blob is a slice of the spool file:

    | room for block 0 ...   block 0's frames | block 1's frames | ... | seek table |
                           ^ start

Block 0 comes last, so its room is as large as it can get, and its frames are written to end where block 1's
begin. When the blob is hashed, which needs all of it in order, its bytes go to the front of the file on the
way: they are in hand, their pages are there, and a folder can then take the file as it is.

Invariants: a buffer goes back to the conversion's pool when its block is written, so the pool bounds what is
held in memory, compressed blocks waiting for their turn included; the first error in any thread is raised by
the caller's next call, and nobody waits for what will not come; after `abort` there is no spool file. Frames
carry their content size and no checksum (the map has sha256); the seek table is `imagefs.seektable`'s.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import threading
from collections.abc import Iterable
from typing import Final

import zstandard

from converter import memory, stages
from converter.erofs_writer import Layout
from converter.stages import Stage
from imagefs import artifact, blockmap, errors, seektable, syscalls

DEFAULT_LEVEL: Final = 2
"""Blocks are compressed once and fetched often, so the highest level that keeps up: docs/format.md has the
figures."""
LIBZSTD_VERSION: Final = (
    zstandard.ZSTD_VERSION[0] * 10000 + zstandard.ZSTD_VERSION[1] * 100 + zstandard.ZSTD_VERSION[2]
)
_MOVED_PIECE_BYTES = 1 << 20
_WRITTEN_BEHIND_BYTES = 16 << 20
_ZEROS_AHEAD_BYTES = 512


@dataclasses.dataclass(frozen=True, slots=True)
class FinishedBlob:
    """A layer blob on local disk, the whole of `path`, and its block map.

    Digests are `sha256:` strings. The file is its owner's to remove.
    """

    path: pathlib.Path
    size: int
    digest: str
    block_map: blockmap.BlockMap
    map_bytes: bytes
    map_digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """What the map and the seek table keep of a block; per frame its bytes, compressed bytes and digest."""

    digest: bytes
    frame_lengths: tuple[int, ...]
    frame_compressed: tuple[int, ...]
    frame_digests: tuple[bytes, ...]
    zero: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Packed:
    """One block, hashed and compressed: `data` is its frames, one after another."""

    entry: _Entry
    data: bytes


class LayerBlobWriter:
    """Makes one layer blob in `spool_path`. All methods but the executor's are for one thread, whose
    stopwatch is `laps`."""

    def __init__(
        self,
        spool_path: pathlib.Path,
        block_bytes: int,
        frame_bytes: int,
        level: int,
        executor: concurrent.futures.Executor,
        pool: memory.BufferPool,
        laps: stages.Laps,
        kept: bool = False,
    ) -> None:
        """`kept`: the file will stay, so the kernel is told to write it to disk while the blob is hashed. Who
        then waits for the disk waits for its end only."""
        blockmap.check_block_bytes(block_bytes)
        blockmap.check_frame_bytes(frame_bytes, block_bytes)
        self._path = spool_path
        self._block_bytes = block_bytes
        self._frame_bytes = frame_bytes
        self._level = level
        self._executor = executor
        self._pool = pool
        self._laps = laps
        self._kept = kept

        self._lock = threading.Condition()
        self._in_flight = 0
        self._error: BaseException | None = None
        self._waiting: dict[int, tuple[_Packed, memoryview | None]] = {}
        self._next = 1
        self._entries: dict[int, _Entry] = {}
        self._first: _Packed | None = None

        self._room = (block_bytes // frame_bytes) * _compress_bound(frame_bytes)
        self._end = self._room
        try:
            self._fd = os.open(spool_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise errors.ConfigurationError(f"spool file {spool_path}: {exc.strerror}") from exc

    # -- BlockSink ---------------------------------------------------------------------------------------

    def acquire(self) -> memoryview:
        """A buffer of `block_bytes`; waits for one, raises the first error of any thread."""
        around = self._laps.enter(None)
        try:
            return self._pool.acquire(self._check)
        finally:
            self._laps.enter(around)

    def put(self, index: int, buffer: memoryview, length: int) -> None:
        """Take block `index`; `buffer` is not the caller's any more."""
        if length == self._block_bytes and _is_zeros(buffer):
            self._pool.release(buffer)
            self.put_zeros(index)
            return
        with self._lock:
            self._check()
        future = self._executor.submit(self._work, index, buffer, length)
        with self._lock:
            self._in_flight += 1
        # A callback, because it also comes for work that a shutdown of the executor cancelled.
        future.add_done_callback(self._settle)

    def put_zeros(self, index: int) -> None:
        """Take a full block of zeros as block `index`."""
        packed = _packed_zeros(self._block_bytes, self._frame_bytes, self._level)
        with self._lock:
            self._check()
            self._arrive(index, packed, None)
            self._check()

    # -- the end -----------------------------------------------------------------------------------------

    def finish(
        self, layout: Layout, source_digest: str, diff_id: str, chain_id: str | None, root_implied: bool
    ) -> FinishedBlob:
        """Wait for every block, complete the blob and make its block map. Digests are `sha256:` strings.

        Raises the first error of any thread; the caller then calls `abort`.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._error or not self._in_flight)
            self._check()
            first = self._first
        count = blockmap.block_count(layout.image_bytes, self._block_bytes)
        if first is None or self._waiting or len(self._entries) != count:
            raise AssertionError(f"{len(self._entries)} of {count} blocks were put")
        start = self._room - len(first.data)
        try:
            _write_at(self._fd, start, first.data)
            entries = [self._entries[index] for index in range(count)]
            table = _seek_table(entries)
            _write_at(self._fd, self._end, table)
            size = self._end + len(table) - start
            self._laps.enter(Stage.BLOB_DIGEST)
            blob_digest = _move_to_front(self._fd, start, size, self._kept)
            self._laps.enter(None, size)
        except OSError as exc:
            raise self._spool_error(exc) from exc
        os.close(self._fd)
        self._fd = -1
        block_map = blockmap.BlockMap(
            block_bytes=self._block_bytes,
            frame_bytes=self._frame_bytes,
            image_bytes=layout.image_bytes,
            blob_bytes=size,
            metadata_offset=layout.metadata_offset,
            metadata_bytes=layout.metadata_bytes,
            blob_digest=blob_digest,
            source_digest=_raw(source_digest),
            diff_id=_raw(diff_id),
            chain_id=_raw(chain_id) if chain_id else None,
            compression_level=self._level,
            libzstd_version=LIBZSTD_VERSION,
            root_implied=root_implied,
            blocks=_map_blocks(entries),
        )
        map_bytes = blockmap.encode(block_map)
        return FinishedBlob(
            path=self._path,
            size=size,
            digest="sha256:" + blob_digest.hex(),
            block_map=block_map,
            map_bytes=map_bytes,
            map_digest=artifact.digest_of(map_bytes),
        )

    def abort(self) -> None:
        """Give up: wait for the threads that still work on this blob, and remove the spool file. Harmless
        when called again; after `finish`, the file is the FinishedBlob's owner's, and abort does nothing."""
        with self._lock:
            if self._fd < 0:
                return
            self._error = self._error or errors.ImagefsError("the layer blob was given up")
            self._lock.notify_all()
            self._lock.wait_for(lambda: not self._in_flight)
        os.close(self._fd)
        self._fd = -1
        self._path.unlink(missing_ok=True)

    # -- in the executor's threads -----------------------------------------------------------------------

    def _work(self, index: int, buffer: memoryview, length: int) -> None:
        # Reading an error without the lock risks one block of wasted work, no more.
        if self._error is None:
            with memoryview(buffer) as view, self._laps.meter.laps() as laps:
                packed = _pack(
                    compressor(self._level), view[:length], self._frame_bytes, self._block_bytes, laps
                )
                laps.enter(Stage.WRITE)
                with self._lock:
                    self._arrive(index, packed, buffer)
                laps.enter(None, len(packed.data))

    def _settle(self, future: concurrent.futures.Future[None]) -> None:
        cancelled = future.cancelled()
        error = errors.ImagefsError("the thread pool was shut down") if cancelled else future.exception()
        with self._lock:
            self._error = self._error or error
            self._in_flight -= 1
            self._lock.notify_all()
        if error is not None:
            self._pool.wake()

    def _arrive(self, index: int, packed: _Packed, buffer: memoryview | None) -> None:
        """Take a packed block (lock held), and write all blocks whose turn has come."""
        if index == 0:
            self._first = packed
            self._entries[0] = packed.entry
            assert buffer is not None
            self._pool.release(buffer)
            return
        self._waiting[index] = packed, buffer
        while self._error is None and self._next in self._waiting:
            ready, spent = self._waiting.pop(self._next)
            try:
                _write_at(self._fd, self._end, ready.data)
            except OSError as exc:
                self._error = self._spool_error(exc)
                self._pool.wake()
                break
            self._end += len(ready.data)
            self._entries[self._next] = ready.entry
            self._next += 1
            if spent is not None:
                self._pool.release(spent)
        self._lock.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _spool_error(self, exc: OSError) -> errors.ConfigurationError:
        return errors.ConfigurationError(
            f"spool file {self._path}: {exc.strerror}; free some space or choose another folder (TMPDIR)"
        )


_thread = threading.local()


def compressor(level: int) -> zstandard.ZstdCompressor:
    """This thread's compressor: one context, however many layers it works for."""
    made: tuple[int, zstandard.ZstdCompressor] | None = getattr(_thread, "compressor", None)
    if made is None or made[0] != level:
        made = _thread.compressor = level, _new_compressor(level)
    return made[1]


def _new_compressor(level: int) -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)


def _pack(
    compressor: zstandard.ZstdCompressor,
    view: memoryview,
    frame_bytes: int,
    block_bytes: int,
    laps: stages.Laps,
) -> _Packed:
    frames = [view[at : at + frame_bytes] for at in range(0, len(view), frame_bytes)]
    several = frame_bytes < block_bytes
    laps.enter(Stage.COMPRESS)
    compressed = [compressor.compress(frame) for frame in frames]
    laps.enter(Stage.BLOCK_DIGEST, len(view))
    entry = _Entry(
        digest=hashlib.sha256(view).digest(),
        frame_lengths=tuple(map(len, frames)),
        frame_compressed=tuple(map(len, compressed)),
        frame_digests=tuple(hashlib.sha256(frame).digest() for frame in frames) if several else (),
        zero=False,
    )
    laps.enter(None, len(view))
    return _Packed(entry, b"".join(compressed))


@functools.lru_cache(maxsize=1)
def _packed_zeros(block_bytes: int, frame_bytes: int, level: int) -> _Packed:
    """A full block of zeros, the same for all layers of a conversion."""
    packed = _pack(
        _new_compressor(level),
        memoryview(_zeros(block_bytes)),
        frame_bytes,
        block_bytes,
        stages.Meter().laps(),
    )
    return dataclasses.replace(packed, entry=dataclasses.replace(packed.entry, zero=True))


def _map_blocks(entries: Iterable[_Entry]) -> tuple[blockmap.Block, ...]:
    out = []
    offset = 0
    for entry in entries:
        compressed = sum(entry.frame_compressed)
        # A block of one frame has no digests of frames, hence no frames in the map.
        frames = tuple(map(blockmap.Frame, entry.frame_digests, entry.frame_compressed))
        out.append(blockmap.Block(entry.digest, offset, compressed, entry.zero, frames))
        offset += compressed
    return tuple(out)


def _seek_table(entries: Iterable[_Entry]) -> bytes:
    return seektable.encode(
        pair for entry in entries for pair in zip(entry.frame_compressed, entry.frame_lengths, strict=True)
    )


@functools.lru_cache(maxsize=1)
def _zeros(length: int) -> bytes:
    """One constant for all layers of a conversion: it is as large as a block."""
    return bytes(length)


def _is_zeros(buffer: memoryview) -> bool:
    # Views are compared byte by byte, bytes at once; a copy only of what begins like one.
    zeros = _zeros(len(buffer))
    return buffer[:_ZEROS_AHEAD_BYTES] == zeros[:_ZEROS_AHEAD_BYTES] and bytes(buffer) == zeros


def _compress_bound(length: int) -> int:
    """The most bytes that zstd needs for `length` bytes in one frame (ZSTD_compressBound)."""
    small = max(0, (128 * 1024 - length) >> 11)
    return length + (length >> 8) + small


def _write_at(fd: int, offset: int, data: bytes | memoryview) -> None:
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)


def _move_to_front(fd: int, start: int, size: int, kept: bool) -> bytes:
    """Make `size` bytes from `start` the whole file; returns their sha256. If the file is `kept`, the kernel
    begins to write it to disk."""
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(_MOVED_PIECE_BYTES))
    at = behind = 0
    while at < size:
        got = os.preadv(fd, [buffer[: min(size - at, len(buffer))]], start + at)
        hasher.update(buffer[:got])
        _write_at(fd, at, buffer[:got])
        at += got
        if kept and at - behind >= _WRITTEN_BEHIND_BYTES:
            # A filesystem may not know it, and what is wrong with a disk is said to who syncs the file.
            with contextlib.suppress(OSError):
                syscalls.start_writing(fd, behind, at - behind)
            behind = at
    os.ftruncate(fd, size)
    return hasher.digest()


def _raw(digest: str) -> bytes:
    return bytes.fromhex(digest.removeprefix("sha256:"))
