"""The kernel's FUSE messages <-> values, for a flat directory of read-only files.

Pure. Called by the keeper (INIT) and the workers (everything else). `decode` turns whatever bytes it is given
into one Request value, `Malformed` included: it never raises. The `*_reply` functions give whole replies,
length in the header, ready for one write(2).

Structures and codes follow Linux's include/uapi/linux/fuse.h, protocol 7.x, native byte order; the byte
counts in comments are sizeof() of the structures there. Nothing below 7.31 (Linux 5.4) is spoken to.
"""

from __future__ import annotations

import dataclasses
import errno
import stat
import struct
from collections.abc import Sequence

KERNEL_MAJOR = 7
MINOR = 41
OLDEST_MINOR = 31
ROOT_NODE = 1

MAX_PAGES = 256
MAX_READ_BYTES = MAX_PAGES * 4096
"""What one READ asks at most: 1 MiB, the kernel's own limit (fs.fuse.max_pages_limit)."""
REQUEST_BUFFER_BYTES = 64 * 1024
"""Read buffer for /dev/fuse; the kernel refuses less than 8 KiB, and fills larger ones with more FORGETs."""
MAX_WRITE_BYTES = 4096
"""The least that the kernel accepts; nobody writes here."""
MAX_BACKGROUND = 1024
"""Unanswered reads before the kernel makes all images wait for each other. Its default, 12, let one image
whose origin hung stall every other."""

_NOTIFY_RESEND = 7

_ASYNC_READ = 1 << 0
_ASYNC_DIO = 1 << 15
_PARALLEL_DIROPS = 1 << 18
_MAX_PAGES = 1 << 22
_INIT_EXT = 1 << 30
HAS_RESEND = 1 << 39
"""In the kernel's INIT flags: requests that a dead process had taken can be queued again (Linux 6.9)."""
_WANTED = _ASYNC_READ | _ASYNC_DIO | _PARALLEL_DIROPS | _MAX_PAGES | _INIT_EXT | HAS_RESEND

_OPEN_KEEP_CACHE = 1 << 1
_OPEN_NOFLUSH = 1 << 5

LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 5, 14, 15, 17, 18
INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS, INTERRUPT, DESTROY, BATCH_FORGET = 26, 27, 28, 29, 34, 36, 38, 42
_MODIFYING = frozenset({4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51})
"""SETATTR SYMLINK MKNOD MKDIR UNLINK RMDIR RENAME LINK WRITE SETXATTR REMOVEXATTR CREATE FALLOCATE RENAME2
COPY_FILE_RANGE TMPFILE."""

_IN_HEADER = struct.Struct("=IIQQIIIHH")  # 40
_OUT_HEADER = struct.Struct("=IiQ")  # 16
_INIT_IN = struct.Struct("=IIII")  # 16, and since 7.36 flags2 and padding
_FLAGS2 = struct.Struct("=I")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")  # 64
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")  # 88
_ATTR_OUT_HEAD = struct.Struct("=QII")  # 16, then attr
_ENTRY_OUT_HEAD = struct.Struct("=QQQQII")  # 40, then attr
_OPEN_OUT = struct.Struct("=QII")  # 16
_READ_IN = struct.Struct("=QQIIQII")  # 40
_STATFS_OUT = struct.Struct("=QQQQQIIII24x")  # 80
_DIRENT = struct.Struct("=QQII")  # 24, then the name, padded to 8

CACHE_SECONDS = 24 * 3600
"""How long the kernel keeps names and attributes: they never change while a node lives."""


@dataclasses.dataclass(frozen=True, slots=True)
class Init:
    """The kernel's greeting; `flags` has all 64 bits."""

    unique: int
    major: int
    minor: int
    max_readahead_bytes: int
    flags: int


@dataclasses.dataclass(frozen=True, slots=True)
class Read:
    """Bytes of a file wanted, by thread `pid` (0: of another namespace, or the kernel's own)."""

    unique: int
    node: int
    offset: int
    size: int
    pid: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ReadDirectory:
    """Entries of a directory wanted that come after cookie `offset`, at most `size` bytes of them."""

    unique: int
    node: int
    offset: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Lookup:
    """A name looked for in directory `node`."""

    unique: int
    node: int
    name: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Simple:
    """A request whose arguments we need not see: GETATTR, OPEN, OPENDIR, STATFS, ACCESS, RELEASE ..."""

    unique: int
    node: int
    opcode: int


@dataclasses.dataclass(frozen=True, slots=True)
class Silent:
    """A message that must not be answered: FORGET, BATCH_FORGET, INTERRUPT. Node ids are durable and nothing
    is counted by them, so there is nothing to do either. INTERRUPT says that a reader got some signal, once,
    and perhaps to a sibling of whoever has its request: the worker looks for the signal that matters."""

    opcode: int


@dataclasses.dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no request. `unique` is 0 if not even the header could be read."""

    unique: int
    reason: str


Request = Init | Read | ReadDirectory | Lookup | Simple | Silent | Malformed


@dataclasses.dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) shows of a node; times are the epoch, so that they mean the same to every successor."""

    node: int
    size: int
    directory: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One entry of a listing. `cookie` is what a READDIR that goes on after it passes as its offset."""

    node: int
    name: bytes
    cookie: int
    directory: bool = False


def decode(message: bytes | bytearray | memoryview) -> Request:
    """One message as read from /dev/fuse."""
    if len(message) < _IN_HEADER.size:
        return Malformed(0, f"{len(message)} bytes are shorter than a request header")
    length, opcode, unique, node, _, _, pid, *_ = _IN_HEADER.unpack_from(message)
    if length != len(message):
        return Malformed(unique, f"header says {length} bytes, {len(message)} were read")
    if opcode in (READ, READDIR):
        if length < _IN_HEADER.size + _READ_IN.size:
            return Malformed(unique, f"opcode {opcode}: {length} bytes are too short")
        _, offset, size, *_ = _READ_IN.unpack_from(message, _IN_HEADER.size)
        if opcode == READDIR:
            return ReadDirectory(unique, node, offset, size)
        return Read(unique, node, offset, size, pid)
    if opcode == LOOKUP:
        name, terminator, _ = bytes(message[_IN_HEADER.size :]).partition(b"\0")
        if not name or not terminator:
            return Malformed(unique, "LOOKUP without a name")
        return Lookup(unique, node, name)
    if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
        return Silent(opcode)
    if opcode == INIT:
        return _decode_init(message, unique)
    return Simple(unique, node, opcode)


def _decode_init(message: bytes | bytearray | memoryview, unique: int) -> Init | Malformed:
    if len(message) < _IN_HEADER.size + _INIT_IN.size:
        return Malformed(unique, f"INIT: {len(message)} bytes are too short")
    major, minor, max_readahead, flags = _INIT_IN.unpack_from(message, _IN_HEADER.size)
    flags2_at = _IN_HEADER.size + _INIT_IN.size
    if flags & _INIT_EXT and len(message) >= flags2_at + _FLAGS2.size:
        flags |= _FLAGS2.unpack_from(message, flags2_at)[0] << 32
    return Init(unique, major, minor, max_readahead, flags)


def init_reply(request: Init) -> bytes:
    """Accept the kernel's greeting, or refuse it (EPROTO) where it is too old for us."""
    if request.major != KERNEL_MAJOR or request.minor < OLDEST_MINOR:
        return error_reply(request.unique, errno.EPROTO)
    flags = request.flags & _WANTED
    return _reply(
        request.unique,
        _INIT_OUT.pack(
            KERNEL_MAJOR,
            min(MINOR, request.minor),
            request.max_readahead_bytes,
            flags & 0xFFFFFFFF,
            MAX_BACKGROUND,
            MAX_BACKGROUND,
            MAX_WRITE_BYTES,
            1,  # time granularity, ns
            MAX_PAGES,
            0,
            flags >> 32,
        ),
    )


def read_header(unique: int, length: int) -> bytes:
    """The header of a READ's reply; its `length` bytes of data follow in the same writev(2)."""
    return _OUT_HEADER.pack(_OUT_HEADER.size + length, 0, unique)


def error_reply(unique: int, error: int) -> bytes:
    """A reply that is an errno (positive here), or 0 for "done, nothing to say"."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, -error, unique)


def unsupported_reply(request: Simple) -> bytes:
    """The answer to an operation that we do not have: ENOSYS makes the kernel stop asking, or do it
    itself."""
    return error_reply(request.unique, errno.EROFS if request.opcode in _MODIFYING else errno.ENOSYS)


def attributes_reply(unique: int, attributes: Attributes) -> bytes:
    """Answer to GETATTR."""
    return _reply(unique, _ATTR_OUT_HEAD.pack(CACHE_SECONDS, 0, 0) + _attributes(attributes))


def entry_reply(unique: int, attributes: Attributes) -> bytes:
    """Answer to LOOKUP."""
    head = _ENTRY_OUT_HEAD.pack(attributes.node, 0, CACHE_SECONDS, CACHE_SECONDS, 0, 0)
    return _reply(unique, head + _attributes(attributes))


def open_reply(unique: int, *, directory: bool) -> bytes:
    """Answer to OPEN and OPENDIR. Handles are 0 for everyone, so that they mean the same to every successor.

    A file keeps its page cache over opens: it never changes, and dropping the cache waits for reads under
    way, which hung openers in D state. A listing is never cached: it changes with every attach.
    """
    return _reply(unique, _OPEN_OUT.pack(0, 0 if directory else _OPEN_KEEP_CACHE | _OPEN_NOFLUSH, 0))


def statfs_reply(unique: int, files: int) -> bytes:
    """Answer to STATFS: a filesystem with nothing free."""
    return _reply(unique, _STATFS_OUT.pack(0, 0, 0, files, 0, 4096, 255, 4096, 0))


def directory_reply(unique: int, entries: Sequence[DirectoryEntry], size: int) -> bytes:
    """Answer to READDIR: as many of `entries` as fit into `size` bytes."""
    out = bytearray()
    for entry in entries:
        kind = stat.S_IFDIR if entry.directory else stat.S_IFREG
        record = _DIRENT.pack(entry.node, entry.cookie, len(entry.name), kind >> 12) + entry.name
        record += bytes(-len(record) % 8)
        if len(out) + len(record) > size:
            break
        out += record
    return _reply(unique, bytes(out))


def resend_notice() -> bytes:
    """Asks the kernel to queue again every request that was read and not answered, whoever read it.

    Live processes get theirs a second time; the second reply to each gets ENOENT, which is not an error.
    """
    return _OUT_HEADER.pack(_OUT_HEADER.size, _NOTIFY_RESEND, 0)


def _reply(unique: int, payload: bytes) -> bytes:
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(payload), 0, unique) + payload


def _attributes(value: Attributes) -> bytes:
    mode = stat.S_IFDIR | 0o500 if value.directory else stat.S_IFREG | 0o400
    blocks = (value.size + 511) // 512
    links = 2 if value.directory else 1
    return _ATTR.pack(value.node, value.size, blocks, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)
