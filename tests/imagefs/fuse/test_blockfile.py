"""Reading one block's file: the same bytes by every way, and errors told apart from bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs.fuse import blockfile

_CONTENT = random.Random(5).randbytes((1 << 20) + 12345)


@pytest.fixture
def block(tmp_path: Path) -> Iterator[blockfile.BlockFile]:
    """A block whose last window is cut, none of it in the page cache."""
    path = tmp_path / "block"
    path.write_bytes(_CONTENT)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    opened = blockfile.BlockFile(fd)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (4096, 65536),
        (524288 - 4096, 8192),  # over the border of two windows
        (524288, 262144),  # large: past the page cache
        (4097, 262144),  # large, and not aligned
        (len(_CONTENT) - 100, 100),
        (0, len(_CONTENT)),
    ],
)
def test_the_bytes_are_those_of_the_file(block: blockfile.BlockFile, offset: int, length: int) -> None:
    """Cold, and again from memory."""
    for _ in range(2):
        view = memoryview(bytearray(length))
        assert block.read(view, offset)
        assert view == _CONTENT[offset : offset + length]


@pytest.mark.parametrize("length", [101, 262144])
def test_a_file_that_is_shorter_is_an_error(block: blockfile.BlockFile, length: int) -> None:
    """Cut off by somebody, it must not answer with what the buffer held before."""
    assert not block.read(memoryview(bytearray(length)), len(_CONTENT) - 100)


def test_a_block_in_memory_reads_alike() -> None:
    """On a full disk the server sends a memfd, which has no direct reads."""
    fd = os.memfd_create("block")
    os.write(fd, _CONTENT)
    block = blockfile.BlockFile(fd)
    assert block.in_memory
    for length in (100, 300000):
        view = memoryview(bytearray(length))
        assert block.read(view, 4096)
        assert view == _CONTENT[4096 : 4096 + length]
    block.close()
