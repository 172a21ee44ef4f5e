"""The mount points of lazy layers: root/layers/<number>, EROFS on a device file each, or on a layer file.

Owned by the agent's images.py, which says what is to be mounted; any thread. Layers are mounted at first use
and stay: every container's overlay has private clones of them, so that taking a mount point away never hurts
who runs, and the mounts outlive the agent.

A layer that got a file of its own in the block cache (imagefs/layerfiles.py) is mounted from there, over the
mount of its device if there is one: what comes later sees the file, and at no moment is there nothing to see.
The file is mounted by a link that has the device's name, .files/<name>, by which a later agent knows it.

A mount is as good as the FUSE mount under its device file. When that one is replaced (keeper and server died
together, or were stopped), every layer mount from before is dead, though a look at it shows nothing. So the
number of the FUSE filesystem is kept in a file beside the mounts: a dead layer mount keeps its filesystem's
number taken, which makes "another number than the one kept" the same as "dead".
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from imagefs import errors, holders, kernelreadahead, mount, syscalls
from imagefs.fuse import statedirectory
from imagefs.fuse.devices import write_atomically
from imagefs.mount import Mode

_GENERATION = ".generation"
_FILES = ".files"
_LOOP = "/dev/loop"


class LayerMounts:
    """See the module. `directory` is root/layers, `state_dir` the device server's."""

    def __init__(self, directory: Path, state_dir: Path) -> None:
        self._directory = directory
        self._state_dir = state_dir
        self._lock = threading.Lock()
        self._placing: dict[int, threading.Lock] = {}
        self._mounted: dict[int, str] = {}
        self._in_files: set[int] = set()
        """Those of `_mounted` that lie on a layer file."""
        self._mode: Mode | None = None

    def path(self, number: int) -> Path:
        """The mount point of a layer."""
        return self._directory / str(number)

    def open(self) -> bool:
        """Take stock of what an earlier agent left mounted. Whether it is alive: if not, it is unmounted.
        The device server must be running. ConfigurationError if the directory cannot be written."""
        try:
            for folder in (self._directory, self._directory / _FILES):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise errors.ConfigurationError(f"cannot make {self._directory}: {exc.strerror}") from exc
        self._mounted, self._in_files = self._found()
        return self.renew()

    def renew(self) -> bool:
        """Compare with the FUSE mount that is there now; unmount what lies on an earlier one. Whether all
        was alive."""
        current = self._generation()
        kept = self._directory / _GENERATION
        with contextlib.suppress(OSError):
            if kept.read_text() == current:
                return True
        with self._lock:
            numbers = list(self._mounted)
        for number in numbers:
            self.unmount(number)
        try:
            write_atomically(kept, current.encode())
        except OSError as exc:
            raise errors.ConfigurationError(f"cannot write {kept}: {exc.strerror}") from exc
        return not numbers

    def mounted(self) -> Mapping[int, str]:
        """What is mounted: number -> name of the device file."""
        with self._lock:
            return dict(self._mounted)

    def find(self, number: int, device_name: str, *, in_file: bool = False) -> Path | None:
        """The mount point, if this layer is mounted there, and, where that is wanted, from its file."""
        if in_file and number not in self._in_files:
            return None
        return self.path(number) if self._has(number, device_name) else None

    def ensure(
        self,
        number: int,
        name: str,
        device: Path,
        read_ahead_kib: int = kernelreadahead.READ_AHEAD_KIB,
        file: Path | None = None,
    ) -> Path:
        """Mount a layer (`name` for messages) unless it is mounted: from its `file`, if that is there
        to be mounted. Raises what imagefs.mount raises."""
        target = self.path(number)
        with self._place(number):
            if file is not None and self._ensure_file(number, name, device.name, file):
                return target
            if self._has(number, device.name):
                return target
            if number in self._mounted:
                self._take_away(number)
            try:
                target.mkdir(mode=0o700, exist_ok=True)
            except OSError as exc:
                raise errors.ConfigurationError(f"cannot make {target}: {exc.strerror}") from exc
            self._mode = mount.mount_layer(self._mode, name, device, target, read_ahead_kib).mode
            with self._lock:
                self._mounted[number] = device.name
        return target

    def _ensure_file(self, number: int, name: str, device_name: str, file: Path) -> bool:
        """With the number's lock held. False where the file cannot be mounted: it went, most likely."""
        target, link = self.path(number), self._directory / _FILES / device_name
        present = self._has(number, device_name)
        if present and number in self._in_files:
            return True
        try:
            if number in self._mounted and not present:
                self._take_away(number)
            target.mkdir(mode=0o700, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(file)
            self._mode = mount.mount_layer(self._mode, name, link, target).mode
        except (OSError, errors.ImagefsError):
            return False
        with self._lock:
            self._mounted[number] = device_name
            self._in_files.add(number)
        return True

    def backing_device(self, number: int) -> str | None:
        """What backs the mount (kernelreadahead.py); None where nothing is mounted."""
        if number not in self.mounted():
            return None
        try:
            return kernelreadahead.backing_device(self.path(number))
        except OSError:
            return None

    def read_ahead_kib(self, number: int) -> int | None:
        """How much the kernel reads ahead in the mount now, by its own account."""
        name = self.backing_device(number)
        try:
            return None if name is None else kernelreadahead.get(name)
        except OSError:
            return None

    def unmount(self, number: int, device_name: str | None = None) -> None:
        """Take a mount point away, if that layer (or any, without a name) is mounted there."""
        with self._place(number):
            if number in self._mounted and device_name in (None, self._mounted[number]):
                self._take_away(number)

    def _has(self, number: int, device_name: str) -> bool:
        """By our account, and by the kernel's: under a mount that somebody took away by hand lies an empty
        directory, and a container would miss the layer's files without a word."""
        if self._mounted.get(number) != device_name:
            return False
        try:
            return os.stat(self.path(number)).st_dev != os.stat(self._directory).st_dev
        except OSError:
            return False

    def _place(self, number: int) -> threading.Lock:
        with self._lock:
            return self._placing.setdefault(number, threading.Lock())

    def _take_away(self, number: int) -> None:
        """With the number's lock held. What an earlier agent mounted twice goes twice."""
        target = self.path(number)
        with contextlib.suppress(OSError):
            while True:
                syscalls.umount(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        with contextlib.suppress(OSError):
            target.rmdir()
        with self._lock:
            name = self._mounted.pop(number, None)
            self._in_files.discard(number)
        if name is not None:
            with contextlib.suppress(OSError):
                (self._directory / _FILES / name).unlink()

    def _generation(self) -> str:
        devices = statedirectory.mounted(statedirectory.device_directory(self._state_dir))
        if not devices:
            raise errors.UnavailableError(f"the device server of {self._state_dir} has no mount")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {devices[-1]}\n"

    def _found(self) -> tuple[dict[int, str], set[int]]:
        """What is mounted below the directory, by the kernel's account: the topmost at each number, and which
        of them lie on layer files."""
        found: dict[int, str] = {}
        in_files: set[int] = set()
        prefix = f"{os.path.realpath(self._directory)}/"
        links = list((self._directory / _FILES).iterdir())
        # A loop device knows its file, not the link that it was named by.
        names = {str(link): link.name for link in links} | {
            os.path.realpath(link): link.name for link in links
        }
        for point in holders.mount_points():
            number = point.directory.removeprefix(prefix)
            if point.directory.startswith(prefix) and number.isdigit():
                backing = _backing(point.source)
                found[int(number)] = names.get(backing, Path(backing).name)
                (in_files.add if backing in names else in_files.discard)(int(number))
        return found, in_files


def _backing(source: str) -> str:
    """The file under a mount's source: itself, or what its loop device is of."""
    if not source.startswith(_LOOP):
        return source
    with contextlib.suppress(OSError):
        return (Path("/sys/block") / Path(source).name / "loop/backing_file").read_text().strip()
    return source
