"""The block cache: uncompressed blocks in files named by their sha256, shared by every layer that has them.

Called by the fetcher (any thread); `get` and `put` never raise because of the disk. Owned here: one
background thread (sync, rename, evict), and the memfds that stand in for a disk that refuses. The files are
`cachedirectory.py`'s, what goes is `cachehousekeeping.py`'s and `eviction.py`'s, what is here
`cacheindex.py`'s. Invariants:

* A descriptor that leaves this module is of a block that was verified: by the caller of `put`, or here at the
  first use after a boot (the file's attribute, or this process's memory where there are none, says so).
* Descriptors are the caller's to close, are read by offset only, and stay readable after eviction.
* Space for a block is allocated before it is written: a full disk shows in `put`, where memory can still
  take its place, and not in writeback, after readers got the file.
* Processes may share the directory: a missing name is a miss, whoever removed it. Times of use (mtime, kept
  to the minute) and pins are shared through the files.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import logging
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator

from imagefs import cachedirectory, cachehousekeeping, cacheindex, errors, eviction
from imagefs.draft import Draft

_log = logging.getLogger(__name__)

_TOUCH_SECONDS = 60.0
_DISK_RETRY_SECONDS = 10.0
_LEAST_PAUSE_SECONDS = 1.0
_HOUSEKEEPING_SECONDS = 30.0
_RESCAN_SECONDS = 60.0
_MEMORY_BYTES = 64 * 1024 * 1024
"""Memfds that the cache itself keeps while the disk refuses: enough for the blocks being read right now."""
_IDLE_RESCAN_SECONDS = 300.0
"""How long the index of a cache that this process does not write to may miss what others did."""


@dataclasses.dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters since start, and the directory at the last look. `memory_blocks` and `memory_bytes` were
    handed out as memfds; they live until their readers close them."""

    quota_bytes: int
    used_bytes: int
    blocks: int
    unsynced_blocks: int
    hits: int
    misses: int
    written_blocks: int
    evicted_blocks: int
    corrupt_blocks: int
    disk_errors: int
    memory_blocks: int
    memory_bytes: int


class BlockCache:
    """See the module. `quota_bytes` bounds what the files occupy on disk; `free_floor_bytes` of the
    filesystem stay free, and never less than 64 MiB or a fiftieth of it. Both are restored in the
    background. `in_use` gives the digests that images in use have, which are the last to go; it is called in
    the background."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        quota_bytes: int,
        free_floor_bytes: int,
        in_use: Callable[[], Collection[bytes]] = frozenset,
    ) -> None:
        self._files = cachedirectory.CacheDirectory(pathlib.Path(directory).absolute())
        self._in_use = in_use
        self._quota_bytes = quota_bytes
        self._free_floor_bytes = free_floor_bytes
        self._lock = threading.Lock()
        self._check_locks = tuple(threading.Lock() for _ in range(16))
        self._checked: set[bytes] = set()
        self._used_at: dict[bytes, float] = {}
        self._touched_at: dict[bytes, float] = {}
        self._unsynced: dict[bytes, str] = {}
        self._memory: collections.OrderedDict[bytes, tuple[int, int]] = collections.OrderedDict()
        self._counts: collections.Counter[str] = collections.Counter()
        self.index = cacheindex.CacheIndex()
        self._scanned_at = 0.0
        self._disk_retry_at = 0.0
        self._refused = False
        self._closed = False
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="block-cache", daemon=True)
        self._thread.start()

    # -- reading -----------------------------------------------------------------------------------

    def get(self, digest: bytes, length: int) -> int | None:
        """A descriptor of the verified block, or None. Reads and hashes the file if nobody did since boot."""
        found = self.get_checked(digest, length)
        if found is not None:
            return found
        with self._check_locks[digest[0] % len(self._check_locks)]:
            fd = self._open(digest)
            if fd is None:
                return None
            try:
                intact = self._was_checked(digest, fd) or cachedirectory.hash_file(fd) == digest
                whole = os.fstat(fd).st_size == length
            except OSError as exc:
                _log.warning("block cache: cannot read %s: %s", self._files.block_path(digest), exc)
                intact = whole = False
            if intact and whole:
                self.mark_checked(digest, fd)
                self._used(digest, fd)
                return fd
            os.close(fd)
            if not intact:
                self.discard(digest)
            return None

    def get_checked(self, digest: bytes, length: int) -> int | None:
        """As `get`, but None as well for a file that must be hashed first: a few microseconds, always."""
        fd = self._from_memory(digest) if self._memory else None
        if fd is not None:
            return fd
        fd = self._open(digest)
        if fd is None:
            with self._lock:
                self._counts["misses"] += 1
            return None
        if os.fstat(fd).st_size == length and self._was_checked(digest, fd):
            self._used(digest, fd)
            return fd
        self._checked.discard(digest)
        os.close(fd)
        return None

    def present(self, digest: bytes) -> bool:
        """Whether there is a file of that name, checked or not."""
        return digest in self._unsynced or os.path.exists(self._files.block_path(digest))

    def __contains__(self, digest: object) -> bool:
        """As `present`, without asking the disk: true but for what other processes did meanwhile."""
        return digest in self._unsynced or digest in self.index

    # -- writing -----------------------------------------------------------------------------------

    def draft(self, length: int) -> Draft:
        """A place for a block of `length` bytes that is about to arrive."""
        takes = not self._closed and time.monotonic() >= self._disk_retry_at
        return Draft(self._files if takes else None, length)

    def put(self, digest: bytes, written: Draft, data: bytes | memoryview) -> int:
        """Keep the block that was written to a draft, and give a descriptor of it before it is synced. `data`
        is all of it, verified, and the caller's again afterwards. UnavailableError only when there is neither
        disk nor memory for it."""
        try:
            finished = written.finish(data)
        except OSError as exc:
            self._disk_refuses(exc)
            self._work.put(self._evict)
            finished = None
        if finished is None:
            return self._put_memory(digest, data)
        path, fd = finished
        self._checked.add(digest)
        self._used_at[digest] = self._touched_at[digest] = time.time()
        self._unsynced[digest] = path
        self._work.put(functools.partial(self._persist, digest, path))
        return fd

    def pin(self, owner: str, digests: Iterable[bytes]) -> None:
        """Keep these blocks, once they are here, from eviction until `unpin(owner)`; replaces what the owner
        pinned before. Holds across restarts and for every process that shares the directory."""
        try:
            self._files.pin(owner, digests)
        except OSError as exc:
            raise errors.UnavailableError(f"block cache: cannot write the pins of {owner}: {exc}") from exc

    def unpin(self, owner: str) -> None:
        """Drop the owner's pins; others' pins of the same blocks stay."""
        try:
            self._files.unpin(owner)
        except OSError as exc:
            raise errors.UnavailableError(f"block cache: cannot drop the pins of {owner}: {exc}") from exc

    def pins(self) -> Iterator[tuple[str, list[bytes]]]:
        """Every owner, and the digests that it pins."""
        return self._files.pins()

    def use(self, digest: bytes) -> bool:
        """Say that a block, or a layer file, is used though nobody asks for it; False if it is not here."""
        now = time.time()
        path = self._files.block_path(digest)
        self._used_at[digest] = now
        if abs(now - self._touched_at.get(digest, 0.0)) >= _TOUCH_SECONDS:
            self._touched_at[digest] = now
            with contextlib.suppress(OSError):
                os.utime(path)
        return os.path.exists(path)

    def copy_room_bytes(self, percent: int = eviction.COPIES_PERCENT) -> int:
        """How much full copies may add now; see eviction.copy_room_bytes. 0 or less for nothing, as before
        the first look at the directory, and while the disk refuses blocks."""
        if not self.index.ready.is_set() or time.monotonic() < self._disk_retry_at:
            return 0
        kept = set(self._in_use())
        kept.update(digest for _, digests in self._files.pins() for digest in digests)
        unsynced_bytes = 0
        for digest, path in list(self._unsynced.items()):
            if digest in kept and digest not in self.index:
                with contextlib.suppress(OSError):  # it has its name by now
                    unsynced_bytes += os.stat(path).st_blocks * 512
        kept_bytes = self.index.occupied_bytes(kept) + unsynced_bytes
        used_bytes = self.index.used_bytes + unsynced_bytes
        return eviction.copy_room_bytes(kept_bytes, used_bytes, self._space(), percent)

    def collect(self) -> cachehousekeeping.Collected:
        """Bring the cache under its limits now, and wait for it."""
        collected: concurrent.futures.Future[cachehousekeeping.Collected] = concurrent.futures.Future()

        def work() -> None:
            try:
                collected.set_result(self._evict())
            except OSError as exc:
                collected.set_exception(
                    errors.UnavailableError(f"block cache: cannot look at {self._files.path}: {exc}")
                )
            except Exception as exc:
                collected.set_exception(exc)

        if self._closed:
            raise errors.UnavailableError("block cache: closing")
        self._work.put(work)
        return collected.result()

    def stats(self) -> CacheStats:
        """Counters and sizes; see CacheStats."""
        with self._lock:
            counts = self._counts
            return CacheStats(
                quota_bytes=self._quota_bytes,
                used_bytes=self.index.used_bytes,
                blocks=len(self.index),
                unsynced_blocks=len(self._unsynced),
                hits=counts["hits"],
                misses=counts["misses"],
                written_blocks=counts["written"],
                evicted_blocks=counts["evicted"],
                corrupt_blocks=counts["corrupt"],
                disk_errors=counts["disk_errors"],
                memory_blocks=counts["memory_blocks"],
                memory_bytes=counts["memory_bytes"],
            )

    def close(self) -> None:
        """Sync and name what was put, then release everything but descriptors handed out."""
        if self._closed:
            return
        self._closed = True
        self._work.put(None)
        self._thread.join()
        self._drop_memory()
        self._files.close()

    # -- inside ------------------------------------------------------------------------------------

    def _open(self, digest: bytes) -> int | None:
        path = self._files.block_path(digest)
        # The third look is for a rename that came between the first two.
        for candidate in (path, self._unsynced.get(digest), path):
            if candidate is None:
                break
            try:
                return os.open(candidate, os.O_RDONLY | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            except OSError as exc:
                _log.warning("block cache: cannot open %s: %s", candidate, exc)
                break
        return None

    def _was_checked(self, digest: bytes, fd: int) -> bool:
        if digest not in self._checked:
            if not self._files.is_checked(fd):
                return False
            self._checked.add(digest)
        return True

    def _used(self, digest: bytes, fd: int) -> None:
        now = time.time()
        self._used_at[digest] = now
        if abs(now - self._touched_at.get(digest, 0.0)) >= _TOUCH_SECONDS:  # the clock may be set back
            self._touched_at[digest] = now
            # On a read-only filesystem this process still knows the time.
            with contextlib.suppress(OSError):
                os.utime(fd)
        with self._lock:
            self._counts["hits"] += 1

    def mark_checked(self, digest: bytes, fd: int) -> None:
        """The file was compared with its name."""
        self._checked.add(digest)
        self._files.mark_checked(fd)

    def discard(self, digest: bytes) -> None:
        """The file is not what its name says."""
        path = self._files.block_path(digest)
        _log.warning("block cache: %s is damaged; removed, it will be fetched again", path)
        self._checked.discard(digest)
        with self._lock:
            self._counts["corrupt"] += 1
        self.index.remove(digest)
        with contextlib.suppress(OSError):
            os.unlink(path)

    # -- without a disk ----------------------------------------------------------------------------

    def _from_memory(self, digest: bytes) -> int | None:
        with self._lock:
            held = self._memory.get(digest)
            if held is None:
                return None
            try:
                fd = os.dup(held[0])
            except OSError:
                return None  # no descriptor left: a miss; who fetches it will say so
            self._memory.move_to_end(digest)
            self._counts["hits"] += 1
            return fd

    def _put_memory(self, digest: bytes, data: bytes | memoryview) -> int:
        try:
            fd, reader = _memory_file(data)
        except OSError:
            self._drop_memory()  # they may be what uses up the descriptors, or the memory
            try:
                fd, reader = _memory_file(data)
            except OSError as exc:
                raise errors.UnavailableError(
                    f"block cache: neither disk nor memory for a block: {exc}"
                ) from exc
        with self._lock:
            self._counts["memory_blocks"] += 1
            self._counts["memory_bytes"] += len(data)
            replaced = self._memory.pop(digest, None)
            if replaced is not None:
                os.close(replaced[0])
            self._memory[digest] = (fd, len(data))
            held = sum(size for _, size in self._memory.values())
            while held > _MEMORY_BYTES and len(self._memory) > 1:
                _, (oldest, size) = self._memory.popitem(last=False)
                os.close(oldest)
                held -= size
        return reader

    def _write_memory(self) -> None:
        """The disk may take blocks again: those held in memory are what it lacks."""
        with self._lock:
            held = list(self._memory.items())
        for digest, (fd, length) in held:
            try:
                data = os.pread(fd, length, 0)
            except OSError:
                continue  # dropped meanwhile
            if len(data) != length or hashlib.sha256(data).digest() != digest:
                continue  # the number is another file's by now
            draft = self.draft(length)
            draft.write(memoryview(data), 0)
            os.close(self.put(digest, draft, data))
            if time.monotonic() < self._disk_retry_at:
                return  # not yet
            with self._lock:
                if self._memory.get(digest) == (fd, length):
                    os.close(self._memory.pop(digest)[0])

    def _drop_memory(self) -> None:
        with self._lock:
            for fd, _ in self._memory.values():
                os.close(fd)
            self._memory.clear()

    def _disk_refuses(self, exc: OSError) -> None:
        with self._lock:
            # A lack of descriptors is over sooner than that of a disk.
            short = exc.errno in (errno.EMFILE, errno.ENFILE)
            pause_seconds = _LEAST_PAUSE_SECONDS if short else _DISK_RETRY_SECONDS
            self._disk_retry_at = time.monotonic() + pause_seconds
            self._counts["disk_errors"] += 1
            first, self._refused = not self._refused, True
        if first:
            _log.warning(
                "block cache: %s refuses blocks (%s); serving from memory until it takes them again",
                self._files.path,
                exc,
            )

    # -- background --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._files.clean_dead_writers()
        except OSError as exc:
            _log.warning("block cache: cannot clean %s: %s", self._files.path, exc)
        work: Callable[[], object] | None = self._evict
        while work is not None:
            try:
                work()
            except OSError as exc:
                _log.warning("block cache: %s: cannot look around, trying again: %s", self._files.path, exc)
            except Exception:
                # Blocks that come later must still be named and evicted.
                _log.exception("block cache: %s: housekeeping failed", self._files.path)
            try:
                work = self._work.get(timeout=self._pause_seconds())
            except queue.Empty:
                work = self._look_around

    def _persist(self, digest: bytes, path: str) -> None:
        """Sync one written block and name it; then see to the limits."""
        try:
            allocated = self._files.publish(path, digest)
        except OSError as exc:
            self._checked.discard(digest)
            self._disk_refuses(exc)
            return
        finally:
            if self._unsynced.get(digest) == path:
                del self._unsynced[digest]
        with self._lock:
            self._counts["written"] += 1
        self.index.add(digest, allocated)
        if time.monotonic() - self._scanned_at > _RESCAN_SECONDS:
            self._evict()  # others may have written, too
        else:
            self._keep_limits()
        if self._refused and time.monotonic() >= self._disk_retry_at:
            self._refused = False
            _log.warning("block cache: %s takes blocks again", self._files.path)

    def _pause_seconds(self) -> float:
        """How long the thread may wait for work: what stands in memory is to go to the disk soon."""
        if not self._memory:
            return _HOUSEKEEPING_SECONDS
        return max(_LEAST_PAUSE_SECONDS, self._disk_retry_at - time.monotonic())

    def _look_around(self) -> None:
        """Nothing was written for a while."""
        if self._memory and time.monotonic() >= self._disk_retry_at:
            self._write_memory()
        if time.monotonic() - self._scanned_at > _IDLE_RESCAN_SECONDS:
            self._evict()
        else:
            self._keep_limits()

    def _keep_limits(self) -> None:
        if self._space().excess_bytes(self.index.used_bytes) > 0:
            self._evict()

    def _space(self) -> eviction.Space:
        return cachehousekeeping.space(self._files, self._quota_bytes, self._free_floor_bytes)

    def _evict(self) -> cachehousekeeping.Collected:
        collected = cachehousekeeping.collect(
            self._files, self._quota_bytes, self._free_floor_bytes, self._in_use, self._used_at
        )
        kept = {entry.digest for entry in collected.kept}
        for digest in set(self._used_at) - kept - set(self._unsynced):
            self._used_at.pop(digest, None)
            self._touched_at.pop(digest, None)
            self._checked.discard(digest)
        self.index.replace(collected.kept)
        with self._lock:
            self._counts["evicted"] += len(collected.removed)
        self._scanned_at = time.monotonic()
        if collected.short_bytes > 0:
            text = f"{collected.short_bytes} bytes over its limits, and nothing left to evict"
            self._disk_refuses(OSError(errno.ENOSPC, text))
        elif collected.removed:
            self._disk_retry_at = 0.0  # there is room now
        return collected


def _memory_file(data: bytes | memoryview) -> tuple[int, int]:
    """A memfd that holds the block, and a descriptor for reading only. Raises OSError."""
    fd = os.memfd_create("glowplug-block")
    try:
        cachedirectory.write_all(fd, memoryview(data))
        return fd, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    except OSError:
        os.close(fd)
        raise
