from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imagefs import readahead

POLICY = readahead.ReadAheadPolicy()


def ahead(*demands: int, blocks: int = 1000, policy: readahead.ReadAheadPolicy = POLICY) -> list[list[int]]:
    """What each of these demands proposes."""
    layer = readahead.ReadAhead(policy, blocks)
    return [list(layer.demanded(index)) for index in demands]


def test_a_first_demand_brings_the_block_behind_it() -> None:
    assert ahead(10, 500, 100) == [[11], [501], [101]]


def test_who_goes_block_by_block_gets_a_growing_window() -> None:
    assert ahead(*range(10, 20)) == [
        *([11], [12], [13], [14]),
        *([15, 16], [17, 18, 19], list(range(20, 25)), list(range(25, 34)), [34], [35]),
    ]


def test_to_and_fro_proves_nothing() -> None:
    proposed = ahead(10, 12, 11, 15, 13, 14, 17, 12, 18, 16, 20)
    assert all(len(blocks) <= 1 for blocks in proposed)


def test_a_leap_takes_the_window_back() -> None:
    assert ahead(*range(10, 20), 30, 31)[-2:] == [[31], [32]]
    assert ahead(*range(10, 20), 300)[-1] == [301]


def test_readers_that_overtake_one_another_do_not_end_a_run() -> None:
    assert ahead(0, 1, 2, 3, 4, 5, 7, 6, 8)[-1] != []
    assert ahead(0, 1, 2, 3, 4, 5, 4, 6, 5, 7)[-1] == list(range(15, 24))


def test_two_files_read_in_turns_are_two_runs() -> None:
    alone = ahead(*range(10, 18))
    turns = ahead(*[index for pair in zip(range(10, 18), range(510, 518), strict=True) for index in pair])
    assert turns[::2] == alone


def test_off_is_off_and_the_layer_has_an_end() -> None:
    off = readahead.ReadAheadPolicy(initial_blocks=0, max_blocks=0)
    assert ahead(0, 1, 2, 3, 4, 5, 6, policy=off) == [[]] * 7
    assert ahead(8, 9, blocks=10) == [[9], []]


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(0, 3), st.integers(0, 16))
def test_windows_keep_their_bounds(demands: list[int], initial: int, most: int) -> None:
    policy = readahead.ReadAheadPolicy(initial, most, proof_blocks=2, runs=3)
    for index, proposed in zip(demands, ahead(*demands, blocks=61, policy=policy), strict=True):
        assert len(proposed) <= max(initial, most)
        assert all(index < block < 61 for block in proposed)
