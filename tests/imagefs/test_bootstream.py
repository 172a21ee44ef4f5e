"""A boot pack as a layer of frames: where its pages lie, and which frames bring anything new."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imagefs import blockmap, bootpack, bootstream
from imagefs.bootpack import Record
from tests.imagefs.fuse import packing, stack

_BLOCK = 65536
_BLOCK_PAGES = _BLOCK // bootpack.PAGE_BYTES
_LAYERS = [
    stack.make_layer(stack.random_image(8 * _BLOCK, seed, zero_blocks=(3,), block_bytes=_BLOCK), _BLOCK)
    for seed in (1, 2)
]
_MAPS = {layer.map_digest: layer.block_map for layer in _LAYERS}


@st.composite
def _records(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Runs of pages of both layers, none twice, in any order."""
    runs = []
    for layer in (0, 1):
        page = 0
        while page < 8 * _BLOCK_PAGES and draw(st.booleans()):
            first = page + draw(st.integers(0, 20))
            pages = draw(st.integers(1, 40))
            if first + pages > 8 * _BLOCK_PAGES:
                break
            runs.append((layer, first, pages))
            page = first + pages
    return list(draw(st.permutations(runs))) or [(0, 0, 1)]


@given(_records(), st.sets(st.tuples(st.integers(0, 1), st.integers(0, 7))))
def test_a_frame_is_fetched_for_a_block_that_is_not_here(
    runs: list[tuple[int, int, int]], here: set[tuple[int, int]]
) -> None:
    table = packing.make(_LAYERS, runs).table
    present = {_LAYERS[layer].block_map.blocks[index].digest for layer, index in here}
    worth = bootstream.Worth(table, _MAPS)
    sequence = [
        (record.layer, record.first_page + number)
        for record in table.records
        for number in range(record.pages)
    ]
    for index, frame in enumerate(table.frames):
        pages = sequence[frame.first_page :][: frame.uncompressed_bytes // bootpack.PAGE_BYTES]
        blocks = {(layer, page // _BLOCK_PAGES) for layer, page in pages}
        expected = {
            _MAPS[_LAYERS[layer].map_digest].blocks[number].digest
            for layer, number in blocks
            if number != 3  # of zeros
        }
        assert worth.fetching(index, present.__contains__) == bool(expected - present)


@given(_records())
def test_the_data_is_a_layer_of_frames(runs: list[tuple[int, int, int]]) -> None:
    table = packing.make(_LAYERS, runs).table
    value = bootstream.block_map(table)
    assert [value.block_length(n) for n in range(len(value.blocks))] == [
        frame.uncompressed_bytes for frame in table.frames
    ]
    found = bootstream.records_by_layer(table)
    assert sorted(position for records in found.values() for _, position in records) == sorted(
        sum(record.pages for record in table.records[:n]) for n in range(len(table.records))
    )


def test_positions_count_pages() -> None:
    table = packing.make(_LAYERS, [(0, 5, 2), (1, 0, 3), (0, 0, 1)]).table
    assert list(bootstream.positions(table)) == [
        (Record(0, 5, 2), 0),
        (Record(1, 0, 3), 2),
        (Record(0, 0, 1), 5),
    ]
    assert isinstance(bootstream.block_map(table), blockmap.BlockMap)


@given(_records())
def test_first_pages_are_where_the_frames_have_them(runs: list[tuple[int, int, int]]) -> None:
    table = packing.make(_LAYERS, runs).table
    pages = [
        (frame, number * bootpack.PAGE_BYTES, piece.first_page + page, piece.layer)
        for frame, pieces in enumerate(table.pieces())
        for number, (piece, page) in enumerate((p, n) for p in pieces for n in range(p.pages))
    ]
    found = [
        (frame, page.within, page.image_bytes)
        for frame, listed in bootstream.first_pages(table, _MAPS).items()
        for page in listed
    ]
    expected = [(frame, within, 8 * _BLOCK) for frame, within, page, _ in pages if page == 0]
    assert sorted(found) == sorted(expected)
