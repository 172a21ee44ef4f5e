from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imagefs import framemask

_frames = st.integers(0, (1 << 64) - 1)


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 20), st.sampled_from([4096, 65536, 1 << 20]))
def test_the_frames_that_bytes_touch(start: int, length: int, frame_bytes: int) -> None:
    found = list(framemask.numbers(framemask.touched(start, length, frame_bytes)))
    assert found == [
        number
        for number in range((start + length) // frame_bytes + 1)
        if number * frame_bytes < start + length and (number + 1) * frame_bytes > start
    ]


@given(_frames, _frames)
def test_what_covers_what(valid: int, needed: int) -> None:
    covered = valid == framemask.WHOLE or (
        needed != framemask.WHOLE and set(framemask.numbers(needed)) <= set(framemask.numbers(valid))
    )
    assert framemask.covers(valid, needed) == covered
    assert sum(1 << number for number in framemask.numbers(valid)) == valid
