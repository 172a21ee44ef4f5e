"""The wire: nothing early, nothing lost, nothing out of order, whatever the times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowplug.startup import delayline

STEP = st.tuples(st.floats(0, 10), st.one_of(st.none(), st.binary(min_size=1, max_size=50)))


@given(st.floats(0, 5), st.lists(STEP))
def test_each_piece_comes_whole_in_order_and_not_before_its_time(
    delay_seconds: float, steps: list[tuple[float, bytes | None]]
) -> None:
    """A step is a time that passes, and then either bytes that go in or a look at what came out."""
    line = delayline.DelayLine(delay_seconds, 1000)
    now, put, taken = 0.0, list[tuple[float, bytes]](), list[bytes]()
    for passes, data in steps:
        now += passes
        if data is not None:
            line.put(data, now)
            put.append((now, data))
        while (came := line.take(now)) is not None:
            taken.append(came)
        assert taken == [data for at, data in put if at + delay_seconds <= now]
    line.end(now)
    while (due := line.due) is not None and not line.ended(now):
        now = max(now, due)
        while (came := line.take(now)) is not None:
            taken.append(came)
    assert taken == [data for _, data in put]
    assert line.ended(now)


def test_the_end_comes_after_the_bytes_and_as_late_as_they() -> None:
    line = delayline.DelayLine(2.0, 10)
    line.put(b"last", 5.0)
    line.end(6.0)
    assert not line.ended(8.0)  # the bytes are still in there
    assert line.take(7.0) == b"last"
    assert line.due == 8.0
    assert not line.ended(7.9)
    assert line.ended(8.0)


def test_a_line_is_full_until_something_leaves() -> None:
    line = delayline.DelayLine(1.0, 10)
    line.put(b"five!", 0.0)
    assert line.has_room
    line.put(b"more!", 0.5)
    assert not line.has_room
    line.put(b"too much", 0.6)
    assert [line.take(1.0), line.take(1.0), line.has_room] == [b"five!", None, False]
    assert [line.take(1.5), line.has_room] == [b"more!", True]


def test_nothing_goes_in_after_the_end() -> None:
    line = delayline.DelayLine(1.0, 10)
    line.end(0.0)
    with pytest.raises(AssertionError):
        line.put(b"late", 0.0)
