"""Fixtures of the block device tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.imagefs.fuse import stack


@pytest.fixture
def blobs() -> Iterator[stack.BlobServer]:
    """An origin that obeys the test."""
    server = stack.BlobServer()
    yield server
    server.close()
