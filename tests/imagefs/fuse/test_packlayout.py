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
def _extents(draw: st.DrawFn) -> list[Extent]:
    """Of a device of 64 pages, at random places, in a random order."""
    first = draw(st.integers(0, 5))
    pages = draw(st.permutations(sorted(draw(st.sets(st.integers(0, 63))))))
    return [Extent(page, 1, position) for position, page in enumerate(pages, first)]


@given(st.none() | _extents(), st.integers(1, 7), st.integers(0, 64 * _PAGE - 1), st.data())
def test_every_byte_comes_from_where_its_page_is(
    extents: list[Extent] | None, frame_pages: int, offset: int, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, 64 * _PAGE - offset))
    refused = data.draw(st.sets(st.tuples(st.just(1000), st.integers(0, 20))))
    layout = Layout(1000, frame_pages * _PAGE, extents) if extents is not None else None

    def expected(byte: int) -> tuple[packlayout.Key, int]:
        for extent in extents or ():
            if extent.first_page == byte // _PAGE:
                frame, within = divmod(extent.position * _PAGE + byte % _PAGE, frame_pages * _PAGE)
                if (1000, frame) not in refused:
                    return (1000, frame), within
        return (_NODE, byte // _BLOCK), byte % _BLOCK

    at = offset
    for segment in packlayout.segments(_NODE, _BLOCK, offset, length, layout, refused):
        assert segment.length > 0
        for byte in {at, at + segment.length - 1, at + segment.length // 2}:
            key, within = expected(byte)
            assert segment.key == key
            assert segment.within + byte - at == within
        at += segment.length
    assert at == offset + length


def test_a_run_of_pages_is_one_segment() -> None:
    layout = Layout(1000, 1 << 20, [Extent(10, 100, 30)])
    found = list(packlayout.segments(_NODE, 1 << 22, 9 * _PAGE, 102 * _PAGE, layout, ()))
    assert found == [
        Segment((_NODE, 0), 9 * _PAGE, _PAGE),
        Segment((1000, 0), 30 * _PAGE, 100 * _PAGE),
        Segment((_NODE, 0), 110 * _PAGE, _PAGE),
    ]


@given(_extents())
def test_extents_travel(extents: list[Extent]) -> None:
    assert packlayout.decode(packlayout.encode(extents)) == extents


def test_what_does_not_parse_is_refused() -> None:
    with pytest.raises(errors.InvalidInputError):
        packlayout.decode(packlayout.encode([Extent(0, 1, 0)])[1:])
