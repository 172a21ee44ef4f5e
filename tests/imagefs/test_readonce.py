"""Reads that leave no pages behind: right bytes everywhere, and what the page cache keeps of them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from imagefs import readonce, syscalls

DATA = os.urandom(1 << 20)


def opened(folder: Path) -> int:
    """A file of DATA on disk, none of it in the page cache."""
    (folder / "file").write_bytes(DATA)
    fd = os.open(folder / "file", os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd


def test_it_reads_what_pread_reads(tmp_path: Path) -> None:
    fd = opened(tmp_path)
    for length, offset in [
        (100, 0),
        (4096, 5000),
        (1 << 20, 0),
        (1 << 20, 1000),
        (10, 1 << 20),
        (1, 1 << 21),
    ]:
        assert readonce.pread(fd, length, offset) == os.pread(fd, length, offset)
    os.close(fd)


def test_what_it_brought_in_leaves_and_what_was_there_stays(tmp_path: Path) -> None:
    fd = opened(tmp_path)
    try:
        os.preadv(fd, [bytearray(1)], 0, 0x80)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert syscalls.cached_pages(fd, 0, len(DATA)) == 0
    except OSError as exc:
        pytest.skip(f"this kernel or filesystem has no such reads, or cannot tell: {exc}")
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead beside what is read
    os.pread(fd, 65536, 0)
    held = syscalls.cached_pages(fd, 0, len(DATA))
    assert held >= 16
    assert readonce.pread(fd, len(DATA), 0) == DATA
    assert syscalls.cached_pages(fd, 0, 65536) == 16
    assert syscalls.cached_pages(fd, 0, len(DATA)) <= held + 16  # of 256: a read-ahead may be under way
    os.close(fd)


def test_a_filesystem_without_such_reads_is_read_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = opened(tmp_path)

    def refuse(*arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "preadv", refuse)
    assert readonce.pread(fd, 5000, 70) == DATA[70:5070]
    os.close(fd)
