"""A boot pack as a node fetches it: a layer whose blocks are the pack's frames.

Pure. Called by the device server (fuse/packs.py). The fetcher, the cache and the workers know blocks of
layers and nothing else, so that a frame is fetched once however many wait for it, verified, written, kept,
evicted and handed out as any block. What is said here: which block map a table amounts to, where a layer's
pages lie in it, which frames have superblocks, and which are worth fetching.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from imagefs import blockmap, bootpack

_NO_DIGEST = bytes(32)


def block_map(table: bootpack.Table) -> blockmap.BlockMap:
    """The data blob as a layer blob: all frames but the last are of one size."""
    frame_bytes = table.frames[0].uncompressed_bytes
    return blockmap.BlockMap(
        block_bytes=frame_bytes,
        frame_bytes=frame_bytes,
        image_bytes=table.pages * bootpack.PAGE_BYTES,
        blob_bytes=table.data_bytes,
        metadata_offset=0,
        metadata_bytes=0,
        blob_digest=bytes.fromhex(table.data_digest.removeprefix("sha256:")),
        source_digest=_NO_DIGEST,
        diff_id=_NO_DIGEST,
        chain_id=None,
        compression_level=0,
        libzstd_version=0,
        root_implied=False,
        blocks=tuple(
            blockmap.Block(frame.digest, frame.offset, frame.compressed_bytes) for frame in table.frames
        ),
    )


def positions(table: bootpack.Table) -> Iterator[tuple[bootpack.Record, int]]:
    """Each record, and where in the page sequence it begins."""
    ends = itertools.accumulate((record.pages for record in table.records), initial=0)
    return zip(table.records, ends, strict=False)


@dataclasses.dataclass(frozen=True, slots=True)
class FirstPage:
    """The first page of a layer image of `image_bytes`, `within` bytes into a frame."""

    within: int
    image_bytes: int


def first_pages(
    table: bootpack.Table, block_maps: Mapping[str, blockmap.BlockMap]
) -> Mapping[int, Sequence[FirstPage]]:
    """Frame -> the first pages, which have the superblocks, of the layer images whose first pages it has."""
    frame_bytes = table.frames[0].uncompressed_bytes
    out: dict[int, list[FirstPage]] = {}
    for record, position in positions(table):
        if record.first_page == 0:
            frame, within = divmod(position * bootpack.PAGE_BYTES, frame_bytes)
            image_bytes = block_maps[table.map_digests[record.layer]].image_bytes
            out.setdefault(frame, []).append(FirstPage(within, image_bytes))
    return out


class Worth:
    """Which frames are worth fetching: those with a page whose block is not here."""

    def __init__(self, table: bootpack.Table, block_maps: Mapping[str, blockmap.BlockMap]) -> None:
        self._records = table.records
        self._begins = [position for _, position in positions(table)]
        self._frames = table.frames
        self._maps = [block_maps[digest] for digest in table.map_digests]

    def blocks(self, frame: int) -> Iterator[tuple[blockmap.Block, int]]:
        """The blocks that hold the pages of a frame, with their lengths; one may come several times."""
        first = self._frames[frame].first_page
        end = first + self._frames[frame].uncompressed_bytes // bootpack.PAGE_BYTES
        number = bisect.bisect_right(self._begins, first) - 1
        while number < len(self._records) and self._begins[number] < end:
            record, begin = self._records[number], self._begins[number]
            value = self._maps[record.layer]
            from_page = record.first_page + max(0, first - begin)
            last_page = record.first_page + min(record.pages, end - begin) - 1
            block_pages = value.block_bytes // bootpack.PAGE_BYTES
            for index in range(from_page // block_pages, last_page // block_pages + 1):
                yield value.blocks[index], value.block_length(index)
            number += 1

    def fetching(self, frame: int, present: Callable[[bytes], bool]) -> bool:
        """Whether a frame brings anything that the cache, asked by digest, lacks."""
        return any(not block.zero and not present(block.digest) for block, _ in self.blocks(frame))


def records_by_layer(
    table: bootpack.Table,
) -> Mapping[str, Sequence[tuple[bootpack.Record, int]]]:
    """Map digest -> its records with their positions in the page sequence."""
    out: dict[str, list[tuple[bootpack.Record, int]]] = {digest: [] for digest in table.map_digests}
    for record, position in positions(table):
        out[table.map_digests[record.layer]].append((record, position))
    return out
