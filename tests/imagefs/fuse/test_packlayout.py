"""Where the bytes of a READ come from: every byte once, in order, from a frame where a pack has it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import errors
from imagefs.fuse import packlayout
from imagefs.fuse.packlayout import Extent, Layout, Segment

_NODE, _BLOCK = 7, 16 * 4096
_PAGE = packlayout.PAGE_BYTES


@st.composite
def _packs(draw: st.DrawFn) -> list[tuple[int, list[Extent]]]:
    """Packs of a device of 64 pages: (frame pages, extents at random places, in a random order)."""
    packs = []
    for _ in range(draw(st.integers(0, 3))):
        chosen = sorted(draw(st.sets(st.integers(0, 63))))
        position, extents = draw(st.integers(0, 5)), []
        for page in draw(st.permutations(chosen)):
            extents.append(Extent(page, 1, position))
            position += 1
        packs.append((draw(st.integers(1, 7)), extents))
    return packs


@given(_packs(), st.integers(0, 64 * _PAGE - 1), st.data())
def test_every_byte_comes_from_where_its_page_is(
    packs: list[tuple[int, list[Extent]]], offset: int, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, 64 * _PAGE - offset))
    refused = data.draw(st.sets(st.tuples(st.integers(1000, 1002), st.integers(0, 20))))
    layouts = [Layout(1000 + n, pages * _PAGE, extents) for n, (pages, extents) in enumerate(packs)]

    def expected(byte: int) -> tuple[packlayout.Key, int]:
        for number, (frame_pages, extents) in enumerate(packs):
            for extent in extents:
                if extent.first_page == byte // _PAGE:
                    frame, within = divmod(extent.position * _PAGE + byte % _PAGE, frame_pages * _PAGE)
                    if (1000 + number, frame) not in refused:
                        return (1000 + number, frame), within
        return (_NODE, byte // _BLOCK), byte % _BLOCK

    at = offset
    for segment in packlayout.segments(_NODE, _BLOCK, offset, length, layouts, refused):
        assert segment.length > 0
        for byte in {at, at + segment.length - 1, at + segment.length // 2}:
            key, within = expected(byte)
            assert segment.key == key
            assert segment.within + byte - at == within
        at += segment.length
    assert at == offset + length


def test_a_run_of_pages_is_one_segment() -> None:
    layout = Layout(1000, 1 << 20, [Extent(10, 100, 30)])
    found = list(packlayout.segments(_NODE, 1 << 22, 9 * _PAGE, 102 * _PAGE, [layout], ()))
    assert found == [
        Segment((_NODE, 0), 9 * _PAGE, _PAGE),
        Segment((1000, 0), 30 * _PAGE, 100 * _PAGE),
        Segment((_NODE, 0), 110 * _PAGE, _PAGE),
    ]


@given(_packs())
def test_extents_travel(packs: list[tuple[int, list[Extent]]]) -> None:
    extents = [found for _, found in packs]
    assert packlayout.decode(packlayout.encode(extents), len(extents)) == extents


@pytest.mark.parametrize("data", [b"x", packlayout.encode([[], [Extent(0, 1, 0)]])])
def test_what_does_not_parse_is_refused(data: bytes) -> None:
    with pytest.raises(errors.InvalidInputError):
        packlayout.decode(data, 1)
