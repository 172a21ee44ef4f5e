"""Go's durations, as containerd's and kubelet's configuration have them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import duration, errors


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10s", 10), ("1h30m", 5400), ("300ms", 0.3), ("0", 0), ("1.5h", 5400), (".5s", 0.5), ("0s", 0)],
)
def test_known(text: str, seconds: float) -> None:
    assert duration.parse(text, "where") == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "10", "-1s", "s", "1s 2s", "1d", None, 5, True, "9" * 100 + "s", "1.s.s"]
)
def test_not_known(text: object) -> None:
    with pytest.raises(errors.InvalidInputError, match="where is not a duration"):
        duration.parse(text, "where")


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_go_writes_what_we_read(hours: int, minutes: int, seconds: int, milliseconds: int) -> None:
    text = f"{hours}h{minutes}m{seconds}.{milliseconds:03}s"
    assert duration.parse(text, "w") == pytest.approx(
        hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
    )


@given(st.text(max_size=20))
def test_any_text(text: str) -> None:
    try:
        assert duration.parse(text, "w") >= 0
    except errors.InvalidInputError:
        return
