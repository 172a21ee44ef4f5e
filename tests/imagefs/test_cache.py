from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from imagefs import cache, cachedirectory, cachehousekeeping, errors
from tests.imagefs.scripted import eventually

LENGTH = 64 * 1024
QUOTA = 1 << 30
ROOT = pathlib.Path(__file__).parents[2]


def block(number: int, length: int = LENGTH) -> tuple[bytes, bytes]:
    data = (b"block %08d " % number * (length // 15 + 1))[:length]
    return hashlib.sha256(data).digest(), data


@contextlib.contextmanager
def opened(path: pathlib.Path, quota: int = QUOTA, floor: int = 0) -> Iterator[cache.BlockCache]:
    made = cache.BlockCache(path, quota, floor)
    try:
        yield made
    finally:
        made.close()


def take(fd: int | None, length: int = LENGTH) -> bytes:
    assert fd is not None
    try:
        return os.pread(fd, length + 1, 0)
    finally:
        os.close(fd)


def put(target: cache.BlockCache, digest: bytes, data: bytes) -> int:
    """As the fetcher does it: piece by piece, then whole."""
    draft = target.draft(len(data))
    for start in range(0, len(data), 30_000):
        draft.write(memoryview(data)[start : start + 30_000], start)
    fd = target.put(digest, draft, data)
    draft.close()
    return fd


def store(target: cache.BlockCache, number: int) -> bytes:
    digest, data = block(number)
    assert take(put(target, digest, data)) == data
    return digest


def path_of(path: pathlib.Path, digest: bytes) -> pathlib.Path:
    return path / "blocks" / digest.hex()[:2] / digest.hex()


def settled(target: cache.BlockCache) -> None:
    eventually(lambda: target.stats().unsynced_blocks == 0)


def test_a_block_is_readable_at_once_and_after_reopening(tmp_path: pathlib.Path) -> None:
    digest, data = block(1)
    with opened(tmp_path) as first:
        assert first.get(digest, LENGTH) is None
        assert take(put(first, digest, data)) == data
        assert take(first.get(digest, LENGTH)) == data
    with opened(tmp_path) as second:
        assert take(second.get_checked(digest, LENGTH)) == data
    assert not list((tmp_path / "writers").glob("[!.]*")), "nothing is left of the writers"
    assert (tmp_path / "blocks").stat().st_mode & 0o777 == 0o700


def test_descriptors_are_read_only(tmp_path: pathlib.Path) -> None:
    digest, data = block(1)
    with opened(tmp_path) as target:
        fd = put(target, digest, data)
        with pytest.raises(OSError):
            os.pwrite(fd, b"x", 0)
        os.close(fd)


def test_zeros_at_the_end_take_no_space(tmp_path: pathlib.Path) -> None:
    data = b"x" * 5000 + bytes(4 << 20)
    digest = hashlib.sha256(data).digest()
    with opened(tmp_path) as target:
        assert take(put(target, digest, data), len(data)) == data
    assert path_of(tmp_path, digest).stat().st_blocks * 512 <= 3 * LENGTH


def test_what_was_not_checked_since_boot_is_hashed_before_use(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as target:
        good, bad, short = (store(target, number) for number in range(3))
    for digest in (good, bad, short):
        os.setxattr(path_of(tmp_path, digest), cachedirectory.BOOT_ATTRIBUTE, b"an earlier boot")
    with path_of(tmp_path, bad).open("r+b") as file:
        file.seek(LENGTH // 2)
        file.write(b"!")
    os.truncate(path_of(tmp_path, short), LENGTH - 1)
    with opened(tmp_path) as target:
        assert target.get_checked(good, LENGTH) is None
        assert target.present(good)
        assert take(target.get(good, LENGTH)) == block(0)[1]
        assert take(target.get_checked(good, LENGTH)) == block(0)[1]
        assert target.get(bad, LENGTH) is None
        assert target.get(short, LENGTH) is None
        assert target.stats().corrupt_blocks == 2
        assert not path_of(tmp_path, bad).exists()
        store(target, 1)
        assert take(target.get(bad, LENGTH)) == block(1)[1]
    with opened(tmp_path) as target:
        assert take(target.get_checked(good, LENGTH)) == block(0)[1], "the check is remembered until the boot"


def test_a_file_cut_short_since_it_was_checked_is_a_miss(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as target:
        digest = store(target, 1)
        settled(target)
        os.truncate(path_of(tmp_path, digest), 100)
        assert target.get(digest, LENGTH) is None
        store(target, 1)
        settled(target)
        assert take(target.get(digest, LENGTH)) == block(1)[1]


def test_a_wrong_length_asked_for_does_not_cost_the_block(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as target:
        digest = store(target, 1)
        settled(target)
        assert target.get(digest, LENGTH + 1) is None
        assert take(target.get(digest, LENGTH)) == block(1)[1]


def test_the_quota_holds_and_open_descriptors_survive_eviction(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path, quota=10 * LENGTH) as target:
        first = block(0)
        held = put(target, *first)
        digests = [store(target, number) for number in range(1, 40)]
        settled(target)
        files = list((tmp_path / "blocks").glob("*/*"))
        assert sum(file.stat().st_blocks * 512 for file in files) <= 10 * LENGTH
        assert target.get(first[0], LENGTH) is None
        assert take(held) == first[1]
        assert take(target.get(digests[-1], LENGTH)) == block(39)[1]
        stats = target.stats()
        assert stats.evicted_blocks >= 30
        assert stats.used_bytes <= 10 * LENGTH


def test_least_recently_used_go_and_pinned_and_unused_are_told_apart(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as target:
        digests = [store(target, number) for number in range(8)]
        settled(target)
        target.pin("base image", digests[0:2])
        target.pin("another", digests[1:2])
        assert dict(target.pins()) == {"base image": digests[:2], "another": digests[1:2]}
        target.unpin("base image")
        for number in (2, 3):
            os.close(target.get(digests[number], LENGTH) or -1)
    for number in (0, 1, 4, 5, 6):
        os.utime(path_of(tmp_path, digests[number]), (1000 + number, 1000 + number))
    in_use = {*digests[:7]}
    with contextlib.closing(cache.BlockCache(tmp_path, 4 * LENGTH, 0, lambda: in_use)) as target:
        eventually(lambda: target.stats().evicted_blocks == 5)
        left = [number for number in range(8) if target.present(digests[number])]
        assert left == [1, 2, 3]


def test_when_all_is_pinned_blocks_come_from_memory(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as target:
        digests = [store(target, number) for number in range(4)]
        target.pin("all", digests)
    with opened(tmp_path, quota=2 * LENGTH) as target:
        eventually(lambda: target.stats().disk_errors > 0)
        extra = store(target, 9)
        assert target.stats().memory_blocks == 1
        assert take(target.get(extra, LENGTH)) == block(9)[1]
        assert all(target.present(digest) for digest in digests)


def test_a_draft_that_was_not_put_leaves_nothing(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as target:
        digest, data = block(1)
        with contextlib.closing(target.draft(LENGTH)) as draft:
            draft.write(memoryview(data)[:10_000], 0)
            assert not target.present(digest)
            assert target.get(digest, LENGTH) is None
        names = [file.name for file in (tmp_path / "writers").rglob("*") if file.is_file()]
        assert set(names) <= {"lock", ".lock"}
        assert store(target, 1) == digest


def test_processes_share_a_directory(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as other:
        digest = store(one, 1)
        settled(one)
        assert take(other.get_checked(digest, LENGTH)) == block(1)[1]
        path_of(tmp_path, digest).unlink()
        assert one.get(digest, LENGTH) is None
        store(one, 2)
        assert take(put(other, *block(2))) == block(2)[1]
        settled(one)
        settled(other)
        assert take(one.get(block(2)[0], LENGTH)) == block(2)[1]


WRITE_FOREVER = """
import itertools, os, sys
sys.path.insert(0, sys.argv[2])
from imagefs import cache
from tests.imagefs.test_cache import block, put
target = cache.BlockCache(sys.argv[1], 1 << 40, 0)
for number in itertools.count():
    digest, data = block(number, 1 << 20)
    os.close(put(target, digest, data))
    print(number, flush=True)
"""


def test_a_process_killed_while_writing_leaves_whole_blocks_and_no_litter(tmp_path: pathlib.Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, str(tmp_path), str(ROOT)], stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        for _ in range(10):
            writer.stdout.readline()
    eventually(lambda: bool(list((tmp_path / "blocks").glob("*/*"))))
    with opened(tmp_path) as living:
        kept = store(living, 1_000_000)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        assert len(list((tmp_path / "writers").glob("[!.]*"))) == 3
        with opened(tmp_path):
            eventually(lambda: len(list((tmp_path / "writers").glob("[!.]*"))) == 1)
        assert take(living.get(kept, LENGTH)) == block(1_000_000)[1]
    files = list((tmp_path / "blocks").glob("*/*"))
    assert files
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name


def test_a_directory_that_cannot_be_is_a_configuration_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.ConfigurationError, match="choose another"):
        cache.BlockCache(tmp_path / "file" / "cache", QUOTA, 0)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount_point], check=True)
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", mount_point], check=True)


@pytest.mark.root
def test_a_disk_filled_by_others_degrades_to_memory_and_recovers(
    small_disk: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(small_disk / "cache") as target:
        with contextlib.suppress(OSError):
            (small_disk / "hog").write_bytes(b"x" * (4 << 20))
        for number in range(20):
            digest = store(target, number)
            assert take(target.get(digest, LENGTH)) == block(number)[1]
        stats = target.stats()
        assert (stats.memory_blocks, stats.memory_bytes) == (20, 20 * LENGTH)
        assert len([record for record in caplog.records if "refuses blocks" in record.message]) == 1
        (small_disk / "hog").unlink()
        numbers = itertools.count(100)

        def taken() -> bool:
            target._disk_retry_at = 0.0  # as if the pause were over
            store(target, next(numbers))
            return target.stats().written_blocks > 0

        eventually(taken)
        settled(target)
        assert len([record for record in caplog.records if "takes blocks again" in record.message]) == 1
    files = list(small_disk.glob("cache/blocks/*/*"))
    assert files
    assert all(hashlib.sha256(file.read_bytes()).hexdigest() == file.name for file in files)


@pytest.mark.root
def test_a_small_disk_keeps_some_room_free_and_goes_on(small_disk: pathlib.Path) -> None:
    with opened(small_disk / "cache") as target:
        for number in range(100):
            store(target, number)
        settled(target)
        # The last block is named before what must go for it has gone.
        unit_bytes = os.statvfs(small_disk).f_frsize
        eventually(lambda: os.statvfs(small_disk).f_bavail * unit_bytes >= (2 << 20) // 50)
        assert target.stats().evicted_blocks > 0


@pytest.mark.root
def test_a_read_only_cache_is_read_and_not_written(small_disk: pathlib.Path) -> None:
    with opened(small_disk / "cache") as target:
        kept = store(target, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with opened(small_disk / "cache") as target:
        assert take(target.get(kept, LENGTH)) == block(1)[1]
        other = store(target, 2)
        assert take(target.get(other, LENGTH)) == block(2)[1]
        assert target.stats().memory_blocks == 1


def test_memory_kept_for_a_refusing_disk_is_bounded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_MEMORY_BYTES", 3 * LENGTH)
    with opened(tmp_path) as target:
        target._disk_retry_at = time.monotonic() + 3600
        for number in range(10):
            store(target, number)
        held = [target.get(block(number)[0], LENGTH) for number in range(10)]
        assert [number for number in range(10) if held[number] is not None] == [7, 8, 9]
        assert [take(fd) for fd in held if fd is not None] == [block(number)[1] for number in (7, 8, 9)]


def test_a_clock_that_is_set_back_changes_nothing_but_the_order(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks used after the jump are written down as used, and the quota holds."""
    now = 2e9
    monkeypatch.setattr(cache.time, "time", lambda: now)
    with opened(tmp_path, quota=4 * LENGTH) as target:
        first = store(target, 0)
        settled(target)
        os.utime(path_of(tmp_path, first), (3e9, 3e9))
        now = 1e9
        assert take(target.get(first, LENGTH)) == block(0)[1]
        assert path_of(tmp_path, first).stat().st_mtime < 2.5e9
        for number in range(1, 12):
            store(target, number)
            settled(target)
        target.collect()
        assert target.stats().used_bytes <= 4 * LENGTH


def test_verify_removes_what_is_wrong_and_nothing_else(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as target:
        digests = [store(target, number) for number in range(4)]
    flipped, short = path_of(tmp_path, digests[1]), path_of(tmp_path, digests[2])
    with flipped.open("r+b") as file:
        file.write(b"\xff")
    os.truncate(short, 100)
    files = cachedirectory.CacheDirectory(tmp_path)
    seen: list[int] = []
    found = cachehousekeeping.verify(files, list(files.scan()), seen.append)
    assert sorted(found.damaged) == sorted(digest.hex() for digest in digests[1:3])
    assert (found.blocks, found.stuck) == (4, ())
    assert sum(seen) == found.bytes_read == 3 * LENGTH + 100
    with opened(tmp_path) as again:
        assert [again.present(digest) for digest in digests] == [True, False, False, True]
        store(again, 1)


def test_the_index_follows_what_is_put_evicted_and_found_damaged(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path, quota=10 * LENGTH) as target:
        first = store(target, 0)
        settled(target)
        assert first in target.index
        assert target.index.used_bytes == target.index.occupied_bytes([first]) >= LENGTH
        for number in range(1, 20):
            store(target, number)
            settled(target)
        left = [number for number in range(20) if block(number)[0] in target.index]
        assert left == [number for number in range(20) if target.present(block(number)[0])]
        assert first not in target.index
        assert target.index.used_bytes <= 10 * LENGTH
    with opened(tmp_path) as again:
        assert again.index.ready.wait(30)
        assert len(again.index) == len(left)


def test_full_copies_get_room_above_what_is_in_use_or_pinned(tmp_path: pathlib.Path) -> None:
    in_use: set[bytes] = set()
    with contextlib.closing(cache.BlockCache(tmp_path, 10 * LENGTH, 0, lambda: in_use)) as target:
        digests = [store(target, number) for number in range(8)]
        settled(target)
        assert target.copy_room_bytes() == 9 * LENGTH
        target.pin("owner", digests[:2])
        in_use.update(digests[1:3])
        assert target.copy_room_bytes() == 6 * LENGTH


def test_collect_brings_the_cache_under_its_limits_and_says_what_went(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as target:
        digests = [store(target, number) for number in range(8)]
        settled(target)
        assert target.collect().removed == ()
    with opened(tmp_path, quota=4 * LENGTH) as target:
        target.collect()
        assert target.stats().used_bytes <= 4 * LENGTH
        target.pin("all", digests)
        assert len(target.index) == sum(target.present(digest) for digest in digests) > 1
    with opened(tmp_path, quota=LENGTH) as target:
        collected = target.collect()
        assert collected.removed == ()
        assert collected.short_bytes > 0


def test_a_look_without_descriptors_takes_nothing_for_gone(tmp_path: pathlib.Path) -> None:
    """What was listed passed for all: blocks that are there counted as missing, pinned ones could go."""
    with opened(tmp_path) as target:
        digests = [store(target, number) for number in range(4)]
        target.pin("image", digests)
        eventually(lambda: len(target.index) == 4)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            with pytest.raises(errors.UnavailableError):
                target.collect()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert all(digest in target.index for digest in digests)
        assert not target.collect().removed
        assert all(digest in target.index for digest in digests)
