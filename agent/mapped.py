"""Lower directories as a user namespace sees them: id-mapped mounts, so that a pod in one needs no chown.

containerd can map an overlay's lower directories itself, but since its line 2.1 it does so by one clone of
the directory that they have in common, without the mounts in it: lazy layers, which are mounts, would be
empty. So they are mapped here, and containerd is given an overlay of what needs no mapping any more.

It owns root/mapped:

    <snapshot id>/<n>    the n-th lower directory of that snapshot, the topmost 0; read-only

Called by snapshotter.py, from any thread. The mounts outlive the agent; after a reboot they are made again
when containerd asks for the snapshot's mounts. Nothing but mount points ever lies here: what is not mounted
upon is removed with rmdir, so that no mistake can delete a layer's files.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.snapshots import IdMapping
from imagefs import errors, holders, syscalls

_NAMESPACE_SECONDS = 10.0


class MappedLowers:
    """See the module."""

    def __init__(self, directory: Path) -> None:
        # As the kernel names it: the root may be a link to another disk.
        self._directory = Path(os.path.realpath(directory))
        self._lock = threading.Lock()

    def place(self, number: int, lower: Sequence[Path], mapping: IdMapping) -> list[Path]:
        """The mapped directories of a snapshot, mounted now if they are not. ConfigurationError if the kernel
        cannot."""
        folder = self._directory / str(number)
        places = [folder / str(index) for index in range(len(lower))]
        with self._lock:
            mounted = self._mounted()
            missing = [
                (source, place) for source, place in zip(lower, places, strict=True) if place not in mounted
            ]
            if missing:
                try:
                    with _user_namespace(mapping) as namespace:
                        for source, place in missing:
                            place.mkdir(mode=0o700, parents=True, exist_ok=True)
                            _map(source, place, namespace)
                except OSError as exc:
                    raise errors.ConfigurationError(
                        f"snapshot {number}: cannot map its layers into a user namespace: {exc}; Linux 5.19 "
                        "can, for EROFS below overlayfs"
                    ) from exc
        return places

    def remove(self, number: int) -> None:
        """Unmount and remove what a snapshot had; nothing if it had none."""
        folder = self._directory / str(number)
        with self._lock:
            for place in self._mounted():
                if place.parent == folder:
                    syscalls.umount(place, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(folder):
                    (folder / name).rmdir()
                folder.rmdir()

    def numbers(self) -> set[str]:
        """The snapshots that have some."""
        try:
            return set(os.listdir(self._directory))
        except FileNotFoundError:
            return set()

    def _mounted(self) -> set[Path]:
        directories = (Path(point.directory) for point in holders.mount_points())
        return {directory for directory in directories if directory.is_relative_to(self._directory)}


def _map(source: Path, target: Path, namespace: int) -> None:
    tree = syscalls.open_tree(os.fspath(source))
    try:
        syscalls.map_ids(tree, namespace)
        syscalls.move_mount(tree, os.fspath(target))
    finally:
        os.close(tree)


@contextlib.contextmanager
def _user_namespace(mapping: IdMapping) -> Iterator[int]:
    """A descriptor of a user namespace with these ids. A process has to be in it while its ids are written;
    not a fork of ours, which has threads."""
    process = subprocess.Popen(["unshare", "--user", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        own, theirs = os.readlink("/proc/self/ns/user"), f"/proc/{process.pid}/ns/user"
        until = time.monotonic() + _NAMESPACE_SECONDS
        while os.readlink(theirs) == own:
            if time.monotonic() > until:
                raise TimeoutError("no user namespace can be made: see user.max_user_namespaces")
            time.sleep(0.001)
        for name, ranges in (("uid_map", mapping.uids), ("gid_map", mapping.gids)):
            lines = "".join(f"{inside} {outside} {length}\n" for inside, outside, length in ranges)
            Path(f"/proc/{process.pid}/{name}").write_text(lines)
        namespace = os.open(theirs, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        process.communicate()
    try:
        yield namespace
    finally:
        os.close(namespace)
