"""The windows against what they stand for, computed the long way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.autoscaler import windows
from serving.autoscaler.windows import Bucket, Peak

WINDOW = 60.0


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 1e6)), min_size=1, max_size=150))
def test_a_peak_is_the_largest_of_its_window_give_or_take_a_sixtieth(
    steps: list[tuple[float, float]],
) -> None:
    peak, stamp, seen = Peak(), 0.0, []
    for elapsed, value in steps:
        stamp += elapsed
        peak = peak.pushed(stamp, value, WINDOW)
        seen.append((stamp, value))
        recent = [each for at, each in seen if at >= stamp - WINDOW * 59 / 60]
        assert max(recent) <= peak.value
        assert peak.value in [each for at, each in seen if at >= stamp - WINDOW]
        assert len(peak.entries) <= 62


def buckets(
    counts: list[float], seconds: float = 1.0, kept_seconds: float = windows.KEPT_SECONDS
) -> windows.History:
    history: windows.History = ()
    for count in counts:
        history = windows.appended(history, Bucket(seconds, count, count, count, count), kept_seconds)
    return history


@given(
    st.lists(
        st.tuples(st.sampled_from([0.25, 0.5, 1.0, WINDOW - 1]), st.integers(0, 9), st.integers(0, 3)),
        min_size=1,
        max_size=30,
    )
)
@settings(max_examples=500, deadline=None)
def test_a_peak_of_more_at_any_moment_is_never_less(steps: list[tuple[float, int, int]]) -> None:
    """Also just as a window ends, when what was left out beside something larger is missed."""
    less, more, stamp = Peak(), Peak(), 0.0
    for elapsed, value, surplus in steps:
        stamp += elapsed
        less = less.pushed(stamp, float(value), WINDOW)
        more = more.pushed(stamp, float(value + surplus), WINDOW)
        assert less.value <= more.value


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.floats(0.05, 20))
def test_a_history_keeps_the_last_minute_whatever_the_cadence(counts: list[float], seconds: float) -> None:
    history = buckets(counts, seconds)
    kept = sum(each.seconds for each in history)
    assert kept <= max(windows.KEPT_SECONDS, seconds) + 1e-6
    assert kept >= min(len(counts) * seconds, windows.KEPT_SECONDS - max(2.0, 2 * seconds)) - 1e-6
    assert len(history) <= windows.KEPT_SECONDS / windows.GRAIN_SECONDS + 2
    assert windows.recent(history) == history


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=600), st.floats(0.05, 20), st.floats(70, 600))
@settings(deadline=None)
def test_a_longer_history_is_coarse_where_it_is_old(
    counts: list[float], seconds: float, kept_seconds: float
) -> None:
    short, long = buckets(counts, seconds), buckets(counts, seconds, kept_seconds)
    assert windows.recent(long)[-len(short) :] == short
    kept = sum(each.seconds for each in long)
    assert kept >= min(len(counts) * seconds, kept_seconds - max(2.0, 2 * seconds)) - 1e-6
    assert kept <= kept_seconds + max(16.0, 2 * seconds)
    assert len(long) <= len(short) + kept_seconds / 8 + 2
    newest = counts[len(counts) - round(kept / seconds) :]
    assert sum(each.arrivals for each in long) == pytest.approx(sum(newest))


def test_a_ramp_is_growth_and_a_step_is_none() -> None:
    ramp = buckets([100 * 1.1**second for second in range(40)])
    factor, seconds = windows.growth(ramp, 3.0, 4.0)
    assert factor == pytest.approx(1.1, rel=0.02)
    assert seconds >= 4
    for after in range(1, 40):
        step = buckets([100.0] * (40 - after) + [1_000.0] * after)
        assert windows.growth(step, 3.0, 4.0) == (1.0, 0.0)


def test_next_to_nothing_is_no_basis_for_growth() -> None:
    history = buckets([2.0, 1.0, 1.0, 5e-324, 1e-300, 1e12])
    assert windows.growth(history, 3.0, 4.0) == (1.0, 0.0)
