"""Traces: round trips, lines that are no reads, and the order that `merge` makes of first reads."""

from __future__ import annotations

import dataclasses
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from imagefs import bootpack, errors, trace
from imagefs.bootpack import PAGE_BYTES, Record
from imagefs.trace import Read, Trace

DIGESTS = tuple(f"sha256:{number:064x}" for number in range(3))
READ_AHEAD_PAGES = st.integers(1, 8192)
reads = st.builds(
    Read,
    layer=st.integers(0, 2),
    offset=st.integers(0, 60 * PAGE_BYTES),
    length=st.integers(1, 9 * PAGE_BYTES),
    microseconds=st.integers(0, 1000),
)


@st.composite
def traces(draw: st.DrawFn, read_ahead_pages: st.SearchStrategy[int] = READ_AHEAD_PAGES) -> Trace:
    command = tuple(draw(st.lists(st.text(max_size=5))))
    kib = draw(read_ahead_pages) * 4
    return Trace(DIGESTS[0], DIGESTS[1], DIGESTS, command, tuple(draw(read_lists())), kib)


def read_lists() -> st.SearchStrategy[list[Read]]:
    return st.lists(reads, min_size=1, max_size=20).map(
        lambda found: sorted(found, key=lambda read: read.microseconds)
    )


def of(*found: Read, layers: tuple[str, ...] = DIGESTS) -> Trace:
    return Trace(DIGESTS[0], DIGESTS[1], layers, ("true",), found, 128)


def pages_of(records: list[Record]) -> list[tuple[int, int]]:
    return [(r.layer, r.first_page + n) for r in records for n in range(r.pages)]


def first_pages(value: Trace) -> list[tuple[int, int]]:
    """The naive form: every page of every read, each once."""
    out: dict[tuple[int, int], None] = {}
    for read in value.reads:
        for page in range(read.offset // PAGE_BYTES, (read.offset + read.length - 1) // PAGE_BYTES + 1):
            out[read.layer, page] = None
    return list(out)


@hypothesis.given(traces())
def test_round_trip(value: Trace) -> None:
    try:
        encoded = trace.encode(value)
    except errors.InvalidInputError:
        assert any("\ud800" <= c <= "\udfff" for word in value.command for c in word)
        return
    assert trace.decode(encoded) == value


@hypothesis.given(traces())
def test_one_trace_is_its_first_reads(value: Trace) -> None:
    assert pages_of(trace.merge([value])) == first_pages(value)


@hypothesis.given(traces(), st.integers(2, 4))
def test_the_same_trace_again_changes_nothing(value: Trace, count: int) -> None:
    assert pages_of(trace.merge([value] * count)) == first_pages(value)


@hypothesis.given(st.lists(traces(st.just(8)), min_size=2, max_size=4))
def test_several_traces_hold_the_pages_of_all(values: list[Trace]) -> None:
    merged = pages_of(trace.merge(values))
    assert len(merged) == len(set(merged))
    assert set(merged) == {page for value in values for page in first_pages(value)}


def test_reads_are_ordered_by_time_then_by_line() -> None:
    found = of(Read(0, 8192, 4096, 5), Read(1, 0, 4096, 3), Read(0, 0, 1, 3))
    assert trace.merge([found]) == [Record(1, 0, 1), Record(0, 0, 1), Record(0, 2, 1)]


def test_the_median_place_decides() -> None:
    """Page 9 is last in two traces of three, page 1 first in two of three."""
    early, late, other = Read(0, 1 * 4096, 4096, 0), Read(0, 9 * 4096, 4096, 2), Read(0, 5 * 4096, 4096, 1)
    swapped = of(dataclasses.replace(late, microseconds=0), dataclasses.replace(early, microseconds=2), other)
    merged = trace.merge([swapped, of(early, other, late), of(early, other, late)])
    assert merged == [Record(0, 1, 1), Record(0, 5, 1), Record(0, 9, 1)]


def test_pages_that_all_traces_read_in_one_go_stay_together() -> None:
    """Two files of 16 pages, read in one order by the first trace and in the other by the second."""
    a, b = Read(0, 0, 16 * 4096, 0), Read(0, 100 * 4096, 16 * 4096, 1)
    again = of(dataclasses.replace(b, microseconds=0), dataclasses.replace(a, microseconds=1))
    assert trace.merge([of(a, b), again]) == [Record(0, 0, 16), Record(0, 100, 16)]


def test_the_same_layer_twice_in_an_image() -> None:
    layers = (DIGESTS[0], DIGESTS[1], DIGESTS[0], DIGESTS[2])
    found = of(Read(2, 0, 4096, 0), Read(3, 0, 4096, 1), Read(0, 0, 8192, 2), layers=layers)
    assert bootpack.distinct(layers) == DIGESTS
    assert trace.merge([found]) == [Record(0, 0, 1), Record(2, 0, 1), Record(0, 1, 1)]


def test_what_does_not_merge() -> None:
    read = Read(0, 0, 1, 0)
    with pytest.raises(errors.InvalidInputError, match="2 traces of 2 different images"):
        trace.merge([of(read), of(read, layers=DIGESTS[:2])])
    with pytest.raises(errors.InvalidInputError, match="no reads"):
        trace.merge([of()])
    with pytest.raises(errors.InvalidInputError, match="1 with 32 KiB, 2 with 128 KiB"):
        trace.merge([of(read), dataclasses.replace(of(read), read_ahead_kib=32), of(read)])


def test_a_trace_of_the_first_version_was_made_with_128_kib() -> None:
    document = json.loads(trace.encode(of()))
    document["version"] = 1
    del document["read_ahead_kib"]
    assert trace.decode(json.dumps(document).encode() + b"\n").read_ahead_kib == 128
    document["version"] = 3
    with pytest.raises(errors.InvalidInputError, match="versions 1 and 2"):
        trace.decode(json.dumps(document).encode() + b"\n")


@pytest.mark.parametrize("value", [None, 0, -4, 6, 33 * 1024, True, "32", 32.0])
def test_a_read_ahead_that_is_none(value: object) -> None:
    document = json.loads(trace.encode(of()))
    document["read_ahead_kib"] = value
    with pytest.raises(errors.InvalidInputError, match="read_ahead_kib"):
        trace.decode(json.dumps(document).encode() + b"\n")


HEADER = trace.encode(of())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "line 1"),
        (b"[]\n", "line 1"),
        (HEADER[:-1], "cut off"),
        (HEADER + b"[0,0,1,0]", "cut off"),
        (HEADER.replace(b'"version":2', b'"version":3'), "version 3"),
        (HEADER.replace(b'"layers":[', b'"layers":["x",'), "layers: 'x'"),
        (HEADER.replace(b'"command":["true"]', b'"command":[1]'), "command"),
        (HEADER.replace(b'"source"', b'"sauce"'), "source"),
        (HEADER + b"[0,0,1]\n", "line 2"),
        (HEADER + b"[0,0,1,true]\n", "line 2"),
        (HEADER + b"[0,0,1.5,0]\n", "line 2"),
        (HEADER + b"[0,0,1,0]\n[3,0,1,0]\n", "line 3: layer 3 of 3"),
        (HEADER + b"[0,-1,1,0]\n", "bytes -1"),
        (HEADER + b"[0,0,0,0]\n", r"bytes 0\+0"),
        (HEADER + b"[0,17592186044416,1,0]\n", "no range"),
        (HEADER + b"[0,0,1,-1]\n", "-1 microseconds"),
        (HEADER + b"[" * 100_000 + b"\n", "line 2: not JSON"),
        (HEADER + b"\xff\n", "line 2: not JSON"),
        (bytes(trace.MAX_TRACE_BYTES + 1), "limit"),
    ],
)
def test_what_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(errors.InvalidInputError, match=message):
        trace.decode(data)


@hypothesis.given(st.binary(max_size=100))
def test_arbitrary_lines(data: bytes) -> None:
    with pytest.raises(errors.InvalidInputError):
        trace.decode(data)
    try:
        found = trace.decode(HEADER + data)
    except errors.InvalidInputError:
        return
    assert len(found.reads) == data.count(b"\n")
