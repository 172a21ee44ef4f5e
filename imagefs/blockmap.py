"""The block map: where the blocks of one layer image lie in its layer blob, and what each must hash to.

Pure: bytes in, values out. Written by the converter, read by everything that reads lazily. The byte table
is docs/format.md; `decode(encode(m)) == m` and `encode(decode(b)) == b` hold for every accepted input.

Invariants of a decoded map: blocks are in order, their frames lie one after another in the blob without
gaps from byte 0; every block but the last has `block_bytes` bytes; offsets never pass `blob_bytes`; a block
flagged zero, which nobody fetches, has the digest of zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import struct

from imagefs import errors

MAGIC = b"GPBLKMAP"
VERSION = 1
MIN_BLOCK_BYTES = 64 * 1024
MAX_BLOCK_BYTES = 16 * 1024 * 1024
DEFAULT_BLOCK_BYTES = 4 * 1024 * 1024
MIN_FRAME_BYTES = 4096
DEFAULT_FRAME_BYTES = DEFAULT_BLOCK_BYTES
"""What the converter makes of blocks that are larger; `e2e/bench.py --parts blocks` compares sizes."""
MAX_IMAGE_BYTES = 1 << 44
"""EROFS addresses 2^32 filesystem blocks of 4 KiB."""
MAX_MAP_BYTES = 128 * 1024 * 1024
"""Of all maps of an image together: 2.6 million blocks, 10 TiB at the default block size."""

FLAG_ROOT_IMPLIED = 1 << 0
"""The tar had no entry for the root directory: its attributes come from the layers below."""
_KNOWN_FLAGS = FLAG_ROOT_IMPLIED

BLOCK_ZERO = 1 << 0
"""Every byte of the block is zero: it is never fetched."""
_KNOWN_BLOCK_FLAGS = BLOCK_ZERO

_HEADER = struct.Struct("<8sHHIIIIIIiQQQQ32s32s32s32s")
_BLOCK = struct.Struct("<32sQII")
_FRAME = struct.Struct("<32sI")
_ZERO_DIGEST = bytes(32)


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """One zstd frame inside a block. `digest` is the sha256 of its uncompressed bytes."""

    digest: bytes
    compressed_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One block. `digest` is the sha256 of its uncompressed bytes; the last block at its true length.

    `offset` and `compressed_bytes` give the place of its frames in the layer blob. `frames` is empty when
    the block is a single frame.
    """

    digest: bytes
    offset: int
    compressed_bytes: int
    zero: bool = False
    frames: tuple[Frame, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class BlockMap:
    """A decoded block map. Sizes in bytes, digests as 32 raw bytes.

    `chain_id` is None when the layer image depends on its own tar alone, else the chain_id of the layer.
    """

    block_bytes: int
    frame_bytes: int
    image_bytes: int
    blob_bytes: int
    metadata_offset: int
    metadata_bytes: int
    blob_digest: bytes
    source_digest: bytes
    diff_id: bytes
    chain_id: bytes | None
    compression_level: int
    libzstd_version: int
    root_implied: bool
    blocks: tuple[Block, ...]

    def block_length(self, index: int) -> int:
        """Uncompressed bytes of block `index`."""
        return min(self.block_bytes, self.image_bytes - index * self.block_bytes)

    def metadata_blocks(self) -> list[int]:
        """Indices, ascending, of the blocks that hold the superblock (block 0) or the metadata region."""
        first = self.metadata_offset // self.block_bytes
        end = block_count(self.metadata_offset + self.metadata_bytes, self.block_bytes)
        return sorted({0, *range(first, end)})


def block_count(image_bytes: int, block_bytes: int) -> int:
    """Number of blocks of an image."""
    return (image_bytes + block_bytes - 1) // block_bytes


def check_block_bytes(block_bytes: int) -> None:
    """Raise InvalidInputError unless `block_bytes` is a power of two from 64 KiB to 16 MiB."""
    if block_bytes & (block_bytes - 1) or not MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES:
        raise errors.InvalidInputError(
            f"block size {block_bytes} is not a power of two from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES}"
        )


def check_frame_bytes(frame_bytes: int, block_bytes: int) -> None:
    """Raise InvalidInputError unless `frame_bytes` is a power of two from 4 KiB to the block size."""
    if frame_bytes & (frame_bytes - 1) or not MIN_FRAME_BYTES <= frame_bytes <= block_bytes:
        raise errors.InvalidInputError(
            f"frame size {frame_bytes} is not a power of two from {MIN_FRAME_BYTES} "
            f"to the block size {block_bytes}"
        )


def encode(value: BlockMap) -> bytes:
    """The byte form of a map (docs/format.md)."""
    out = bytearray(
        _HEADER.pack(
            MAGIC,
            VERSION,
            _HEADER.size,
            FLAG_ROOT_IMPLIED if value.root_implied else 0,
            value.block_bytes,
            value.frame_bytes,
            len(value.blocks),
            sum(len(block.frames) for block in value.blocks),
            value.libzstd_version,
            value.compression_level,
            value.image_bytes,
            value.blob_bytes,
            value.metadata_offset,
            value.metadata_bytes,
            value.blob_digest,
            value.source_digest,
            value.diff_id,
            value.chain_id or _ZERO_DIGEST,
        )
    )
    for block in value.blocks:
        out += _BLOCK.pack(
            block.digest, block.offset, block.compressed_bytes, BLOCK_ZERO if block.zero else 0
        )
    for block in value.blocks:
        for frame in block.frames:
            out += _FRAME.pack(frame.digest, frame.compressed_bytes)
    return bytes(out)


def decode(data: bytes) -> BlockMap:
    """Parse and validate a map. Raises InvalidInputError naming the field; nothing is allocated before
    the counts were checked against the length of `data`."""
    if len(data) < _HEADER.size:
        raise errors.InvalidInputError(f"block map: {len(data)} bytes, shorter than its header")
    (
        magic,
        version,
        header_bytes,
        flags,
        block_bytes,
        frame_bytes,
        blocks,
        frames,
        libzstd,
        level,
        image_bytes,
        blob_bytes,
        metadata_offset,
        metadata_bytes,
        blob_digest,
        source_digest,
        diff_id,
        chain_id,
    ) = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise errors.InvalidInputError("block map: wrong magic, this is not a block map")
    if version != VERSION:
        raise errors.InvalidInputError(f"block map: version {version}, this build reads version {VERSION}")
    if header_bytes != _HEADER.size:
        raise errors.InvalidInputError(f"block map: header of {header_bytes} bytes, expected {_HEADER.size}")
    if flags & ~_KNOWN_FLAGS:
        raise errors.InvalidInputError(f"block map: unknown flags {flags:#x}")
    check_block_bytes(block_bytes)
    check_frame_bytes(frame_bytes, block_bytes)
    if not 0 < image_bytes <= MAX_IMAGE_BYTES or image_bytes % 4096:
        raise errors.InvalidInputError(f"block map: image size {image_bytes} is out of range")
    if blocks != block_count(image_bytes, block_bytes):
        raise errors.InvalidInputError(f"block map: {blocks} blocks do not make {image_bytes} bytes")
    frames_per_block = block_bytes // frame_bytes
    expected_frames = 0 if frames_per_block == 1 else block_count(image_bytes, frame_bytes)
    if frames != expected_frames:
        raise errors.InvalidInputError(f"block map: {frames} frames, expected {expected_frames}")
    if len(data) != _HEADER.size + blocks * _BLOCK.size + frames * _FRAME.size:
        raise errors.InvalidInputError(f"block map: {len(data)} bytes do not fit its counts")
    if metadata_offset % 4096 or metadata_bytes == 0 or metadata_offset + metadata_bytes > image_bytes:
        raise errors.InvalidInputError("block map: metadata region lies outside the image")
    return BlockMap(
        block_bytes=block_bytes,
        frame_bytes=frame_bytes,
        image_bytes=image_bytes,
        blob_bytes=blob_bytes,
        metadata_offset=metadata_offset,
        metadata_bytes=metadata_bytes,
        blob_digest=blob_digest,
        source_digest=source_digest,
        diff_id=diff_id,
        chain_id=None if chain_id == _ZERO_DIGEST else chain_id,
        compression_level=level,
        libzstd_version=libzstd,
        root_implied=bool(flags & FLAG_ROOT_IMPLIED),
        blocks=_decode_blocks(data, blocks, blob_bytes, image_bytes, block_bytes, frame_bytes),
    )


def _decode_blocks(
    data: bytes, count: int, blob_bytes: int, image_bytes: int, block_bytes: int, frame_bytes: int
) -> tuple[Block, ...]:
    frames_per_block = block_bytes // frame_bytes
    table = memoryview(data)[_HEADER.size : _HEADER.size + count * _BLOCK.size]
    frames_left = block_count(image_bytes, frame_bytes)
    position = _HEADER.size + count * _BLOCK.size
    expected_offset = 0
    out = []
    for index, (digest, offset, compressed, flags) in enumerate(_BLOCK.iter_unpack(table)):
        if flags & ~_KNOWN_BLOCK_FLAGS:
            raise errors.InvalidInputError(f"block map: block {index}: unknown flags {flags:#x}")
        if offset != expected_offset or compressed == 0 or offset + compressed > blob_bytes:
            raise errors.InvalidInputError(
                f"block map: block {index}: place {offset}+{compressed} leaves a gap or the blob"
            )
        if flags & BLOCK_ZERO and digest != _digest_of_zeros(
            min(block_bytes, image_bytes - index * block_bytes)
        ):
            raise errors.InvalidInputError(f"block map: block {index}: flagged zero, with another digest")
        expected_offset = offset + compressed
        frames: tuple[Frame, ...] = ()
        if frames_per_block > 1:
            own = min(frames_per_block, frames_left)
            frames_left -= own
            end = position + own * _FRAME.size
            frames = tuple(Frame(d, c) for d, c in _FRAME.iter_unpack(memoryview(data)[position:end]))
            position = end
            if sum(frame.compressed_bytes for frame in frames) != compressed:
                raise errors.InvalidInputError(f"block map: block {index}: frames do not add up to the block")
        out.append(Block(digest, offset, compressed, bool(flags & BLOCK_ZERO), frames))
    return tuple(out)


@functools.lru_cache(maxsize=16)
def _digest_of_zeros(length: int) -> bytes:
    return hashlib.sha256(bytes(length)).digest()
