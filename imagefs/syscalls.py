"""Linux system calls that Python 3.11 does not wrap: mount(2), umount2(2), unshare(2), pivot_root(2) and
prctl(2). The one place with ctypes.

Each raises OSError with the kernel's errno and the path; callers turn those into errors of ours. `ctypes`
releases the GIL during the call, which matters: a mount may wait for a FUSE server.
"""

from __future__ import annotations

import ctypes
import os
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

_PR_SET_PDEATHSIG = 1
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)


def _check(call: Callable[..., int], *arguments: object, name: str | None = None) -> None:
    ctypes.set_errno(0)
    if call(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)


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


def unshare(flags: int) -> None:
    """unshare(2): of the calling thread, where the flag is one of threads (CLONE_FS)."""
    _check(_libc.unshare, flags)


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
