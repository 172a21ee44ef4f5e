"""Messages between workers and server."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from imagefs import errors
from imagefs.fuse import protocol, wire

_u32, _u64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
_devices = st.builds(wire.Device, _u64, _u64, _u32, _u32, st.binary(max_size=255))
_frames = st.integers(0, (1 << 4096) - 1)


@given(
    st.builds(wire.Question, st.sampled_from(wire.Ask), _u32, _u64, _u64, st.binary(max_size=255), _frames)
)
def test_questions_come_back(question: wire.Question) -> None:
    assert wire.decode_question(wire.encode_question(question)) == question


@given(
    st.builds(wire.Answer, _u32, st.integers(0, 200), st.lists(_devices, max_size=5).map(tuple), _frames)
    | st.builds(wire.Drop, _u64)
)
def test_answers_come_back(answer: wire.Answer | wire.Drop) -> None:
    assert wire.decode_answer(wire.encode_answer(answer)) == answer


_reads = st.builds(protocol.Read, _u64, _u64, _u64, _u32, _u32)


@given(_reads)
def test_reads_come_back_in_both_directions(read: protocol.Read) -> None:
    assert wire.decode_question(wire.encode_question(read)) == read
    assert wire.decode_answer(wire.encode_answer(read)) == read


def test_the_end_comes_back() -> None:
    assert wire.decode_answer(wire.encode_answer(wire.Finish())) == wire.Finish()


@given(st.binary(max_size=100))
def test_other_bytes_are_refused(data: bytes) -> None:
    with contextlib.suppress(errors.InvalidInputError):
        wire.decode_question(data)
    with contextlib.suppress(errors.InvalidInputError):
        wire.decode_answer(data)


def test_a_full_listing_is_one_message() -> None:
    device = wire.Device(1 << 60, 1 << 44, 1 << 24, 4096, b"sha256-" + b"0" * 64)
    answer = wire.Answer(1, 0, (device,) * wire.LISTING_DEVICES)
    assert len(wire.encode_answer(answer)) <= wire.MAX_MESSAGE_BYTES
