"""Linux system calls that Python 3.11 does not wrap: mount(2), umount2(2), open_tree(2), move_mount(2),
unshare(2), setns(2), pivot_root(2), prctl(2), cachestat(2), fallocate(2) and
sync_file_range(2). The one place with ctypes.

Each raises OSError with the kernel's errno and the path; callers turn those into errors of ours. `ctypes`
releases the GIL during the call, which matters: a mount may wait for a FUSE server.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_PR_SET_PDEATHSIG = 1
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
"""Linux 5.2; the same number on every architecture."""
_SYS_MOUNT_SETATTR = 442
"""Linux 5.12; the same number on every architecture."""
_SYS_CACHESTAT = 451
"""Linux 6.5; the same number on every architecture."""
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_RDONLY = 1
_MOUNT_ATTR_IDMAP = 0x00100000
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOVE_MOUNT_T_SYMLINKS = 16
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_SYNC_FILE_RANGE_WRITE = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)


def _check(call: Callable[..., int], *arguments: object, name: str | None = None) -> int:
    ctypes.set_errno(0)
    result = call(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
    return result


def mount(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    filesystem: str | None,
    flags: int,
    options: str = "",
) -> None:
    """mount(2). Never mount(8), which slips a loop device under a plain file."""
    _check(
        _libc.mount,
        os.fsencode(source),
        os.fsencode(target),
        filesystem.encode() if filesystem else None,
        flags,
        os.fsencode(options) or None,
        name=os.fspath(target),
    )


def umount(target: str | os.PathLike[str], flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2, os.fsencode(target), flags, name=os.fspath(target))


def open_tree(path: str) -> int:
    """open_tree(2): a descriptor of a bind mount of `path` that is not attached anywhere yet."""
    return _check(
        _libc.syscall,
        ctypes.c_long(_SYS_OPEN_TREE),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC),
        name=path,
    )


def map_ids(tree: int, user_namespace: int) -> None:
    """mount_setattr(2): what `open_tree` gave becomes read-only, its files owned as the namespace has it."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_IDMAP, 0, 0, user_namespace)
    _check(
        _libc.syscall,
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(tree),
        ctypes.c_char_p(b""),
        ctypes.c_uint(_AT_EMPTY_PATH),
        ctypes.c_char_p(attributes),
        ctypes.c_size_t(len(attributes)),
    )


def move_mount(tree: int, target: str) -> None:
    """move_mount(2): attach what `open_tree` gave at `target`, symbolic links followed."""
    _check(
        _libc.syscall,
        ctypes.c_long(_SYS_MOVE_MOUNT),
        ctypes.c_int(tree),
        ctypes.c_char_p(b""),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(target)),
        ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_SYMLINKS),
        name=target,
    )


def unshare(flags: int) -> None:
    """unshare(2): of the calling thread, where the flag is one of threads (CLONE_FS)."""
    _check(_libc.unshare, flags)


def enter_network(file: str | os.PathLike[str]) -> None:
    """setns(2): the calling thread, and no other, moves into the network namespace of `file`, for good."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns, ctypes.c_int(fd), ctypes.c_int(CLONE_NEWNET), name=os.fspath(file))
    finally:
        os.close(fd)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    _check(
        _libc.syscall,
        ctypes.c_long(number),
        ctypes.c_char_p(os.fsencode(new_root)),
        ctypes.c_char_p(os.fsencode(put_old)),
        name=new_root,
    )


def set_parent_death_signal(signum: int) -> None:
    """prctl(PR_SET_PDEATHSIG): the kernel sends `signum` when the thread that forked us ends."""
    _check(_libc.prctl, _PR_SET_PDEATHSIG, ctypes.c_ulong(signum), 0, 0, 0)


def cached_pages(fd: int, offset: int, length: int) -> int:
    """cachestat(2): how many pages of a file's range the page cache holds. Linux 6.5."""
    pages = (ctypes.c_uint64 * 5)()  # in the cache, dirty, in writeback, evicted, evicted lately
    _check(
        _libc.syscall,
        ctypes.c_long(_SYS_CACHESTAT),
        ctypes.c_int(fd),
        (ctypes.c_uint64 * 2)(offset, length),
        pages,
        ctypes.c_uint(0),
    )
    return pages[0]


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(2): give a range of a file back to the filesystem. It reads as zeros all the while."""
    flags = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    place = (ctypes.c_int64(offset), ctypes.c_int64(length))
    _check(_libc.fallocate, ctypes.c_int(fd), ctypes.c_int(flags), *place)


def start_writing(fd: int, offset: int, length: int) -> None:
    """sync_file_range(2): have the kernel begin to write a range of a file to disk. Only fsync says that all
    went well."""
    place = (ctypes.c_int64(offset), ctypes.c_int64(length))
    _check(_libc.sync_file_range, ctypes.c_int(fd), *place, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
