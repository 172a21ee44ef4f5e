"""What an engine says of itself, as numbers; whatever else it may say is None."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from serving.providers import engineclient

SAID: dict[str, Any] = {
    "in_flight": 3,
    "waiting": 2,
    "counters": {"finished": 10, "rejected": 1, "busy_nanoseconds": 4_000_000_000},
    "usage": {"cpus": 2, "cpu_seconds": 1.5, "memory_bytes": 50, "memory_limit_bytes": 200},
}


def test_the_numbers() -> None:
    found = engineclient.vitals(SAID, 7.0)
    assert found is not None
    assert (found.at, found.in_flight, found.queued, found.finished, found.rejected) == (7.0, 3, 2, 10, 1)
    assert (found.busy_seconds, found.cpus, found.cpu_seconds, found.memory) == (4.0, 2.0, 1.5, 0.25)


def test_a_kv_cache_is_memory_where_less_of_it_is_left() -> None:
    for cache, memory in ((0.9, 0.9), (0.1, 0.25), (0.0, 0.25), ("x", 0.25)):
        found = engineclient.vitals({**SAID, "kv_cache": cache}, 7.0)
        assert found is not None
        assert found.memory == memory


def test_without_usage_the_requests_are_still_known() -> None:
    found = engineclient.vitals({**SAID, "usage": None}, 7.0)
    assert found is not None
    assert (found.in_flight, found.cpu_seconds, found.memory) == (3, None, None)


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(
        st.sampled_from([*SAID, "x"]),
        _ANY
        | st.fixed_dictionaries(
            {
                "finished": _ANY,
                "rejected": _ANY,
                "busy_nanoseconds": _ANY,
                "memory_bytes": _ANY,
                "memory_limit_bytes": _ANY,
                "cpus": _ANY,
                "cpu_seconds": _ANY,
            }
        ),
    )
)
def test_whatever_is_said_gives_numbers_or_none(said: dict[str, Any]) -> None:
    found = engineclient.vitals(said, 7.0)
    if found is not None:
        numbers = [found.in_flight, found.queued, found.finished, found.rejected, found.busy_seconds]
        numbers += [each for each in (found.cpus, found.cpu_seconds, found.memory) if each is not None]
        assert all(math.isfinite(each) and each >= 0 for each in numbers)
