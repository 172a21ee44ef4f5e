"""The state directory as keeper, server and clients share it: its mount point, its sockets, its log.

Any process, any thread; imports little, because a client loads it before it can start anything. What lies in
the directory is listed in control.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from pathlib import Path

from imagefs import unixsocket

_LOG_BYTES = 4 << 20


def device_directory(state_dir: Path) -> Path:
    """Where the devices of a state directory are mounted."""
    return state_dir / "devices"


def mounted(path: Path) -> list[str]:
    """The "major:minor" of each mount on `path` in our mount namespace. Never touches the mount itself: a
    dead one would answer with errors, a waiting one not at all."""
    place = os.path.join(os.path.realpath(path.parent), path.name)  # the kernel's name of it, links followed
    target = place.replace("\\", r"\134").replace(" ", r"\040").replace("\t", r"\011")
    target = target.replace("\n", r"\012")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        lines = [line.split() for line in file]
    return [fields[2] for fields in lines if fields[4] == target]


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end of a unix socket runs as we do."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.geteuid())


def listen(path: Path, kind: socket.SocketKind) -> socket.socket:
    """A listening unix socket that only our user can connect to; replaces a stale one."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, kind)
    before = os.umask(0o177)
    try:
        unixsocket.bind(listener, path)
    finally:
        os.umask(before)
    listener.listen(64)
    return listener


def bound_log(path: Path) -> None:
    """Keep the log under _LOG_BYTES, and one older part of the same size. Its writers append, so that it
    can be emptied under them."""
    try:
        if path.stat().st_size <= _LOG_BYTES:
            return
        path.with_suffix(".log.1").write_bytes(path.read_bytes()[-_LOG_BYTES:])
        os.truncate(path, 0)
    except FileNotFoundError:
        return
    except OSError as exc:
        with contextlib.suppress(OSError):  # a full disk ends nobody
            print(f"glowplug: cannot bound {path}: {exc}", file=sys.stderr, flush=True)
