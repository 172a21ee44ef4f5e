"""A layer's tree and file data -> its layer image, in one pass, in blocks.

Called by the pipeline in one thread per layer: `add_file` for each file's data as the tar gives it, then
`finish` with the tree. Blocks go to a `BlockSink` in the order 1, 2, ... n-1, and 0 last.

Data starts in block 1. The metadata region is known last, and goes where a mount finds it with the fewest
blocks: behind the superblock in block 0 where it fits, else into blocks of its own after the data. Data that
fits into block 0 together with it moves there, so that a tiny layer is one block.

Invariants: data starts on 4 KiB boundaries, on a block boundary for files of `block_bytes` or more (the same
file then gives the same blocks in every image); the output is a function of the calls; at most
`MOST_BUFFERS` sink buffers are held at a time. No I/O of its own.
The layout is docs/format.md's; the metadata region is `erofs_metadata`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Final, Protocol

from converter import erofs_metadata, errors
from converter.tree import Node
from imagefs.erofs import ondisk

LAYOUT_VERSION: Final = 1
"""Part of the reuse key, so that no layer is reused that was written otherwise. Raise it with any change to
which bytes a tree and its data become, the tree's own rules included: a test holds both to known digests."""

INLINE_LIMIT_BYTES: Final = 256
"""A file, or its part past the last full 4 KiB, of at most this is kept beside its inode.

The metadata region is prefetched whole, so this buys small files without a fetch at the price of a larger
prefetch; docs/format.md has the figures.
"""

MOST_BUFFERS: Final = 2
"""Sink buffers that a writer holds at most, both of them only while it writes a metadata region of several
blocks. With two it waits for nothing but the sink."""

_BLOCK_BYTES = ondisk.BLOCK_BYTES
_MAX_IMAGE_BYTES = 1 << 44


class BlockSink(Protocol):
    """Where the blocks go."""

    def acquire(self) -> memoryview:
        """A buffer of `block_bytes`, whatever it holds; may block until one is free."""

    def put(self, index: int, buffer: memoryview, length: int) -> None:
        """Take the first `length` bytes as block `index`: less than all only of the image's last block."""

    def put_zeros(self, index: int) -> None:
        """Take a full block of zeros as block `index`."""


class FileData(Protocol):
    """The content of one file, in order (`tarstream.TarReader` is one)."""

    def readinto(self, view: memoryview) -> int:
        """Fill a part of `view` from the current position; 0 at the end."""

    def hole_ahead(self) -> int:
        """Bytes of hole at the current position, 0 where data follows."""

    def skip_hole(self) -> None:
        """Go to the end of that hole."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in a finished image; bytes. `inodes` counts inodes."""

    image_bytes: int
    metadata_offset: int
    metadata_bytes: int
    inodes: int


class ErofsWriter:
    """Writes one layer image to `sink`."""

    def __init__(self, sink: BlockSink, block_bytes: int) -> None:
        self._sink = sink
        self._block_bytes = block_bytes
        self._data = _DataBlocks(sink, block_bytes)
        self._position = 0
        """Where the next file's data goes, from the start of the data."""

    def add_file(self, node: Node, size: int, source: FileData) -> None:
        """Write a regular file's `size` bytes, and set the node's `size`, `data_start` and `tail`."""
        tail_bytes = size % _BLOCK_BYTES
        if tail_bytes > INLINE_LIMIT_BYTES:
            tail_bytes = 0
        flat_bytes = size - tail_bytes
        node.size = size
        node.data_start = -1
        hole_bytes = 0
        if flat_bytes:
            if size >= self._block_bytes:
                self._position = _round_up(self._position, self._block_bytes)
            if self._block_bytes + self._position + flat_bytes > _MAX_IMAGE_BYTES:
                raise errors.LimitError(f"layer image: more than {_MAX_IMAGE_BYTES} bytes, EROFS's limit")
            node.data_start = self._position
            hole_bytes = self._write_flat(flat_bytes, source)
            self._position = _round_up(self._position, _BLOCK_BYTES)
        node.tail = _read_tail(tail_bytes, hole_bytes, source) if tail_bytes else b""

    def _write_flat(self, left: int, source: FileData) -> int:
        """Write `left` bytes; returns by how much the last hole went on beyond them."""
        while left:
            hole = source.hole_ahead()
            if hole:
                source.skip_hole()
                skipped = min(hole, left)
                self._position += skipped
                left -= skipped
                if not left:
                    return hole - skipped
            got = self._data.read(self._position, left, source)
            if got == 0:
                raise errors.InvalidLayerError(f"file data ends {left} bytes early")
            self._position += got
            left -= got
        return 0

    def finish(self, root: Node) -> Layout:
        """Write the metadata region for the tree and the superblock; the sink has every block afterwards."""
        plan = erofs_metadata.plan(root)
        head_bytes = _BLOCK_BYTES + plan.region_bytes
        if head_bytes + self._position <= self._block_bytes:
            return self._finish_as_one_block(root, plan)
        if head_bytes <= self._block_bytes:
            return self._finish_with_metadata_first(root, plan)
        return self._finish_with_metadata_last(root, plan)

    def _finish_as_one_block(self, root: Node, plan: erofs_metadata.Plan) -> Layout:
        data_start = _BLOCK_BYTES + plan.region_bytes
        first = self._data.move(self._position, data_start)
        return self._finish_first(first, root, plan, data_start, data_start + self._position)

    def _finish_with_metadata_first(self, root: Node, plan: erofs_metadata.Plan) -> Layout:
        self._data.close(self._position)
        first = _zeroed(self._sink, self._block_bytes)
        return self._finish_first(first, root, plan, self._block_bytes, self._block_bytes + self._position)

    def _finish_first(
        self, first: memoryview, root: Node, plan: erofs_metadata.Plan, data_start: int, end: int
    ) -> Layout:
        """Complete a block 0 that the metadata goes into."""
        erofs_metadata.write(root, plan, _BLOCK_BYTES, data_start, _OneBuffer(first))
        with memoryview(first) as view:
            digest = hashlib.sha256(view[_BLOCK_BYTES : _BLOCK_BYTES + plan.region_bytes]).digest()
        return self._put_first(first, plan, _BLOCK_BYTES, end, digest)

    def _finish_with_metadata_last(self, root: Node, plan: erofs_metadata.Plan) -> Layout:
        start = self._block_bytes + _round_up(self._position, self._block_bytes)
        end = start + plan.region_bytes
        self._data.close(start - self._block_bytes)
        region = _MetadataBlocks(self._sink, self._block_bytes, start, end)
        erofs_metadata.write(root, plan, start, self._block_bytes, region)
        digest = region.close()
        return self._put_first(_zeroed(self._sink, self._block_bytes), plan, start, end, digest)

    def _put_first(
        self, first: memoryview, plan: erofs_metadata.Plan, start: int, end: int, digest: bytes
    ) -> Layout:
        superblock = ondisk.Superblock(
            root_nid=plan.root_nid,
            inodes=plan.inodes,
            blocks=end // _BLOCK_BYTES,
            metadata_block=start // _BLOCK_BYTES,
            uuid=_uuid(digest),
        )
        first[ondisk.SUPERBLOCK_OFFSET : _BLOCK_BYTES] = ondisk.encode_superblock(superblock)
        self._sink.put(0, first, min(end, self._block_bytes))
        return Layout(end, start, plan.region_bytes, plan.inodes)


class _DataBlocks:
    """File data on its way into blocks 1, 2, ... Positions count from the start of block 1.

    One buffer is open at a time. `_filled` is up to where it was written; what is passed over is made zeros
    when it is known, because most of a buffer is overwritten anyway.
    """

    def __init__(self, sink: BlockSink, block_bytes: int) -> None:
        self._sink = sink
        self._block_bytes = block_bytes
        self._next = 0
        """Which block of the data is put next, and stands in `_buffer` if there is one: block `_next` + 1 of
        the image."""
        self._buffer: memoryview | None = None
        self._view = memoryview(b"")
        self._filled = 0

    def read(self, position: int, length: int, source: FileData) -> int:
        """Read up to `length` bytes, not beyond a block, to `position`; returns how many."""
        index, within = divmod(position, self._block_bytes)
        if self._buffer is None or index != self._next:
            self._put_below(index)
            self._open()
        self._pad(within)
        got = source.readinto(self._view[within : within + length])
        self._filled = within + got
        return got

    def move(self, length: int, offset: int) -> memoryview:
        """The `length` bytes of data so far (none was put yet), moved to `offset` of a buffer that has zeros
        before it. The buffer is the caller's to put."""
        if self._buffer is None:
            self._open()
        buffer = self._buffer
        assert buffer is not None
        self._pad(length)
        self._view[offset : offset + length] = self._view[:length]
        self._view[:offset] = bytes(offset)
        self._view.release()
        self._buffer = None
        return buffer

    def close(self, end: int) -> None:
        """Hand over every block up to `end`."""
        count, rest = divmod(end, self._block_bytes)
        self._put_below(count)
        if rest:
            if self._buffer is None:
                self._open()
            self._put(rest)

    def _open(self) -> None:
        self._buffer = self._sink.acquire()
        self._view = memoryview(self._buffer)
        self._filled = 0

    def _put_below(self, index: int) -> None:
        """Hand over every block below `index`. Those that a hole covers whole were never acquired."""
        if self._buffer is not None and self._next < index:
            self._put(self._block_bytes)
        while self._next < index:
            self._next += 1
            self._sink.put_zeros(self._next)

    def _put(self, length: int) -> None:
        assert self._buffer is not None
        self._pad(length)
        self._view.release()
        self._next += 1
        self._sink.put(self._next, self._buffer, length)
        self._buffer = None

    def _pad(self, end: int) -> None:
        """Zeros from what was filled up to `end`."""
        if self._filled < end:
            self._view[self._filled : end] = bytes(end - self._filled)
            self._filled = end


class _OneBuffer:
    """Block 0 as `erofs_metadata.Target`."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer

    def at(self, offset: int) -> tuple[memoryview, int]:
        return self._buffer, offset

    def done_below(self, offset: int) -> None:
        return


class _MetadataBlocks:
    """A metadata region on its way into blocks of its own: `erofs_metadata.Target`."""

    def __init__(self, sink: BlockSink, block_bytes: int, start: int, end: int) -> None:
        self._sink = sink
        self._block_bytes = block_bytes
        self._next = start // block_bytes
        self._end = end
        self._open: dict[int, memoryview] = {}
        self._hasher = hashlib.sha256()

    def at(self, offset: int) -> tuple[memoryview, int]:
        index, within = divmod(offset, self._block_bytes)
        buffer = self._open.get(index)
        if buffer is None:
            buffer = self._open[index] = _zeroed(self._sink, self._block_bytes)
        return buffer, within

    def done_below(self, offset: int) -> None:
        while (self._next + 1) * self._block_bytes <= offset:
            self._put()

    def close(self) -> bytes:
        """Hand over what is left; the digest of the region."""
        while self._next * self._block_bytes < self._end:
            self._put()
        return self._hasher.digest()

    def _put(self) -> None:
        begin = self._next * self._block_bytes
        buffer, _ = self.at(begin)
        length = min(self._block_bytes, self._end - begin)
        with memoryview(buffer) as view:
            self._hasher.update(view[:length])
        del self._open[self._next]
        self._sink.put(self._next, buffer, length)
        self._next += 1


def _zeroed(sink: BlockSink, length: int) -> memoryview:
    buffer = sink.acquire()
    buffer[:] = bytes(length)
    return buffer


def _uuid(digest: bytes) -> bytes:
    """A version 8 (custom) UUID from the digest of the metadata region: overlayfs tells lower layers apart by
    it, and a random one would not be deterministic."""
    value = bytearray(digest[:16])
    value[6] = value[6] & 0x0F | 0x80
    value[8] = value[8] & 0x3F | 0x80
    return bytes(value)


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) & -multiple


def _read_tail(length: int, hole_bytes: int, source: FileData) -> bytes:
    """The last `length` bytes of a file, whose first `hole_bytes` a hole already passed over."""
    buffer = bytearray(length)
    position = min(hole_bytes, length)
    with memoryview(buffer) as view:
        while position < length:
            hole = source.hole_ahead()
            if hole:
                source.skip_hole()
                position += min(hole, length - position)
                continue
            got = source.readinto(view[position:])
            if got == 0:
                raise errors.InvalidLayerError(f"file data ends {length - position} bytes early")
            position += got
    return bytes(buffer)
