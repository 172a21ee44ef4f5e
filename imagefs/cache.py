"""The block cache: uncompressed blocks in files named by their sha256, shared by every layer that has them.

    DIR/blocks/ab/abcdef...   one block each; a name appears by rename only, after its data was synced
    DIR/writers/TOKEN/        files being written by one process, which holds a lock on TOKEN/lock
    DIR/pins/SHA256_OF_OWNER  the owner's name and the digests that it pins, one a line

Called by the fetcher (any thread); `put` and `get` never raise because of the disk. Owned here: the
directory, one background thread (sync, rename, evict), and the memfds that stand in for a disk that refuses.
Invariants:

* A file descriptor that leaves this module is of a block that was verified: by the caller of `put`, or here
  at the first use after a boot (the attribute `user.glowplug.boot`, or this process's memory, says so).
* Descriptors are the caller's to close, read by offset only, and stay readable after eviction.
* Space for a block is allocated before it is written: a full disk shows in `put`, where memory can still
  take its place, and not in writeback, after readers got the file.
* Processes may share DIR: a missing name is a miss, whoever removed it. Times of use (mtime, kept to the
  minute) and pins are shared through the files.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import pathlib
import queue
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator

from imagefs import errors, eviction

_log = logging.getLogger(__name__)

BOOT_ATTRIBUTE = b"user.glowplug.boot"
_TOUCH_SECONDS = 60.0
_DISK_RETRY_SECONDS = 10.0
_HOUSEKEEPING_SECONDS = 30.0
_RESCAN_SECONDS = 60.0
_MEMORY_BYTES = 64 * 1024 * 1024
"""Memfds that the cache itself keeps while the disk refuses: enough for the blocks being read right now."""
_READ_BYTES = 1024 * 1024
_ZEROS = bytes(64 * 1024)


@dataclasses.dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters since start, and the state after the last look at the directory."""

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
    """See the module. `quota_bytes` bounds what the files occupy on disk, `free_floor_bytes` of the
    filesystem stay free; both are restored in the background."""

    def __init__(self, directory: str | os.PathLike[str], quota_bytes: int, free_floor_bytes: int) -> None:
        self._directory = pathlib.Path(directory).absolute()
        self._blocks = f"{self._directory}/blocks/"
        self._quota_bytes = quota_bytes
        self._free_floor_bytes = free_floor_bytes
        self._boot = _boot_id()
        self._lock = threading.Lock()
        self._check_locks = tuple(threading.Lock() for _ in range(16))
        self._checked: set[bytes] = set()
        self._used_at: dict[bytes, float] = {}
        self._touched_at: dict[bytes, float] = {}
        self._unsynced: dict[bytes, str] = {}
        self._memory: collections.OrderedDict[bytes, tuple[int, int]] = collections.OrderedDict()
        self._counts: collections.Counter[str] = collections.Counter()
        self._used_bytes = 0
        self._blocks_known = 0
        self._scanned_at = 0.0
        self._disk_retry_at = 0.0
        self._refused: str | None = None
        self._writer: _Writer | None = None
        self._numbers = itertools.count()
        self._work: queue.SimpleQueue[tuple[bytes, str] | None] = queue.SimpleQueue()
        self._closed = False
        self._prepare_directory()
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
                size = os.fstat(fd).st_size
                if size == length and self._was_checked(digest, fd):
                    return self._hand_out(digest, fd)
                intact = _hash_file(fd) == digest
            except OSError as exc:
                _log.warning("block cache: cannot read %s: %s", self._path(digest), exc)
                intact, size = False, -1
            if intact and size == length:
                self._mark_checked(digest, fd)
                return self._hand_out(digest, fd)
            os.close(fd)
            if not intact:
                self._discard(digest)
            self._counts["misses"] += 1
            return None

    def get_checked(self, digest: bytes, length: int) -> int | None:
        """As `get`, but None as well for a file that must be hashed first: a few microseconds, always."""
        if self._memory:
            with self._lock:
                held = self._memory.get(digest)
                if held is not None:
                    self._memory.move_to_end(digest)
                    self._counts["hits"] += 1
                    return os.dup(held[0])
        fd = self._open(digest)
        if fd is None:
            self._counts["misses"] += 1
            return None
        if os.fstat(fd).st_size == length and self._was_checked(digest, fd):
            return self._hand_out(digest, fd)
        os.close(fd)
        return None

    def present(self, digest: bytes) -> bool:
        """Whether there is a file of that name, checked or not."""
        return digest in self._unsynced or os.path.exists(self._path(digest))

    # -- writing -----------------------------------------------------------------------------------

    def put(self, digest: bytes, length: int, data: bytes) -> int:
        """Keep a verified block and give a descriptor of it, before it is synced. `data` is `length` bytes."""
        assert len(data) == length
        if time.monotonic() >= self._disk_retry_at:
            try:
                return self._put_file(digest, data)
            except OSError as exc:
                self._disk_refused(exc)
        return self._put_memory(digest, data)

    def forget(self, digests: Iterable[bytes]) -> None:
        """These blocks' images were removed: first to go, unless pinned or used again."""
        for digest in digests:
            self._used_at.pop(digest, None)
            self._touched_at.pop(digest, None)
            try:
                os.utime(self._path(digest), (eviction.FORGOTTEN, eviction.FORGOTTEN))
            except OSError:
                continue  # not there, or not ours to touch: then it goes in its turn

    def pin(self, owner: str, digests: Iterable[bytes]) -> None:
        """Keep these blocks, once they are here, from eviction until `unpin(owner)`; replaces what the owner
        pinned before. Holds across restarts and for every process that shares the directory."""
        path = self._pin_path(owner)
        text = "\n".join([owner.replace("\n", " "), *(digest.hex() for digest in digests), ""])
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_text(text)
            temporary.rename(path)
        except OSError as exc:
            raise errors.UnavailableError(f"block cache: cannot write the pins of {owner}: {exc}") from exc

    def unpin(self, owner: str) -> None:
        """Drop the owner's pins; others' pins of the same blocks stay."""
        self._pin_path(owner).unlink(missing_ok=True)

    def pins(self) -> dict[str, int]:
        """Owner -> number of blocks pinned."""
        return {owner: len(digests) for owner, digests in self._pin_files()}

    def stats(self) -> CacheStats:
        """Counters and sizes; see CacheStats."""
        with self._lock:
            counts = self._counts
            return CacheStats(
                quota_bytes=self._quota_bytes,
                used_bytes=self._used_bytes,
                blocks=self._blocks_known,
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
        """Sync and name what is being written, then release everything but descriptors handed out."""
        if self._closed:
            return
        self._closed = True
        self._work.put(None)
        self._thread.join()
        with self._lock:
            for fd, _ in self._memory.values():
                os.close(fd)
            self._memory.clear()
        if self._writer is not None:
            self._writer.close()

    # -- files -------------------------------------------------------------------------------------

    def _path(self, digest: bytes) -> str:
        name = digest.hex()
        return f"{self._blocks}{name[:2]}/{name}"

    def _open(self, digest: bytes) -> int | None:
        path = self._path(digest)
        for candidate in (path, self._unsynced.get(digest), path):
            # The third look is for a rename that came between the first two.
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
        if digest in self._checked:
            return True
        try:
            if self._boot is None or os.getxattr(fd, BOOT_ATTRIBUTE) != self._boot:
                return False
        except OSError:
            return False
        self._checked.add(digest)
        return True

    def _mark_checked(self, digest: bytes, fd: int) -> None:
        self._checked.add(digest)
        if self._boot is not None:
            try:
                os.setxattr(fd, BOOT_ATTRIBUTE, self._boot)
            except OSError:
                return  # no such attributes on this filesystem: `_checked` remembers for this process

    def _hand_out(self, digest: bytes, fd: int) -> int:
        now = time.time()
        self._used_at[digest] = now
        if now - self._touched_at.get(digest, 0.0) >= _TOUCH_SECONDS:
            self._touched_at[digest] = now
            try:
                os.utime(fd)
            except OSError:
                pass  # read-only filesystem: this process still knows the time of use
        self._counts["hits"] += 1
        return fd

    def _discard(self, digest: bytes) -> None:
        _log.warning("block cache: %s is damaged; removed, it will be fetched again", self._path(digest))
        self._counts["corrupt"] += 1
        self._checked.discard(digest)
        try:
            os.unlink(self._path(digest))
        except OSError:
            return

    def _put_file(self, digest: bytes, data: bytes) -> int:
        if self._writer is None:
            with self._lock:
                if self._writer is None:
                    self._writer = _Writer(self._directory)
        path = f"{self._writer.path}/{next(self._numbers)}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _write(fd, data)
            self._mark_checked(digest, fd)
            reader = os.open(path, os.O_RDONLY)
        except OSError:
            self._checked.discard(digest)
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        self._used_at[digest] = self._touched_at[digest] = time.time()
        self._unsynced[digest] = path
        self._work.put((digest, path))
        return reader

    def _put_memory(self, digest: bytes, data: bytes) -> int:
        try:
            fd = os.memfd_create("glowplug-block")
        except OSError as exc:
            raise errors.UnavailableError(f"block cache: neither disk nor memory for a block: {exc}") from exc
        try:
            _write(fd, data)
            reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        except OSError as exc:
            os.close(fd)
            raise errors.UnavailableError(f"block cache: neither disk nor memory for a block: {exc}") from exc
        with self._lock:
            self._counts["memory_blocks"] += 1
            self._counts["memory_bytes"] += len(data)
            replaced = self._memory.pop(digest, None)
            self._memory[digest] = (fd, len(data))
            dropped = [replaced[0]] if replaced else []
            held = sum(size for _, size in self._memory.values())
            while held > _MEMORY_BYTES and len(self._memory) > 1:
                _, (oldest, size) = self._memory.popitem(last=False)
                dropped.append(oldest)
                held -= size
        for old in dropped:
            os.close(old)
        return reader

    def _disk_refused(self, exc: OSError) -> None:
        self._disk_retry_at = time.monotonic() + _DISK_RETRY_SECONDS
        self._counts["disk_errors"] += 1
        if self._refused is None:
            _log.warning(
                "block cache: %s refuses blocks (%s); serving from memory until it takes them again",
                self._directory,
                exc,
            )
        self._refused = str(exc)

    # -- background --------------------------------------------------------------------------------

    def _run(self) -> None:
        self._clean_dead_writers()
        self._evict()
        while True:
            try:
                item = self._work.get(timeout=_HOUSEKEEPING_SECONDS)
            except queue.Empty:
                self._evict()
                continue
            if item is None:
                return
            self._persist(*item)
            if self._should_evict():
                self._evict()

    def _persist(self, digest: bytes, path: str) -> None:
        """Sync one written block, then give it its name."""
        final = self._path(digest)
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(fd)
                allocated = os.fstat(fd).st_blocks * 512
            finally:
                os.close(fd)
            os.makedirs(os.path.dirname(final), mode=0o700, exist_ok=True)
            os.rename(path, final)
        except OSError as exc:
            self._disk_refused(exc)
            self._checked.discard(digest)
            try:
                os.unlink(path)
            except OSError:
                pass  # the next opener of the cache clears what a dead disk kept
        else:
            if self._refused is not None and time.monotonic() >= self._disk_retry_at:
                _log.warning("block cache: %s takes blocks again", self._directory)
                self._refused = None
            with self._lock:
                self._counts["written"] += 1
                self._used_bytes += allocated
                self._blocks_known += 1
        finally:
            with self._lock:
                if self._unsynced.get(digest) == path:
                    del self._unsynced[digest]

    def _should_evict(self) -> bool:
        return (
            self._used_bytes > self._quota_bytes
            or self._free_bytes() < self._free_floor_bytes
            or time.monotonic() - self._scanned_at > _RESCAN_SECONDS
        )

    def _evict(self) -> None:
        """Look at the directory as it is, whoever wrote it, and remove what must go."""
        entries = list(self._scan())
        pinned = {digest for _, digests in self._pin_files() for digest in digests}
        choice = eviction.choose(
            entries,
            pinned,
            quota_bytes=self._quota_bytes,
            free_bytes=self._free_bytes(),
            free_floor_bytes=self._free_floor_bytes,
        )
        gone = set()
        freed = 0
        for victim in choice.victims:
            try:
                os.unlink(self._path(victim.digest))
            except FileNotFoundError:
                pass  # another process was first
            except OSError as exc:
                _log.warning("block cache: cannot evict %s: %s", self._path(victim.digest), exc)
                break
            gone.add(victim.digest)
            freed += victim.allocated_bytes
        kept = {entry.digest for entry in entries} - gone
        for digest in set(self._used_at) - kept - set(self._unsynced):
            self._used_at.pop(digest, None)
            self._touched_at.pop(digest, None)
            self._checked.discard(digest)
        with self._lock:
            self._counts["evicted"] += len(gone)
            self._used_bytes = sum(entry.allocated_bytes for entry in entries) - freed
            self._blocks_known = len(kept)
        self._scanned_at = time.monotonic()
        if choice.short_bytes > 0:
            self._disk_refused(
                OSError(
                    errno.ENOSPC, f"{choice.short_bytes} bytes over the limits, and nothing left to evict"
                )
            )

    def _scan(self) -> Iterator[eviction.Entry]:
        try:
            folders = [entry.path for entry in os.scandir(self._blocks)]
        except OSError:
            return
        for folder in folders:
            try:
                names = list(os.scandir(folder))
            except OSError:
                continue
            for item in names:
                try:
                    digest = bytes.fromhex(item.name)
                    status = item.stat(follow_symlinks=False)
                except (ValueError, OSError):
                    continue  # not ours, or removed meanwhile
                if len(digest) == 32 and stat.S_ISREG(status.st_mode):
                    used_at = max(status.st_mtime, self._used_at.get(digest, 0.0))
                    yield eviction.Entry(digest, status.st_blocks * 512, used_at)

    def _free_bytes(self) -> int:
        try:
            status = os.statvfs(self._directory)
        except OSError:
            return self._free_floor_bytes
        return status.f_bavail * status.f_frsize

    # -- directory ---------------------------------------------------------------------------------

    def _prepare_directory(self) -> None:
        try:
            for path in (self._directory, self._directory / "blocks", self._directory / "writers"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
                self._disk_refused(exc)
                return
            raise errors.ConfigurationError(
                f"block cache: cannot use {self._directory}: {exc}; choose another cache directory"
            ) from exc

    def _clean_dead_writers(self) -> None:
        """Remove what processes left that died in the middle of a write."""
        try:
            with _Writer.directory_lock(self._directory):
                for folder in (self._directory / "writers").iterdir():
                    if folder.is_dir() and not _Writer.alive(folder):
                        shutil.rmtree(folder, ignore_errors=True)
        except OSError as exc:
            _log.warning("block cache: cannot clean %s: %s", self._directory, exc)

    def _pin_path(self, owner: str) -> pathlib.Path:
        return self._directory / "pins" / hashlib.sha256(owner.encode()).hexdigest()

    def _pin_files(self) -> Iterator[tuple[str, list[bytes]]]:
        try:
            files = [path for path in (self._directory / "pins").iterdir() if not path.name.startswith(".")]
        except OSError:
            return
        for path in files:
            try:
                owner, *lines = path.read_text().splitlines()
                yield owner, [bytes.fromhex(line) for line in lines]
            except (OSError, ValueError) as exc:
                _log.warning("block cache: cannot read pins %s: %s", path, exc)


class _Writer:
    """This process's folder for files being written; locked as long as the process lives."""

    def __init__(self, directory: pathlib.Path) -> None:
        with self.directory_lock(directory):
            self.path = tempfile.mkdtemp(dir=directory / "writers")
            self._fd = os.open(f"{self.path}/lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)

    @staticmethod
    def directory_lock(directory: pathlib.Path) -> _Lock:
        """Held between making a folder and locking it, and while looking for dead ones."""
        return _Lock(directory / "writers" / ".lock")

    @staticmethod
    def alive(folder: pathlib.Path) -> bool:
        try:
            fd = os.open(folder / "lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False


class _Lock:
    """An exclusive flock as a context manager."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _write(fd: int, data: bytes) -> None:
    """Write a block; zeros at its end become a hole."""
    end = len(data)
    while end and data.endswith(_ZEROS[: min(end, len(_ZEROS))], 0, end):
        end -= min(end, len(_ZEROS))
    view = memoryview(data)
    if end:
        os.posix_fallocate(fd, 0, end)
    written = 0
    while written < end:
        written += os.pwrite(fd, view[written:end], written)
    os.ftruncate(fd, len(data))


def _hash_file(fd: int) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    offset = 0
    while count := os.preadv(fd, [buffer], offset):
        digest.update(buffer[:count])
        offset += count
    return digest.digest()


def _boot_id() -> bytes | None:
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return None
