"""Loop devices: a read-only block device on a file, for kernels that cannot mount EROFS from a plain file.

Called by mount.py. The device is configured to clear itself when its last user lets go, so that nothing is
left behind whatever happens to us. Follows linux/loop.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from imagefs import errors

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
_BLKRASET = 0x1262
_READ_AHEAD_SECTORS = 4096
_BLOCK_BYTES = 4096
_ATTEMPTS = 64

_LOOP_INFO64 = struct.Struct("=QQQQQIIII64s64s32sQQ")
_LOOP_CONFIG = struct.Struct(f"=II{_LOOP_INFO64.size}s64x")


def attach(path: Path) -> tuple[int, Path]:
    """A loop device on `path`: (open fd, device). The caller mounts it, then closes the fd; the device
    goes with its last user. Raises ConfigurationError."""
    try:
        backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _configure_free(backing, path)
        finally:
            os.close(backing)
    except OSError as exc:
        raise errors.ConfigurationError(
            f"no loop device for {path}: {exc.strerror}; is the loop module loaded, and is this root?"
        ) from exc


def _configure_free(backing: int, path: Path) -> tuple[int, Path]:
    # Direct I/O, so that the backing file's pages are not kept beside the device's; a file that cannot do it
    # is read through the page cache.
    flags = _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO
    name = os.fsencode(path)[-63:]
    info = _LOOP_INFO64.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
    config = _LOOP_CONFIG.pack(backing, _BLOCK_BYTES, info)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            device = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
            fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
                fcntl.ioctl(fd, _BLKRASET, _READ_AHEAD_SECTORS)
            except OSError as exc:
                os.close(fd)
                if exc.errno != errno.EBUSY:  # somebody else took it between the two calls
                    raise
            else:
                return fd, device
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "every free device was taken by somebody else")
