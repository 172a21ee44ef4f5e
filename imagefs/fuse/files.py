"""The file-level mount (`--mode fuse`): a whole image as one read-only FUSE filesystem, for machines whose
kernel has no EROFS and users who may not mount(2).

An adapter: libfuse (through mfusepy) on one side, `merged.MergedView` on the other; it decides nothing about
what the filesystem looks like. Slower than EROFS in the kernel, because every lookup and read comes here.

Runs in a process of its own (files_daemon.py), callbacks on libfuse's threads, several at once. That process
must never open a path below its own mount: it would wait for itself. An image never changes while it is
mounted, so the kernel may keep attributes, names and pages for as long as it likes.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mfusepy

from imagefs import errors, merged
from imagefs.erofs import Reader, ondisk
from imagefs.lazylayer import LazyLayer

_T = TypeVar("_T")

ReadLayer = Callable[[str, int, int], bytes]
"""(map digest, offset, length) -> exactly that many bytes: `Fetcher.read`."""

_FOREVER_SECONDS = 365 * 24 * 3600
_CHUNK_BYTES = 64 * 1024
_CHUNKS = 1024
"""Metadata kept in memory: 64 MiB."""
_PATHS = 65536
_TYPES = {number: kind for kind, number in ondisk.FILE_TYPES.items()}


class MetadataCache:
    """Small reads of metadata, answered from chunks in memory; data reads pass through."""

    def __init__(self, read: ReadLayer) -> None:
        self._read = read
        self._chunk = functools.lru_cache(_CHUNKS)(self._load)

    def reader(self, layer: LazyLayer) -> Reader:
        """A reader of one layer."""
        return Reader(functools.partial(self._read_span, layer))

    def _read_span(self, layer: LazyLayer, offset: int, length: int) -> bytes:
        value = layer.block_map
        end = value.metadata_offset + value.metadata_bytes
        if offset < value.metadata_offset or offset + length > end:
            return self._read(layer.map_digest, offset, length)
        first = offset // _CHUNK_BYTES
        last = (offset + length - 1) // _CHUNK_BYTES
        data = b"".join(
            self._chunk(layer.map_digest, number, value.image_bytes) for number in range(first, last + 1)
        )
        start = offset - first * _CHUNK_BYTES
        return data[start : start + length]

    def _load(self, map_digest: str, number: int, image_bytes: int) -> bytes:
        start = number * _CHUNK_BYTES
        return self._read(map_digest, start, min(_CHUNK_BYTES, image_bytes - start))


class ImageFiles(mfusepy.Operations):  # type: ignore[misc]
    """The callbacks. Paths come as str with surrogate escapes, file handles are numbers of ours."""

    use_ns = True

    def __init__(self, layers: Sequence[LazyLayer], read: ReadLayer, ready: Callable[[], None]) -> None:
        cache = MetadataCache(read)
        self._view = merged.MergedView(
            [cache.reader(layer) for layer in layers], [layer.block_map.root_implied for layer in layers]
        )
        self._ready = ready
        self._node = functools.lru_cache(_PATHS)(self._find)
        self._handles: dict[int, merged.Node] = {}
        self._numbers = itertools.count(1)

    def init(self, path: str) -> None:
        """The kernel has the mount: from here on files can be opened."""
        self._ready()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        node = self._lookup(path)
        inode = node.inode
        if path == "/" and self._view.root_is_implied:
            return _attributes(node, stat.S_IFDIR | 0o755, 0, 0, 0)
        return _attributes(node, inode.mode, inode.uid, inode.gid, inode.mtime_ns)

    def readdir(self, path: str, fh: int) -> Any:
        node = self._lookup(path)
        # Numbers are not optional: a name with inode number 0 counts as deleted.
        for own in (".", ".."):
            yield own, {"st_mode": stat.S_IFDIR, "st_ino": node.number}, 0
        for entry in self._guard(lambda: list(self._view.readdir(node))):
            attributes = {"st_mode": _TYPES[entry.file_type], "st_ino": entry.number}
            yield os.fsdecode(entry.name), attributes, 0

    def readlink(self, path: str) -> str:
        node = self._lookup(path)
        return os.fsdecode(self._guard(lambda: self._view.readlink(node)))

    def open(self, path: str, flags: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise mfusepy.FuseOSError(errno.EROFS)
        number = next(self._numbers)
        self._handles[number] = self._lookup(path)
        return number

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        node = self._handles[fh]
        return self._guard(lambda: self._view.read(node, offset, size))

    def release(self, path: str, fh: int) -> int:
        del self._handles[fh]
        return 0

    def listxattr(self, path: str) -> list[str]:
        node = self._lookup(path)
        return [os.fsdecode(name) for name in self._guard(lambda: self._view.xattrs(node))]

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        node = self._lookup(path)
        value = self._guard(lambda: self._view.xattrs(node)).get(os.fsencode(name))
        if value is None:
            raise mfusepy.FuseOSError(errno.ENODATA)
        return value

    def statfs(self, path: str) -> dict[str, int]:
        return {"f_bsize": 4096, "f_frsize": 4096, "f_namemax": 255}

    def _lookup(self, path: str) -> merged.Node:
        return self._guard(lambda: self._node(path))

    def _find(self, path: str) -> merged.Node:
        if path == "/":
            return self._view.root
        parent, _, name = path.rpartition("/")
        directory = self._node(parent or "/")
        node = self._view.lookup(directory, os.fsencode(name)) if stat.S_ISDIR(directory.inode.mode) else None
        if node is None:
            raise mfusepy.FuseOSError(errno.ENOENT)
        return node

    def _guard(self, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except errors.ImagefsError as exc:
            # Whatever kept the bytes from being verified, the reader gets EIO and may try again.
            raise mfusepy.FuseOSError(errno.EIO) from exc


def serve(files: ImageFiles, directory: Path, *, suid: bool, dev: bool) -> None:
    """Mount at `directory` and answer until it is unmounted. Blocks. Raises ConfigurationError."""
    privileged = os.geteuid() == 0
    try:
        mfusepy.FUSE(
            files,
            str(directory),
            foreground=True,
            fsname="glowplug",
            subtype="glowplug",
            ro=True,
            default_permissions=True,
            allow_other=privileged,
            use_ino=True,
            kernel_cache=True,
            entry_timeout=_FOREVER_SECONDS,
            attr_timeout=_FOREVER_SECONDS,
            negative_timeout=_FOREVER_SECONDS,
            **({"suid" if suid else "nosuid": True, "dev" if dev else "nodev": True} if privileged else {}),
        )
    except RuntimeError as exc:
        raise errors.ConfigurationError(
            f"libfuse could not mount {directory} (code {exc}); are /dev/fuse and fusermount3 usable?"
        ) from exc


def _attributes(node: merged.Node, mode: int, uid: int, gid: int, mtime_ns: int) -> dict[str, Any]:
    inode = node.inode
    return {
        "st_ino": node.number,
        "st_mode": mode,
        "st_nlink": 1 if stat.S_ISDIR(mode) else inode.links,
        "st_uid": uid,
        "st_gid": gid,
        "st_size": inode.size,
        "st_blocks": (inode.size + 511) // 512,
        "st_blksize": 4096,
        "st_rdev": os.makedev(inode.rdev_major, inode.rdev_minor),
        "st_atime": mtime_ns,
        "st_mtime": mtime_ns,
        "st_ctime": mtime_ns,
    }
