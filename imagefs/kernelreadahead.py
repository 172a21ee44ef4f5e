"""How much the kernel reads ahead in our mounts: what is asked of it, how it is set, and of which mount.

Called by whoever mounts layer images, and by the device server, which raises it once a start is over. The
kernel keeps the value per backing device, /sys/class/bdi/NAME/read_ahead_kb: "major:minor" of a loop device,
or erofs-N, a number used once in a boot, of a file-backed mount. Which N is whose, FS_IOC_GETFSSYSFSPATH says
(linux/fs.h, Linux 6.9, file-backed EROFS being of 6.12). sysfs is the same in every mount namespace.

A file keeps the value that it was opened with: raising it counts for files that are opened afterwards.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

_BACKING_DEVICES = Path("/sys/class/bdi")
_BLOCK_DEVICES = Path("/sys/dev/block")

READ_AHEAD_KIB = 2048
"""Of a mount that was started from. A file that is read from end to end takes twice as long at 128."""
START_READ_AHEAD_KIB = 2048
"""During a start without a boot pack."""
TRACE_READ_AHEAD_KIB = 32
"""During a start that is traced, unless the user says otherwise; a start with a boot pack has what its pack
says (bootpack.Table), because what the kernel reads ahead must be the same in both. Traced with 4 KiB, a
start of PyTorch on mounts of 2048 KiB had 64 demand misses; with the same in both, whichever, 4 at most. The
pack is the smaller the less is read ahead: 21 MB at 4 KiB, 28 at 32, 37 at 128, 65 at 2048. Warm starts take
the same time from 32 to 2048 KiB, at 4 a third more (docs/benchmarks.md, `readahead`)."""

_FS_IOC_GETFSSYSFSPATH = 0x80811501
"""_IOR(0x15, 1, struct fs_sysfs_path): a byte of length, 128 of path below /sys/fs."""
_PATH_BYTES = 129
_NAME = re.compile(r"erofs-[0-9]{1,20}|[0-9]{1,4}:[0-9]{1,8}")


def is_name(value: str) -> bool:
    """Whether this can be the name of a mount's backing device."""
    return _NAME.fullmatch(value) is not None


def backing_device(mount_point: Path) -> str:
    """The name of what backs an EROFS mount. No read of the device is made. OSError when the mount point
    cannot be opened."""
    fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        answer = bytearray(_PATH_BYTES)
        try:
            fcntl.ioctl(fd, _FS_IOC_GETFSSYSFSPATH, answer)
        except OSError:  # an earlier kernel: it has no file-backed mounts
            answer[0] = 0
        name = os.fsdecode(bytes(answer[1 : 1 + answer[0]])).rpartition("/")[2]
        device = os.fstat(fd).st_dev
    finally:
        os.close(fd)
    return name if name.startswith("erofs-") else f"{os.major(device)}:{os.minor(device)}"


def get(name: str) -> int:
    """The read-ahead of a backing device in KiB. OSError: FileNotFoundError when it is gone."""
    return int((_BACKING_DEVICES / name / "read_ahead_kb").read_text())


def set_kib(name: str, kib: int) -> None:
    """Set the read-ahead of a backing device. OSError, also where /sys is read-only."""
    (_BACKING_DEVICES / name / "read_ahead_kb").write_text(str(kib))


def is_backed_by(name: str, directory: Path) -> bool:
    """Whether a backing device is one of files in this directory, as far as the kernel says: the number of a
    loop device may have gone to somebody else's file."""
    if name.startswith("erofs-"):
        return True
    try:
        file = Path((_BLOCK_DEVICES / name / "loop/backing_file").read_text().strip())
    except OSError:
        return False
    return file.parent == directory
