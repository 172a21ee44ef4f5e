"""A layer's tree and file data -> its layer image, in one pass, in blocks.

Called by the pipeline in one thread per layer: `add_file` for each file's data as the tar gives it, then
`finish` with the tree. Blocks go to a `BlockSink` in the order 1, 2, ... n-1, and 0 last, because the
superblock in block 0 names where the metadata lies.

Invariants: data starts on 4 KiB boundaries, on a block boundary for files of `block_bytes` or more (the same
file then gives the same blocks in every image); the output is a function of the calls; at most three sink
buffers are held at a time (block 0, and two while metadata is written). No I/O of its own.
The layout is docs/format.md's; the metadata region is `erofs_metadata`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Final, Protocol

from converter import erofs_metadata, errors
from converter.tree import Node
from imagefs.erofs import ondisk

INLINE_LIMIT_BYTES: Final = 256
"""A file, or its part past the last full 4 KiB, of at most this is kept beside its inode.

The metadata region is prefetched whole, so this buys small files without a fetch at the price of a larger
prefetch; docs/format.md has the figures.
"""

_BLOCK_BITS = ondisk.BLOCK_BITS
_BLOCK_BYTES = ondisk.BLOCK_BYTES
_MAX_IMAGE_BYTES = 1 << 44


class BlockSink(Protocol):
    """Where the blocks go."""

    def acquire(self) -> bytearray:
        """A buffer of `block_bytes` zeros; may block until one is free."""

    def put(self, index: int, buffer: bytearray, length: int) -> None:
        """Take block `index`. `length` is less than `block_bytes` only for the last block of the image."""

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
        self._block_bytes = block_bytes
        self._blocks = _OpenBlocks(sink, block_bytes)
        self._index = 0
        self._view = memoryview(self._blocks.buffer(0))
        # The superblock has the first 4 KiB.
        self._position = _BLOCK_BYTES

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
            if self._position + flat_bytes > _MAX_IMAGE_BYTES:
                raise errors.LimitError(f"layer image: more than {_MAX_IMAGE_BYTES} bytes, EROFS's limit")
            node.data_start = self._position
            hole_bytes = self._write_flat(flat_bytes, source)
            self._position = _round_up(self._position, _BLOCK_BYTES)
        node.tail = _read_tail(tail_bytes, hole_bytes, source) if tail_bytes else b""

    def _write_flat(self, left: int, source: FileData) -> int:
        """Write `left` bytes; returns by how much the last hole went on beyond them."""
        mask = self._block_bytes - 1
        while left:
            hole = source.hole_ahead()
            if hole:
                source.skip_hole()
                skipped = min(hole, left)
                self._position += skipped
                left -= skipped
                if not left:
                    return hole - skipped
            within = self._position & mask
            index = self._position // self._block_bytes
            if index != self._index:
                self._open(index)
            got = source.readinto(self._view[within : within + left])
            if got == 0:
                raise errors.InvalidLayerError(f"file data ends {left} bytes early")
            self._position += got
            left -= got
        return 0

    def _open(self, index: int) -> None:
        self._view.release()
        # Blocks that a hole covered whole were never acquired: they go out as zeros.
        self._blocks.put_below(index)
        self._view = memoryview(self._blocks.buffer(index))
        self._index = index

    def finish(self, root: Node) -> Layout:
        """Write the metadata region for the tree and the superblock; the sink has every block afterwards."""
        self._view.release()
        start = self._position
        region = _MetadataBlocks(self._blocks, self._block_bytes, start)
        written = erofs_metadata.write(root, start, region)
        end = start + written.region_bytes
        region.close(end)
        superblock = ondisk.Superblock(
            root_nid=written.root_nid,
            inodes=written.inodes,
            blocks=end // _BLOCK_BYTES,
            metadata_block=start // _BLOCK_BYTES,
            uuid=region.uuid(),
        )
        first = self._blocks.buffer(0)
        first[ondisk.SUPERBLOCK_OFFSET : _BLOCK_BYTES] = ondisk.encode_superblock(superblock)
        self._blocks.put_first(min(end, self._block_bytes))
        return Layout(end, start, written.region_bytes, written.inodes)


class _OpenBlocks:
    """The sink buffers that are being filled. Block 0 stays open to the end."""

    def __init__(self, sink: BlockSink, block_bytes: int) -> None:
        self._sink = sink
        self._block_bytes = block_bytes
        self._open: dict[int, bytearray] = {}
        self.next_index = 1

    def buffer(self, index: int) -> bytearray:
        """The buffer of an open block, or of one not reached yet."""
        found = self._open.get(index)
        if found is None:
            found = self._open[index] = self._sink.acquire()
        return found

    def put_below(self, index: int, image_bytes: int = _MAX_IMAGE_BYTES) -> None:
        """Hand over every block from 1 to `index` - 1 that was not yet."""
        for number in range(self.next_index, index):
            buffer = self._open.pop(number, None)
            if buffer is None:
                self._sink.put_zeros(number)
            else:
                length = min(self._block_bytes, image_bytes - number * self._block_bytes)
                self._sink.put(number, buffer, length)
        self.next_index = max(self.next_index, index)

    def put_first(self, length: int) -> None:
        """Hand over block 0."""
        self._sink.put(0, self._open.pop(0), length)


class _MetadataBlocks:
    """The metadata region on its way into blocks: `erofs_metadata.Target`.

    Hashes the region for the image's uuid: overlayfs tells lower layers apart by it, and a random one would
    not be deterministic.
    """

    def __init__(self, blocks: _OpenBlocks, block_bytes: int, start: int) -> None:
        self._blocks = blocks
        self._block_bytes = block_bytes
        self._start = start
        self._hasher = hashlib.sha256()

    def at(self, offset: int) -> tuple[bytearray, int]:
        return self._blocks.buffer(offset // self._block_bytes), offset % self._block_bytes

    def done_below(self, offset: int) -> None:
        index = offset // self._block_bytes
        if index > self._blocks.next_index:
            self._hash_below(index * self._block_bytes)
            self._blocks.put_below(index)

    def close(self, end: int) -> None:
        """Hand over what is left but block 0."""
        self._hash_below(end)
        if self._start < self._block_bytes:
            self._hash(0, self._start, min(end, self._block_bytes))
        self._blocks.put_below(-(-end // self._block_bytes), end)

    def _hash_below(self, end: int) -> None:
        first = max(self._blocks.next_index, self._start // self._block_bytes)
        for index in range(first, -(-end // self._block_bytes)):
            begin = index * self._block_bytes
            self._hash(index, max(self._start - begin, 0), min(end - begin, self._block_bytes))

    def _hash(self, index: int, begin: int, end: int) -> None:
        with memoryview(self._blocks.buffer(index)) as view:
            self._hasher.update(view[begin:end])

    def uuid(self) -> bytes:
        """A version 8 (custom) UUID from the digest of the region."""
        value = bytearray(self._hasher.digest()[:16])
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
