"""Which of the pages that traces read a boot pack holds. Pure; called by pack.py.

Left out is what a start gets as fast without: zero blocks, which nobody fetches, and what is read from end
to end, such as the weights of a model. Behind such a reader read-ahead keeps the link full with blocks; in a
pack the same bytes would be stored and cached a second time, and what the start needs meanwhile would wait
for gigabytes before it.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Sequence

from imagefs import blockmap, bootpack
from imagefs.bootpack import PAGE_BYTES, Record

MIN_THROUGH_BYTES = 64 << 20
"""Less than this is no loss in a pack, and the first few blocks of a run are misses."""


def without_zero_blocks(
    records: Iterable[Record], block_maps: Sequence[blockmap.BlockMap]
) -> tuple[Record, ...]:
    """The records without the pages of zero blocks. `block_maps` are those of the layer images.
    InvalidInputError for a record outside its layer image."""
    zeros = {
        (layer, index)
        for layer, block_map in enumerate(block_maps)
        for index, block in enumerate(block_map.blocks)
        if block.zero
    }
    return _without(records, block_maps, zeros)


def without_read_through(
    records: Sequence[Record], block_maps: Sequence[blockmap.BlockMap], min_bytes: int
) -> tuple[Record, ...]:
    """The records, in the order of first reads, without the blocks of runs of `min_bytes` that were read from
    end to end: all their pages, each block first after the one before it. Metadata is never left out."""
    pages: collections.Counter[tuple[int, int]] = collections.Counter()
    first: dict[tuple[int, int], int] = {}
    for number, record in enumerate(records):
        for key, _, count in _pieces(record, block_maps):
            pages[key] += count
            first.setdefault(key, number)
    through: set[tuple[int, int]] = set()
    for layer, block_map in enumerate(block_maps):
        metadata = frozenset(block_map.metadata_blocks())
        run: list[int] = []
        for index, block in enumerate(block_map.blocks):
            if block.zero and run:
                continue  # nobody asks for it, wherever the reader is
            key = (layer, index)
            whole = -(-block_map.block_length(index) // PAGE_BYTES)
            read = pages[key] == whole and index not in metadata
            if not read or (run and first[key] < first[layer, run[-1]]):
                _add_if_long(run, layer, block_map, min_bytes, through)
                run = []
            if read:
                run.append(index)
        _add_if_long(run, layer, block_map, min_bytes, through)
    return _without(records, block_maps, through)


def _add_if_long(
    run: Sequence[int],
    layer: int,
    block_map: blockmap.BlockMap,
    min_bytes: int,
    into: set[tuple[int, int]],
) -> None:
    if sum(map(block_map.block_length, run)) >= min_bytes:
        into.update((layer, index) for index in run)


def _without(
    records: Iterable[Record],
    block_maps: Sequence[blockmap.BlockMap],
    left_out: Collection[tuple[int, int]],
) -> tuple[Record, ...]:
    """The records without the pages of these blocks, given as (layer, index)."""
    out = []
    for record in records:
        begin = end = record.first_page
        for key, at, count in _pieces(record, block_maps):
            if key in left_out:
                if begin < end:
                    out.append(Record(record.layer, begin, end - begin))
                begin = at + count
            end = at + count
        if begin < end:
            out.append(Record(record.layer, begin, end - begin))
    return tuple(out)


def _pieces(
    record: Record, block_maps: Sequence[blockmap.BlockMap]
) -> Iterable[tuple[tuple[int, int], int, int]]:
    """The record cut along blocks: (layer, index), first page, pages. InvalidInputError."""
    block_map = block_maps[record.layer]
    bootpack.check_record(record, block_map)
    block_pages = block_map.block_bytes // PAGE_BYTES
    at, end = record.first_page, record.first_page + record.pages
    while at < end:
        index = at // block_pages
        stop = min(end, (index + 1) * block_pages)
        yield (record.layer, index), at, stop - at
        at = stop
