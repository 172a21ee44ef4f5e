"""Whatever an API server answers is parsed, or refused with a word."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import errors, lease, objects
from cluster.lease import Record, Seen, Timing

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_KEYS = ("name", "namespace", "labels", "finalizers", "ownerReferences", "resourceVersion", "generation")
_BODY = st.fixed_dictionaries(
    {},
    optional={
        "metadata": st.fixed_dictionaries({}, optional=dict.fromkeys(_KEYS, _JSON)) | _JSON,
        "spec": _JSON,
        "items": _JSON,
        "type": st.sampled_from(["ADDED", "ERROR", "BOOKMARK"]) | _JSON,
        "object": _JSON,
    },
)


@given(_BODY | _JSON)
def test_nothing_but_our_errors_comes_of_an_answer(body: object) -> None:
    for parse in (objects.parse, objects.listing, objects.change, objects.scale):
        with contextlib.suppress(errors.ClusterError):
            parse(body, "x")
    with contextlib.suppress(errors.ClusterError):
        record = lease.parse(objects.parse(body, "x"))
        assert 1 <= record.duration_seconds <= 3_600


@given(st.floats(0, 4e9))
def test_times_come_back(at: float) -> None:
    assert objects.seconds(objects.micro_time(at)) == pytest.approx(at, abs=1e-5)
    assert objects.seconds(objects.whole_time(at)) == int(at)


@pytest.mark.parametrize("text", [None, 7, "", "yesterday", "2026-13-01T00:00:00Z"])
def test_no_time(text: object) -> None:
    assert objects.seconds(text) is None


@given(
    holder=st.sampled_from(["", "me", "you"]),
    duration=st.integers(1, 60),
    first=st.floats(0, 1_000),
    later=st.floats(0, 1_000),
)
def test_only_a_lease_seen_unchanged_for_its_duration_is_taken(
    holder: str, duration: int, first: float, later: float
) -> None:
    record = Record(holder, duration, 0.0, 3, "7")
    seen = lease.looked(record, None, first)
    again = lease.looked(record, seen, first + later)
    assert again == seen
    may = lease.may_hold(record, again, "me", first + later)
    assert may == (holder in ("", "me") or (first + later) - first > duration)
    assert lease.looked(Record(holder, duration, 0.0, 3, "8"), seen, later) == Seen("8", later)


def test_terms_grow_with_each_holder() -> None:
    timing = Timing()
    first = lease.claim(None, "a", timing, 10.0)
    assert (first["leaseTransitions"], first["acquireTime"]) == (0, first["renewTime"])
    held = Record("a", 15, 10.0, 0, "1")
    again = lease.claim(held, "a", timing, 20.0)
    assert (again["leaseTransitions"], again["acquireTime"]) == (0, first["acquireTime"])
    other = lease.claim(held, "b", timing, 30.0)
    assert (other["leaseTransitions"], other["acquireTime"]) == (1, other["renewTime"])


@pytest.mark.parametrize("numbers", [(10, 15.0, 2.0), (15, 2.0, 10.0), (15, 10.0, 0.0)])
def test_a_timing_that_lets_two_lead(numbers: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="retry_seconds < deadline_seconds < duration_seconds"):
        Timing(*numbers)
