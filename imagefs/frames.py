"""From the compressed bytes of one block to its verified uncompressed bytes.

Pure: bytes in, bytes out. Called by the fetcher's threads, by the file-level mount and by `check`, from any
thread (each has a decompressor of its own; zstd and sha256 release the interpreter lock). What comes out was
compared with the digest in the block map, whole; sizes are compared with the map before anything of that
size is allocated, so that a frame cannot ask for more memory than its block.
"""

from __future__ import annotations

import hashlib
import threading

import zstandard

from imagefs import blockmap, errors

_local = threading.local()


def compressed_bound(block_map: blockmap.BlockMap, index: int) -> int:
    """The most bytes that the frames of block `index` can take: zstd's own bound for each frame."""
    length = block_map.block_length(index)
    whole, rest = divmod(length, block_map.frame_bytes)
    return whole * _frame_bound(block_map.frame_bytes) + (_frame_bound(rest) if rest else 0)


def check_sizes(block_map: blockmap.BlockMap, layer: str) -> None:
    """Raise InvalidInputError if a block claims more compressed bytes than zstd can make of it: the
    receive buffer is as large as this claim."""
    full_bound = compressed_bound(block_map, 0)
    last = len(block_map.blocks) - 1
    for index, block in enumerate(block_map.blocks):
        bound = full_bound if index < last else compressed_bound(block_map, index)
        if block.compressed_bytes > bound:
            raise errors.InvalidInputError(
                f"layer {layer}: block {index}: {block.compressed_bytes} compressed bytes for "
                f"{block_map.block_length(index)}, zstd needs at most {bound}"
            )


def decode_block(block_map: blockmap.BlockMap, index: int, compressed: memoryview, layer: str) -> bytes:
    """The uncompressed bytes of block `index`, from exactly its bytes in the layer blob.

    Raises IntegrityError, naming `layer`, block and offset, unless they are the frames that the map
    describes, nothing more, and hash to the block's digest.
    """
    block = block_map.blocks[index]
    if len(compressed) != block.compressed_bytes:
        raise _damaged(block_map, index, layer, f"{len(compressed)} bytes came")
    length = block_map.block_length(index)
    if block.frames:
        pieces = []
        start = 0
        for number, frame in enumerate(block.frames):
            expected = min(block_map.frame_bytes, length - number * block_map.frame_bytes)
            part = compressed[start : start + frame.compressed_bytes]
            pieces.append(_decompress(part, expected, block_map, index, layer))
            start += frame.compressed_bytes
        data = b"".join(pieces)
    else:
        data = _decompress(compressed, length, block_map, index, layer)
    if hashlib.sha256(data).digest() != block.digest:
        raise _damaged(block_map, index, layer, "the bytes differ from the block's digest")
    return data


def _decompress(
    frame: memoryview, expected: int, block_map: blockmap.BlockMap, index: int, layer: str
) -> bytes:
    """One frame of exactly `expected` bytes. A skippable frame declares 0 bytes, an unsized one -1: both
    are refused here, before the output is allocated."""
    try:
        declared = zstandard.frame_content_size(frame)
        if declared != expected:
            raise _damaged(block_map, index, layer, f"a frame declares {declared} bytes, not {expected}")
        data = _decompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise _damaged(block_map, index, layer, f"zstd: {exc}") from exc
    if len(data) != expected:
        raise _damaged(block_map, index, layer, f"a frame holds {len(data)} bytes, not {expected}")
    return data


def _decompressor() -> zstandard.ZstdDecompressor:
    found: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if found is None:
        found = _local.decompressor = zstandard.ZstdDecompressor(max_window_size=blockmap.MAX_BLOCK_BYTES)
    return found


def _frame_bound(length: int) -> int:
    """ZSTD_COMPRESSBOUND of zstd.h, and the 4 bytes of an optional checksum."""
    small = (128 * 1024 - length) >> 11 if length < 128 * 1024 else 0
    return length + (length >> 8) + small + 4


def _damaged(block_map: blockmap.BlockMap, index: int, layer: str, what: str) -> errors.IntegrityError:
    block = block_map.blocks[index]
    return errors.IntegrityError(
        f"layer {layer}: block {index} (blob bytes {block.offset}+{block.compressed_bytes}): {what}"
    )
