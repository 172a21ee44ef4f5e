"""Verify a block image against its own digests, from the first byte of each layer blob to the last.

Called by `glowplug check`. One thread per layer is the caller's choice: `verify_layer` keeps no state and
holds one block at a time, so memory does not grow with the image. Reads each blob once, in order.

What holds afterwards, for each layer: the blob has the digest and size that manifest and block map say;
the blob is the frames of the map's blocks followed by the seek table of exactly those frames; each block
has its digest, each frame its own, a block flagged zero that of zeros (no other decodes); the superblock is
one that our writer makes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

from imagefs import erofs, errors, frames, seektable
from imagefs.artifact import Descriptor
from imagefs.lazylayer import LazyLayer


@dataclasses.dataclass(frozen=True, slots=True)
class Verified:
    """What one layer came to. Bytes of the layer image, bytes of its blob, and its blocks."""

    blocks: int
    zero_blocks: int
    image_bytes: int
    blob_bytes: int


def verify_layer(
    layer: LazyLayer, blob: Descriptor, progress: Callable[[int], None] = lambda read_bytes: None
) -> Verified:
    """Read a layer's whole blob and verify it. Raises IntegrityError naming layer, block and offset;
    `progress` is told the compressed bytes of each block as it is verified."""
    block_map = layer.block_map
    if blob.size != block_map.blob_bytes:
        raise errors.IntegrityError(
            f"layer {layer.map_digest}: the manifest says its blob has {blob.size} bytes, "
            f"the block map {block_map.blob_bytes}"
        )
    pieces = frames.Pieces(layer.origin.stream_blob(layer.blob_digest, blob.size))
    buffer = memoryview(bytearray(block_map.block_bytes))
    zero_blocks = 0
    for index, block in enumerate(block_map.blocks):
        data = frames.decode_block(block_map, index, pieces, layer.map_digest, buffer)
        zero_blocks += block.zero
        for number, frame in enumerate(block.frames):
            start = number * block_map.frame_bytes
            if hashlib.sha256(data[start : start + block_map.frame_bytes]).digest() != frame.digest:
                raise errors.IntegrityError(
                    f"layer {layer.map_digest}: block {index}, frame {number}: its digest in the map is wrong"
                )
        if index == 0:
            erofs.check_superblock(bytes(data[:4096]))
        progress(block.compressed_bytes)
    tail = _rest(pieces, seektable.MAX_BYTES)
    if tail != seektable.encode(seektable.entries(block_map)):
        raise errors.IntegrityError(
            f"layer {layer.map_digest}: the {len(tail)} bytes after its last frame "
            "are not the seek table of its frames"
        )
    return Verified(len(block_map.blocks), zero_blocks, block_map.image_bytes, blob.size)


def _rest(pieces: frames.Pieces, limit_bytes: int) -> bytes:
    out = bytearray()
    while piece := pieces.take(limit_bytes):
        out += piece
        if len(out) > limit_bytes:
            raise errors.IntegrityError(f"layer blob has more than {limit_bytes} bytes after its last frame")
    return bytes(out)
