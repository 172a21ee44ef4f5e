"""What a boot pack holds of what traces read: no zero blocks, and nothing that was read from end to end."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from converter import packchoice
from imagefs import errors
from imagefs.bootpack import PAGE_BYTES, Record
from tests.imagefs.test_bootpack import block_map, page_sequence

BLOCK = 16
"""Pages."""
MIN_BYTES = 3 * BLOCK * PAGE_BYTES


@hypothesis.given(
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 95), st.integers(1, 96)), min_size=1, max_size=5),
)
def test_pages_of_zero_blocks_are_left_out(zeros: list[bool], wanted: list[tuple[int, int]]) -> None:
    pages = len(zeros) * 16
    records = [Record(0, at % pages, min(count, pages - at % pages)) for at, count in wanted]
    kept = packchoice.without_zero_blocks(records, [block_map(zeros)])
    assert page_sequence(list(kept)) == [p for p in page_sequence(records) if not zeros[p[1] // 16]]


def test_records_outside_a_layer_image() -> None:
    with pytest.raises(errors.InvalidInputError, match=r"pages 3\+18 of layer image 0 lie outside"):
        packchoice.without_zero_blocks([Record(0, 3, 18)], [block_map([False, False], 4)])


def kept(records: list[Record], *, blocks: int = 8, zeros: tuple[int, ...] = ()) -> list[Record]:
    maps = [block_map([index in zeros for index in range(blocks)])]
    return list(packchoice.without_read_through(records, maps, MIN_BYTES))


@pytest.mark.parametrize("piece", [1, 5, BLOCK, 3 * BLOCK])
def test_a_file_that_is_read_from_end_to_end_is_left_to_blocks(piece: int) -> None:
    """Block 0 holds the metadata; what is read before and after stays, in its order."""
    through = [Record(0, at, min(piece, 6 * BLOCK - at)) for at in range(2 * BLOCK, 6 * BLOCK, piece)]
    others = [Record(0, 3, 2), Record(0, 7 * BLOCK, 4)]
    assert kept([others[0], *through, others[1]]) == others


@pytest.mark.parametrize(
    "records",
    [
        pytest.param([Record(0, 2 * BLOCK, 2 * BLOCK)], id="short"),
        pytest.param([Record(0, 2 * BLOCK + 1, 3 * BLOCK - 1)], id="not whole"),
        pytest.param([Record(0, at * BLOCK, BLOCK) for at in (5, 4, 3, 2)], id="backwards"),
        pytest.param([Record(0, at * BLOCK, BLOCK) for at in (2, 4, 3, 5)], id="to and fro"),
        pytest.param([Record(0, 0, 3 * BLOCK)], id="with the metadata"),
    ],
)
def test_what_is_read_in_another_way_is_packed(records: list[Record]) -> None:
    assert kept(records) == records


def test_zero_blocks_do_not_interrupt_a_reader() -> None:
    assert kept([Record(0, 2 * BLOCK, 2 * BLOCK), Record(0, 5 * BLOCK, BLOCK)], zeros=(4,)) == []


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40)), min_size=1, max_size=8).map(tuple),
    st.randoms(use_true_random=False),
)
def test_whole_blocks_leave_and_nothing_else_changes(
    gaps: tuple[tuple[int, int], ...], shuffle: object
) -> None:
    records = []
    at = 0
    for gap, pages in gaps:
        records.append(Record(0, at + gap, pages))
        at += gap + pages
    shuffle.shuffle(records)
    blocks = -(-at // BLOCK)
    before, after = page_sequence(records), page_sequence(kept(records, blocks=blocks))
    left = {page for page in before if page not in set(after)}
    assert after == [page for page in before if page not in left]
    whole = {(layer, page // BLOCK) for layer, page in left}
    assert len(left) == BLOCK * len(whole)
    assert len(left) * PAGE_BYTES >= MIN_BYTES or not left
