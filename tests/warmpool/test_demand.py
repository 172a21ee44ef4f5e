"""`warmpool.demand`: records with gaps, and the cells that are made of them."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from warmpool import demand

_LOOKS = st.lists(
    st.tuples(st.integers(1, 90), st.one_of(st.none(), st.integers(0, 9))), min_size=1, max_size=40
)


def _record(looks: list[tuple[int, int | None]]) -> demand.Record:
    record, at = demand.Record(), 0.0
    for after, wanted in looks:
        at += after
        record = record.seen(at, wanted)
    return record


def _at(record: demand.Record, moment: float) -> int | None:
    value = None
    for at, wanted in zip(record.at, record.wanted, strict=True):
        if at <= moment:
            value = wanted
    return value


@given(_LOOKS, st.sampled_from([10.0, 25.0]))
def test_cells_are_what_second_by_second_says(looks: list[tuple[int, int | None]], cell: float) -> None:
    record = _record(looks)
    grid = demand.grid(record, 0.0, record.at[-1] + 30.0, cell)
    for number in range(len(grid.level)):
        begin = grid.begin + number * cell
        inside = [_at(record, begin + second) for second in range(int(cell))]
        known = [each for each in inside if each is not None]
        assert grid.known[number] == (len(known) == len(inside))
        assert math.isnan(grid.level[number]) if not known else np.isclose(grid.level[number], np.mean(known))
        changes = [
            (before, after)
            for at, before, after in zip(record.at[1:], record.wanted, record.wanted[1:], strict=False)
            if begin <= at < begin + cell and before is not None and after is not None
        ]
        assert grid.rises[number] == sum(max(0, after - before) for before, after in changes)
        assert grid.falls[number] == sum(max(0, before - after) for before, after in changes)


@given(_LOOKS, _LOOKS)
def test_a_record_that_grows_keeps_its_cells(
    looks: list[tuple[int, int | None]], more: list[tuple[int, int | None]]
) -> None:
    early, late = _record(looks), _record([*looks, *more])
    before, after = (demand.grid(each, 0.0, early.at[-1], 20.0) for each in (early, late))
    assert np.array_equal(before.level, after.level, equal_nan=True)
    assert np.array_equal(before.rises, after.rises)


@given(_LOOKS, st.integers(0, 3_000))
def test_forgetting_keeps_what_was_true_then(looks: list[tuple[int, int | None]], begin: int) -> None:
    record = _record(looks)
    kept = record.since(begin)
    for moment in range(begin, begin + 200, 7):
        assert _at(kept, moment) == _at(record, moment)


def test_the_jump_over_a_gap_is_no_request() -> None:
    record = demand.record_of([0.0, 60.0, 120.0], [3, None, 9])
    grid = demand.grid(record, 0.0, 180.0, 60.0)
    assert grid.rises.tolist() == [0, 0, 0]
    assert grid.known.tolist() == [True, False, True]


def test_gaps_are_filled_by_what_was_known_last() -> None:
    assert demand.filled(np.array([np.nan, 2.0, np.nan, 5.0])).tolist() == [2, 2, 2, 5]
    assert not len(demand.filled(np.array([np.nan])))


def test_a_clock_that_goes_back_changes_nothing() -> None:
    record = demand.Record().seen(100.0, 1)
    assert record.seen(50.0, 7) == record
