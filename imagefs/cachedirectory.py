"""The block cache's directory: names, locks, attributes and pins. `cache.py` decides, this keeps the files.

    DIR/blocks/ab/abcdef...   one block each; a name appears by rename only, after its data was synced
    DIR/writers/TOKEN/        files being written by one process, which holds a lock on TOKEN/lock
    DIR/layers/               names of layer files (layerfiles.py), which lie among the blocks
    DIR/pins/SHA256_OF_OWNER  the owner's name and the digests that it pins, one a line

Any thread; processes share the directory, so that every name may vanish at any moment. Methods raise OSError
unless they say otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import pathlib
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator

from imagefs import errors, eviction, privatedirectory, syscalls

_log = logging.getLogger(__name__)

BOOT_ATTRIBUTE = b"user.glowplug.boot"
"""On a block's file: the boot id of the last boot in which its bytes were compared with its name."""
DISK_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_READ_BYTES = 1024 * 1024
_ZEROS = bytes(64 * 1024)


class CacheDirectory:
    """See the module."""

    def __init__(self, path: pathlib.Path) -> None:
        """Make what is missing. ConfigurationError if this cannot be a cache; a full or broken disk can."""
        self.path = path
        self._blocks = f"{path}/blocks/"
        self._boot = _boot_id()
        self._writer: _Writer | None = None
        self._writer_lock = threading.Lock()
        self._numbers = itertools.count()
        try:
            for folder in (path, path / "blocks", path / "layers", path / "writers", path / "pins"):
                privatedirectory.make(folder)
        except OSError as exc:
            if exc.errno not in DISK_FULL_OR_BROKEN:
                raise errors.ConfigurationError(
                    f"block cache: cannot use {path}: {exc}; choose another cache directory"
                ) from exc

    def block_path(self, digest: bytes) -> str:
        """Where the block of that digest is, or would be."""
        name = digest.hex()
        return f"{self._blocks}{name[:2]}/{name}"

    # -- one block ---------------------------------------------------------------------------------

    def begin(self, length: int) -> WritingFile:
        """A file for a block of that length, with its space allocated."""
        path = f"{self._own_writer().path}/{next(self._numbers)}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        file = WritingFile(path, fd)
        try:
            os.posix_fallocate(fd, 0, length)
        except OSError:
            file.drop()
            raise
        return file

    def finish(self, file: WritingFile, data: bytes | memoryview) -> int:
        """All of `data`, verified, is in the file: a descriptor for reading. Zeros at its end become a hole,
        while others read them, perhaps. The file is to be published, or dropped after an error."""
        end = _end_of_data(data)
        if end < len(data):
            with contextlib.suppress(OSError):  # a filesystem without holes keeps the zeros
                syscalls.punch_hole(file.fd, end, len(data) - end)
        self.mark_checked(file.fd)
        fd = os.open(file.path, os.O_RDONLY)
        os.close(file.fd)
        return fd

    def publish(self, path: str, digest: bytes) -> int:
        """Sync a written block and give it its name; its allocated bytes. The temporary name is gone after
        this, whatever happens."""
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(fd)
                allocated = os.fstat(fd).st_blocks * 512
            finally:
                os.close(fd)
            final = self.block_path(digest)
            try:
                os.rename(path, final)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(final), mode=0o700, exist_ok=True)
                os.rename(path, final)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        return allocated

    def is_checked(self, fd: int) -> bool:
        """Whether the file says that it was checked since boot. Does not raise."""
        try:
            return self._boot is not None and os.getxattr(fd, BOOT_ATTRIBUTE) == self._boot
        except OSError:
            return False

    def mark_checked(self, fd: int) -> None:
        """Let the file say that it was checked, where the filesystem has such attributes. Does not raise."""
        if self._boot is not None:
            with contextlib.suppress(OSError):
                os.setxattr(fd, BOOT_ATTRIBUTE, self._boot)

    # -- all of them -------------------------------------------------------------------------------

    def scan(self) -> Iterator[eviction.Entry]:
        """Every block, with its time of use as the file has it. OSError where not all can be seen: what
        is not listed would count as gone."""
        for folder in _list(self._blocks):
            for item in _list(folder.path):
                try:
                    digest = bytes.fromhex(item.name)
                    status = item.stat(follow_symlinks=False)
                except (ValueError, OSError):
                    continue  # not ours, or removed meanwhile
                if len(digest) == 32 and stat.S_ISREG(status.st_mode):
                    yield eviction.Entry(digest, status.st_blocks * 512, status.st_mtime)

    def layer_files(self) -> list[bytes]:
        """Those of the entries that are layer files (layerfiles.py)."""
        found = []
        for item in _list(f"{self.path}/layers"):
            with contextlib.suppress(OSError, ValueError):
                digest = bytes.fromhex(os.path.basename(os.readlink(item.path)))
                if os.path.exists(self.block_path(digest)):
                    found.append(digest)
        return found

    def space(self) -> tuple[int, int]:
        """Free and total bytes of the filesystem."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize

    # -- pins --------------------------------------------------------------------------------------

    def pin(self, owner: str, digests: Iterable[bytes]) -> None:
        """Write the owner's pins, in the place of those it had."""
        path = self._pin_path(owner)
        fd, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        with os.fdopen(fd, "w") as file:
            file.write("\n".join([owner.replace("\n", " "), *(digest.hex() for digest in digests), ""]))
        os.rename(temporary, path)

    def unpin(self, owner: str) -> None:
        """Drop the owner's pins."""
        self._pin_path(owner).unlink(missing_ok=True)

    def pins(self) -> Iterator[tuple[str, list[bytes]]]:
        """Every owner and what it pins; a damaged file is logged. OSError where not all can be read: what is
        not listed would be evicted."""
        for item in _list(f"{self.path}/pins"):
            if item.name.startswith("."):
                continue
            try:
                owner, *lines = pathlib.Path(item.path).read_text().splitlines()
                yield owner, [bytes.fromhex(line) for line in lines]
            except FileNotFoundError:
                continue  # let go meanwhile
            except ValueError as exc:
                _log.warning("block cache: cannot read pins %s: %s", item.path, exc)

    def _pin_path(self, owner: str) -> pathlib.Path:
        return self.path / "pins" / hashlib.sha256(owner.encode()).hexdigest()

    # -- writers -----------------------------------------------------------------------------------

    def clean_dead_writers(self) -> None:
        """Remove what processes left that died in the middle of a write."""
        with _locked(self.path / "writers" / ".lock"):
            for item in _list(f"{self.path}/writers"):
                if item.is_dir(follow_symlinks=False) and not _Writer.alive(item.path):
                    shutil.rmtree(item.path, ignore_errors=True)

    def close(self) -> None:
        """Remove this process's folder of files being written."""
        if self._writer is not None:
            self._writer.close()

    def _own_writer(self) -> _Writer:
        with self._writer_lock:
            if self._writer is None:
                self._writer = _Writer(self.path / "writers")
            return self._writer


@dataclasses.dataclass(frozen=True, slots=True)
class WritingFile:
    """A file under a temporary name, for one thread."""

    path: str
    fd: int

    def drop(self) -> None:
        """Remove it. Does not raise."""
        os.close(self.fd)
        with contextlib.suppress(OSError):
            os.unlink(self.path)


class _Writer:
    """This process's folder for files being written; locked as long as the process lives."""

    def __init__(self, writers: pathlib.Path) -> None:
        # The common lock keeps others from taking the folder for a dead one before its own lock is held.
        with _locked(writers / ".lock"):
            self.path = tempfile.mkdtemp(dir=writers)
            self._fd = os.open(f"{self.path}/lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)

    @staticmethod
    def alive(folder: str) -> bool:
        try:
            fd = os.open(f"{folder}/lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False


def write_all(fd: int, data: memoryview, offset: int = 0) -> None:
    """Write `data`, whole."""
    written = 0
    while written < len(data):
        written += os.pwrite(fd, data[written:], offset + written)


def hash_file(fd: int, after_piece: Callable[[], object] = lambda: None) -> bytes:
    """The sha256 of a file. What `after_piece` raises ends it."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    offset = 0
    while count := os.preadv(fd, [buffer], offset):
        digest.update(buffer[:count])
        offset += count
        after_piece()
    return digest.digest()


def _end_of_data(data: bytes | memoryview) -> int:
    """The length of `data` without zeros at its end, to the grain of `_ZEROS`."""
    end = len(data)
    while end:
        grain = min(end, len(_ZEROS))
        if bytes(data[end - grain : end]) != _ZEROS[:grain]:
            break
        end -= grain
    return end


def _list(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as items:
            return list(items)
    except (FileNotFoundError, NotADirectoryError):
        # Only that is an empty folder: with no descriptor left, a part of the cache would pass for all of it.
        return []


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _boot_id() -> bytes | None:
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return None
