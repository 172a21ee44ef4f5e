"""Reading a layer image: inodes, directories, content and attributes over a read function.

Pure. A `Reader` has no state but its superblock: any thread may use it if its `read` allows that. Whatever
the bytes are, a call ends, raises InvalidInputError naming inode and field, or returns what was asked; it
allocates no more than that. A walk over a hostile image may meet cycles: bounding depth is its caller's.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Callable, Iterator

from imagefs import errors
from imagefs.erofs import ondisk


@dataclasses.dataclass(frozen=True, slots=True)
class Inode:
    """One inode. Offsets are bytes in the image, sizes bytes.

    A file's content is the flat data from `data_start` (-1: none) for `size - tail_bytes` bytes, then
    `tail_bytes` from `tail_start`. Extended attributes are `xattr_bytes` from `xattr_start`.
    """

    nid: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    links: int
    size: int
    rdev_major: int
    rdev_minor: int
    data_start: int
    tail_start: int
    tail_bytes: int
    xattr_start: int
    xattr_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class DirEntry:
    """One name in a directory. `file_type` is one of ondisk.FILE_TYPES' values."""

    name: bytes
    nid: int
    file_type: int


class Reader:
    """A layer image over `read(offset, length)`, which returns exactly `length` bytes of the image."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self.superblock = ondisk.check_superblock(read(0, ondisk.BLOCK_BYTES))
        self._image_bytes = self.superblock.blocks * ondisk.BLOCK_BYTES
        self._metadata_start = self.superblock.metadata_block * ondisk.BLOCK_BYTES

    def root(self) -> Inode:
        """The root directory."""
        inode = self.inode(self.superblock.root_nid)
        _require_directory(inode)
        return inode

    def inode(self, nid: int) -> Inode:
        """The inode `nid`. InvalidInputError if there can be none, or it is malformed."""
        start = self._metadata_start + nid * ondisk.SLOT_BYTES
        if nid <= 0 or start + ondisk.INODE_BYTES > self._image_bytes:
            raise errors.InvalidInputError(f"EROFS inode {nid} lies outside the image")
        return self._parse_inode(nid, start, self._read(start, ondisk.INODE_BYTES))

    def _parse_inode(self, nid: int, start: int, data: bytes) -> Inode:
        layout, units, mode, reserved, size, place, _, uid, gid, seconds, nanoseconds, links = (
            ondisk.INODE.unpack(data)
        )
        if layout not in (ondisk.FORMAT_PLAIN, ondisk.FORMAT_INLINE) or reserved:
            raise errors.InvalidInputError(f"EROFS inode {nid}: i_format {layout:#x} is not one of ours")
        if units == 1 or nanoseconds >= ondisk.NANOSECONDS:
            raise errors.InvalidInputError(f"EROFS inode {nid}: bad xattr count or timestamp")
        kind = stat.S_IFMT(mode)
        if kind not in ondisk.FILE_TYPES:
            raise errors.InvalidInputError(f"EROFS inode {nid}: mode {mode:#o} has no file type")
        xattr_start = start + ondisk.INODE_BYTES
        xattr_bytes = ondisk.XATTR_HEADER.size + 4 * (units - 1) if units else 0
        if xattr_start + xattr_bytes > self._image_bytes:
            raise errors.InvalidInputError(f"EROFS inode {nid}: xattrs lie outside the image")
        data_start, tail_start, tail_bytes, rdev = -1, -1, 0, (0, 0)
        if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            inline = layout == ondisk.FORMAT_INLINE
            data_start, tail_start, tail_bytes = self._place_content(
                nid, size, place, xattr_start + xattr_bytes, inline
            )
            if kind == stat.S_IFLNK and not 0 < size <= ondisk.MAX_TARGET_BYTES:
                raise errors.InvalidInputError(f"EROFS inode {nid}: symlink target of {size} bytes")
        elif size or layout != ondisk.FORMAT_PLAIN:
            raise errors.InvalidInputError(f"EROFS inode {nid}: a special file with content")
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = ondisk.decode_rdev(place)
        return Inode(
            nid=nid,
            mode=mode,
            uid=uid,
            gid=gid,
            mtime_ns=seconds * ondisk.NANOSECONDS + nanoseconds,
            links=links,
            size=size,
            rdev_major=rdev[0],
            rdev_minor=rdev[1],
            data_start=data_start,
            tail_start=tail_start,
            tail_bytes=tail_bytes,
            xattr_start=xattr_start,
            xattr_bytes=xattr_bytes,
        )

    def _place_content(
        self, nid: int, size: int, block: int, after_xattrs: int, inline: bool
    ) -> tuple[int, int, int]:
        """(data_start, tail_start, tail_bytes), checked to lie inside the image."""
        tail_start, tail_bytes = -1, 0
        if inline:
            tail_start, tail_bytes = after_xattrs, size % ondisk.BLOCK_BYTES
            # The kernel copies an inline tail out of one metadata block.
            if tail_bytes == 0 or tail_start % ondisk.BLOCK_BYTES + tail_bytes > ondisk.BLOCK_BYTES:
                raise errors.InvalidInputError(f"EROFS inode {nid}: inline tail leaves its block")
            if tail_start + tail_bytes > self._image_bytes:
                raise errors.InvalidInputError(f"EROFS inode {nid}: inline tail lies outside the image")
        flat_bytes = size - tail_bytes
        if flat_bytes == 0:
            return -1, tail_start, tail_bytes
        data_start = block * ondisk.BLOCK_BYTES
        if data_start == 0 or data_start + flat_bytes > self._image_bytes:
            raise errors.InvalidInputError(
                f"EROFS inode {nid}: data at {data_start}+{flat_bytes} lies outside the image"
            )
        return data_start, tail_start, tail_bytes

    def read(self, inode: Inode, offset: int, length: int) -> bytes:
        """Up to `length` bytes of a file's content from `offset`; short, or empty, at its end."""
        end = min(offset + length, inode.size)
        flat_end = inode.size - inode.tail_bytes
        if offset >= end:
            return b""
        if end <= flat_end:
            return self._read(inode.data_start + offset, end - offset)
        tail_from = max(offset, flat_end)
        tail = self._read(inode.tail_start + tail_from - flat_end, end - tail_from)
        if offset >= flat_end:
            return tail
        return self._read(inode.data_start + offset, flat_end - offset) + tail

    def readlink(self, inode: Inode) -> bytes:
        """A symlink's target."""
        if not stat.S_ISLNK(inode.mode):
            raise errors.InvalidInputError(f"EROFS inode {inode.nid} is not a symlink")
        target = self.read(inode, 0, inode.size)
        if 0 in target:
            raise errors.InvalidInputError(f"EROFS inode {inode.nid}: NUL in a symlink target")
        return target

    # -- directories -----------------------------------------------------------------------------------

    def readdir(self, directory: Inode) -> Iterator[DirEntry]:
        """A directory's entries in bytewise order of their names, without `.` and `..`."""
        _require_directory(directory)
        last = b""
        for index in range(_block_count(directory)):
            block = self._dirent_block(directory, index)
            for entry in block.entries():
                if entry.name <= last:
                    raise errors.InvalidInputError(
                        f"EROFS directory {directory.nid}: names out of order at {entry.name!r}"
                    )
                last = entry.name
                if entry.name not in (b".", b".."):
                    yield entry

    def lookup(self, directory: Inode, name: bytes) -> Inode | None:
        """The inode that `name` names in a directory, or None. A binary search, as the kernel's."""
        _require_directory(directory)
        low, high = 0, _block_count(directory) - 1
        candidate = None
        while low <= high:
            middle = (low + high) // 2
            block = self._dirent_block(directory, middle)
            if block.name(0) <= name:
                candidate, low = block, middle + 1
            else:
                high = middle - 1
        nid = candidate.find(name) if candidate else None
        return None if nid is None else self.inode(nid)

    def _dirent_block(self, directory: Inode, index: int) -> _DirentBlock:
        return _DirentBlock(
            self.read(directory, index * ondisk.BLOCK_BYTES, ondisk.BLOCK_BYTES), directory.nid, index
        )

    # -- extended attributes ---------------------------------------------------------------------------

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """Extended attributes by full name (`user.x`, `system.posix_acl_access`, ...)."""
        if not inode.xattr_bytes:
            return {}
        where = f"EROFS inode {inode.nid}: xattrs"
        body = self._read(inode.xattr_start, inode.xattr_bytes)
        _, shared, reserved = ondisk.XATTR_HEADER.unpack_from(body)
        if shared or any(reserved):
            raise errors.InvalidInputError(f"{where}: shared attributes, layer images have none")
        out: dict[bytes, bytes] = {}
        position = ondisk.XATTR_HEADER.size
        while position < len(body):
            name_bytes, index, value_bytes = ondisk.XATTR_ENTRY.unpack_from(body, position)
            name_start = position + ondisk.XATTR_ENTRY.size
            value_start = name_start + name_bytes
            end = value_start + value_bytes
            name = ondisk.XATTR_PREFIX_OF_INDEX.get(index, b"") + body[name_start:value_start]
            if end > len(body) or name in out or 0 in name or ondisk.split_xattr_name(name) is None:
                raise errors.InvalidInputError(f"{where}: bad entry at byte {position}")
            if ondisk.split_xattr_name(name) != (index, body[name_start:value_start]):
                raise errors.InvalidInputError(f"{where}: name index {index} at byte {position}")
            out[name] = body[value_start:end]
            position = (end + 3) & ~3
        return out


class _DirentBlock:
    """One block of directory entries: fixed-size records, then their names, in the same order."""

    def __init__(self, data: bytes, nid: int, index: int) -> None:
        self._data = data
        self._where = f"EROFS directory {nid}, block {index}"
        if len(data) < ondisk.DIRENT.size:
            raise errors.InvalidInputError(f"{self._where}: too short")
        first_name = ondisk.DIRENT.unpack_from(data)[1]
        if first_name % ondisk.DIRENT.size or not ondisk.DIRENT.size <= first_name < len(data):
            raise errors.InvalidInputError(f"{self._where}: first name at byte {first_name}")
        self._count = first_name // ondisk.DIRENT.size

    def name(self, number: int) -> bytes:
        """The name of record `number`, checked."""
        start = ondisk.DIRENT.unpack_from(self._data, number * ondisk.DIRENT.size)[1]
        if number + 1 < self._count:
            end = ondisk.DIRENT.unpack_from(self._data, (number + 1) * ondisk.DIRENT.size)[1]
        else:
            end = len(self._data)
        if not self._count * ondisk.DIRENT.size <= start < end <= len(self._data):
            raise errors.InvalidInputError(f"{self._where}: name {number} lies outside the block")
        name = self._data[start:end]
        if number + 1 == self._count:
            name = name.rstrip(b"\0")
        if not 0 < len(name) <= ondisk.MAX_NAME_BYTES or b"/" in name or 0 in name:
            raise errors.InvalidInputError(f"{self._where}: name {number} is not a file name")
        return name

    def entries(self) -> Iterator[DirEntry]:
        """All records in order."""
        for number in range(self._count):
            nid, _, file_type = ondisk.DIRENT.unpack_from(self._data, number * ondisk.DIRENT.size)
            yield DirEntry(self.name(number), nid, file_type)

    def find(self, name: bytes) -> int | None:
        """The nid of `name`, by binary search."""
        low, high = 0, self._count - 1
        while low <= high:
            middle = (low + high) // 2
            found = self.name(middle)
            if found == name:
                nid: int = ondisk.DIRENT.unpack_from(self._data, middle * ondisk.DIRENT.size)[0]
                return nid
            if found < name:
                low = middle + 1
            else:
                high = middle - 1
        return None


def _require_directory(inode: Inode) -> None:
    if not stat.S_ISDIR(inode.mode):
        raise errors.InvalidInputError(f"EROFS inode {inode.nid} is not a directory")


def _block_count(directory: Inode) -> int:
    return (directory.size + ondisk.BLOCK_BYTES - 1) // ondisk.BLOCK_BYTES
