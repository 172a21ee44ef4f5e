"""The seek table that ends a layer blob, in zstd's seekable format (version 0.1.0), without checksums.

Pure. It lets tools that know that format seek in the blob; we ourselves read the block map.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from imagefs.blockmap import BlockMap

_SKIPPABLE = struct.Struct("<II")
_ENTRY = struct.Struct("<II")
_FOOTER = struct.Struct("<IBI")
_SKIPPABLE_MAGIC = 0x184D2A5E
_SEEKABLE_MAGIC = 0x8F92EAB1
MAX_ENTRIES = 0x8000000
MAX_BYTES = _SKIPPABLE.size + MAX_ENTRIES * _ENTRY.size + _FOOTER.size


def entries(block_map: BlockMap) -> list[tuple[int, int]]:
    """(compressed bytes, uncompressed bytes) of each frame of a layer blob, in order."""
    out = []
    for index, block in enumerate(block_map.blocks):
        left = block_map.block_length(index)
        if not block.frames:
            out.append((block.compressed_bytes, left))
        for frame in block.frames:
            length = min(block_map.frame_bytes, left)
            left -= length
            out.append((frame.compressed_bytes, length))
    return out


def encode(table: Iterable[tuple[int, int]]) -> bytes:
    """The skippable frame that holds the table; each entry is (compressed, uncompressed) bytes."""
    packed = [_ENTRY.pack(compressed, uncompressed) for compressed, uncompressed in table]
    body_bytes = len(packed) * _ENTRY.size + _FOOTER.size
    return b"".join(
        (
            _SKIPPABLE.pack(_SKIPPABLE_MAGIC, body_bytes),
            *packed,
            _FOOTER.pack(len(packed), 0, _SEEKABLE_MAGIC),
        )
    )
