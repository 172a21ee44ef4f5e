"""Verify a block image against its own digests, from the first byte of each layer blob to the last.

Called by `glowplug check`. One thread per layer is the caller's choice: `verify_layer` keeps no state and
holds one block at a time, so memory does not grow with the image, but by 32 bytes for each page of a boot
pack. Reads each blob once, in order.

What holds afterwards, for each layer: the blob has the digest and size that manifest and block map say;
the blob is the frames of the map's blocks followed by the seek table of exactly those frames; each block
has its digest, each frame its own, a block flagged zero that of zeros (no other decodes); the superblock is
one that our writer makes. And of the boot pack: its data has the digest and size that manifest and table
say, each frame its own, and each page is what the verified blocks hold there.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Callable

from imagefs import bootpack, bootstream, erofs, errors, frames, seektable
from imagefs.artifact import Descriptor
from imagefs.bootpack import PAGE_BYTES, Record
from imagefs.lazylayer import LazyLayer
from imagefs.origin import Origin

_DIGEST_BYTES = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Verified:
    """What one layer came to. Bytes of the layer image, bytes of its blob, and its blocks."""

    blocks: int
    zero_blocks: int
    image_bytes: int
    blob_bytes: int


class PackedPages:
    """What a boot pack claims about pages of layer images, to be compared with their blocks. Any thread."""

    def __init__(self, table: bootpack.Table, table_digest: str, page_digests: bytes) -> None:
        """`page_digests`: the sha256 of each page of the page sequence, one after another."""
        self._name = table_digest
        self._digests = page_digests
        self._places: dict[str, list[tuple[Record, int]]] = {}
        position = 0
        for record in table.records:
            places = self._places.setdefault(table.map_digests[record.layer], [])
            places.append((record, position))
            position += record.pages
        for places in self._places.values():
            places.sort(key=_first_page)

    def compare(self, layer: str, offset: int, data: memoryview) -> None:
        """Compare with verified bytes of a layer image, from a page's start. Raises IntegrityError naming
        the page."""
        first, end = offset // PAGE_BYTES, (offset + len(data)) // PAGE_BYTES
        places = self._places.get(layer, [])
        for record, position in places[max(0, bisect.bisect_right(places, first, key=_first_page) - 1) :]:
            if record.first_page >= end:
                return
            for page in range(max(first, record.first_page), min(end, record.first_page + record.pages)):
                at = (position + page - record.first_page) * _DIGEST_BYTES
                start = (page - first) * PAGE_BYTES
                digest = hashlib.sha256(data[start : start + PAGE_BYTES]).digest()
                if digest != self._digests[at : at + _DIGEST_BYTES]:
                    raise errors.IntegrityError(
                        f"boot pack {self._name}: its page {page} of layer {layer} differs from the block "
                        "that holds it"
                    )


def _first_page(place: tuple[Record, int]) -> int:
    return place[0].first_page


def verify_boot_pack(
    table: bootpack.Table,
    table_digest: str,
    origin: Origin,
    progress: Callable[[int], None] = lambda read_bytes: None,
) -> PackedPages:
    """Read a boot pack's data and verify its frames. Raises IntegrityError naming frame and offset."""
    block_map = bootstream.block_map(table)  # to decode, a frame is a block like any other
    pieces = frames.Pieces(origin.stream_blob(table.data_digest, table.data_bytes))
    buffer = memoryview(bytearray(block_map.block_bytes))
    digests = bytearray()
    for number, frame in enumerate(table.frames):
        try:
            data = frames.decode_block(block_map, number, pieces, table_digest, buffer)
        except errors.IntegrityError as exc:
            raise errors.IntegrityError(f"boot pack, frame {number}: {exc}") from exc
        for at in range(0, len(data), PAGE_BYTES):
            digests += hashlib.sha256(data[at : at + PAGE_BYTES]).digest()
        progress(frame.compressed_bytes)
    _rest(pieces, 0)  # at its end the origin compares the blob's digest
    return PackedPages(table, table_digest, bytes(digests))


def verify_layer(
    layer: LazyLayer,
    blob: Descriptor,
    progress: Callable[[int], None] = lambda read_bytes: None,
    packed: PackedPages | None = None,
) -> Verified:
    """Read a layer's whole blob and verify it, and `packed` against it. Raises IntegrityError naming layer,
    block and offset; `progress` is told the compressed bytes of each block as it is verified."""
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
        if packed is not None:
            packed.compare(layer.map_digest, index * block_map.block_bytes, data)
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
    while piece := pieces.take(limit_bytes + 1):
        out += piece
        if len(out) > limit_bytes:
            raise errors.IntegrityError(f"the blob has more than {limit_bytes} bytes after its last frame")
    return bytes(out)
