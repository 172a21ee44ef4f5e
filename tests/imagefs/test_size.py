"""imagefs.size: what people write for a number of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("64K", 65536), ("4MiB", 4 << 20), ("20 G", 20 << 30), ("1tb", 1 << 40), (" 7 ", 7)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size.parse(text) == expected


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "3X", "1 2", "0x10", "1Ki B", "٣"])
def test_what_is_none(text: str) -> None:
    assert size.parse(text) is None


@given(st.text())
def test_any_text_is_a_size_or_none(text: str) -> None:
    found = size.parse(text)
    assert found is None or found >= 0
