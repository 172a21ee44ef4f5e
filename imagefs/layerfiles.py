"""Layer images as files of the block cache, each put together from its layer's blocks when all are here.

    DIR/layers/HEX -> ../blocks/ab/abcdef...   HEX of a block map's digest, abcdef... the file's sha256

Mounted in the place of a device, such a file is read at the speed of the disk and needs no server: a large
file takes 1.1 to 1.3 times as long through FUSE (docs/benchmarks.md), and who reads it outlives every process
of ours. The file is one more entry of the cache, content under its sha256: quota, eviction, the check at the
first use after a boot and `glowplug cache` know it without knowing what it is. Whoever has it mounted or open
keeps what they have, as with every name that the cache takes back.

Any thread; processes share the directory: a name may vanish at any moment. Called by the device server
(`fuse/layerwriter.py` decides when, and alone hands the names out).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import pathlib
from collections.abc import Callable, Collection

from imagefs import blockmap, cachedirectory, errors, syscalls
from imagefs.cache import BlockCache
from imagefs.fuse import superblocks
from imagefs.lazylayer import LazyLayer

_ALGORITHM = "sha256:"


class GaveUpError(errors.UnavailableError):
    """A layer file was not finished, because a block went meanwhile, or its writer is to stop."""


class LayerFiles:
    """The layer files of `cache`, whose directory is `directory`."""

    def __init__(self, cache: BlockCache, directory: pathlib.Path) -> None:
        self._cache = cache
        self._files = cachedirectory.CacheDirectory(directory.absolute())
        self._links = self._files.path / "layers"

    def path(self, map_digest: str) -> pathlib.Path:
        """Where the file of a layer is, or would be."""
        return self._links / map_digest.removeprefix(_ALGORITHM)

    def digest(self, map_digest: str) -> bytes | None:
        """The sha256 of a layer's file, if there is one; whether it was checked is another question."""
        try:
            path = self.path(map_digest).readlink()
            digest = bytes.fromhex(path.name)
        except (OSError, ValueError):
            return None
        return digest if self._cache.present(digest) else None

    def checked(self, map_digest: str, image_bytes: int) -> bytes | None:
        """As `digest`, of a file that was written or hashed since the last boot. Nothing is read for this."""
        digest = self.digest(map_digest)
        fd = None if digest is None else self._cache.get_checked(digest, image_bytes)
        if fd is None:
            return None
        os.close(fd)
        return digest

    def check(self, map_digest: str, image_bytes: int, may_go_on: Callable[[], bool]) -> bytes | None:
        """As `checked`, but a file that nobody hashed since the last boot is hashed now, and goes if it is
        not what its name says. `may_go_on` is asked after each piece. Raises GaveUpError, and OSError."""
        digest = self.digest(map_digest)
        if digest is None or self.checked(map_digest, image_bytes) is not None:
            return digest
        try:
            fd = os.open(self.path(map_digest), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            found = cachedirectory.hash_file(fd, lambda: _go_on(may_go_on))
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if found == digest and os.fstat(fd).st_size == image_bytes:
                self._cache.mark_checked(digest, fd)
                return digest
        finally:
            os.close(fd)
        self._cache.discard(digest)
        return None

    def block(self, layer: LazyLayer, index: int) -> int | None:
        """A descriptor of a block that the cache no longer has on its own, from the layer's file; None where
        there is none, or its bytes are others."""
        block_map = layer.block_map
        length, digest = block_map.block_length(index), block_map.blocks[index].digest
        try:
            fd = os.open(self.path(layer.map_digest), os.O_RDONLY)
        except OSError:
            return None
        try:
            data = os.pread(fd, length, index * block_map.block_bytes)
        except OSError:
            return None
        finally:
            os.close(fd)
        if hashlib.sha256(data).digest() != digest:
            return None
        with contextlib.closing(self._cache.draft(length)) as draft:
            draft.write(memoryview(data), 0)
            return self._cache.put(digest, draft, data)

    def write(self, map_digest: str, block_map: blockmap.BlockMap, may_go_on: Callable[[], bool]) -> bytes:
        """Put a layer's file together; its sha256. Raises GaveUpError, IntegrityError for a layer whose
        superblock may not be shown to the kernel, and OSError: no half of a file is left then."""
        file = self._files.begin(block_map.image_bytes)
        try:
            digest = self._copy(file.fd, block_map, may_go_on)
            self._files.mark_checked(file.fd)
        except BaseException:
            file.drop()
            raise
        os.close(file.fd)
        self._cache.index.add(digest, self._files.publish(file.path, digest))
        self._link(map_digest, digest)
        return digest

    def tidy(self, kept: Collection[str]) -> None:
        """Remove the names of files that are gone, but for those of the layers `kept`."""
        with contextlib.suppress(OSError):
            for item in list(os.scandir(self._links)):
                if _ALGORITHM + item.name not in kept and not os.path.exists(item.path):
                    os.unlink(item.path)

    def close(self) -> None:
        """Remove this process's folder of files being written."""
        self._files.close()

    def _copy(self, out: int, block_map: blockmap.BlockMap, may_go_on: Callable[[], bool]) -> bytes:
        hasher = hashlib.sha256()
        buffer = memoryview(mmap.mmap(-1, block_map.block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        zeros = bytes(block_map.block_bytes)
        _set_direct(out, True)  # nobody reads it soon: the page cache is for what is read
        for index, block in enumerate(block_map.blocks):
            _go_on(may_go_on)
            offset, length = index * block_map.block_bytes, block_map.block_length(index)
            if index == 0:
                self._check_superblock(block_map)
            if block.zero:
                hasher.update(zeros[:length])
                with contextlib.suppress(OSError):  # a filesystem without holes has zeros there anyway
                    syscalls.punch_hole(out, offset, length)
                continue
            self._read(block.digest, buffer[:length])
            hasher.update(buffer[:length])
            _write(out, buffer[:length], offset)
        return hasher.digest()

    def _check_superblock(self, block_map: blockmap.BlockMap) -> None:
        fd = self._cache.get(block_map.blocks[0].digest, block_map.block_length(0))
        if fd is None:
            raise GaveUpError("block 0 was evicted, or is of zeros")
        checked = superblocks.checked_block(fd, block_map)
        if isinstance(checked, Exception):
            raise checked
        os.close(fd)

    def _read(self, digest: bytes, out: memoryview) -> None:
        fd = self._cache.get(digest, len(out))
        if fd is None:
            raise GaveUpError(f"block {digest.hex()} was evicted")
        try:
            if os.preadv(fd, [out], 0) != len(out):
                raise GaveUpError(f"block {digest.hex()} is shorter than it was")
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def _link(self, map_digest: str, digest: bytes) -> None:
        path = self.path(map_digest)
        name = digest.hex()
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"../blocks/{name[:2]}/{name}")
        temporary.rename(path)


def _go_on(may_go_on: Callable[[], bool]) -> None:
    if not may_go_on():
        raise GaveUpError("its writer is to stop")


def _write(fd: int, data: memoryview, offset: int) -> None:
    try:
        cachedirectory.write_all(fd, data, offset)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        _set_direct(fd, False)  # a filesystem that takes the flag, and then not the write
        cachedirectory.write_all(fd, data, offset)


def _set_direct(fd: int, direct: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    with contextlib.suppress(OSError):  # EINVAL: a filesystem without it
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
