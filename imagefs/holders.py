"""Who holds a mount: the processes that make umount(2) answer EBUSY, found in /proc.

Read-only and best effort: processes come and go, and those we may not look into are passed over. A mount is
named by its id in this mount namespace (fdinfo's mnt_id), so that bind mounts and names that were renamed
are told apart exactly; memory maps are matched by path, the only thing /proc says about them cheaply.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

_MAX_NAMED = 8
_OCTAL = re.compile(r"\\([0-7]{3})")
"""mountinfo writes space, tab, newline and backslash in octal."""


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """A process, and how it holds the mount: "cwd", "root", "exe", "fd 3", "map"."""

    pid: int
    command: str
    how: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command}, {self.how})"


@dataclasses.dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo. `options` are the filesystem's own, of all its mounts."""

    id: int
    parent: int
    device: str
    directory: str
    filesystem: str
    source: str
    options: str


def mount_points(pid: int | str = "self") -> list[MountPoint]:
    """The mounts of a process's namespace, in mount order."""
    out = []
    for line in Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        kind = fields.index("-") + 1
        directory, options = _decoded(fields[4]), _decoded(fields[kind + 2])
        out.append(
            MountPoint(
                int(fields[0]), int(fields[1]), fields[2], directory, fields[kind], fields[kind + 1], options
            )
        )
    return out


def _decoded(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def top_mount(directory: str) -> MountPoint | None:
    """The mount that a lookup of `directory` ends on, if it is a mount point."""
    found = [point for point in mount_points() if point.directory == directory]
    return found[-1] if found else None


def children(point: MountPoint) -> list[str]:
    """Directories of the mounts that lie directly on a mount."""
    return [other.directory for other in mount_points() if other.parent == point.id]


def holding(point: MountPoint) -> list[Holder]:
    """The processes of this mount namespace that hold a mount, one entry each."""
    own = _namespace("self")
    return [
        Holder(pid, _command(pid), how)
        for pid in _pids()
        if _namespace(pid) == own and (how := _how(pid, point)) is not None
    ]


def copies(device: str) -> list[Holder]:
    """Processes in other mount namespaces that still have the filesystem `device` (MAJOR:MINOR) mounted:
    one per namespace."""
    seen = {_namespace("self")}
    out = []
    for pid in _pids():
        namespace = _namespace(pid)
        if namespace is None or namespace in seen:
            continue
        seen.add(namespace)
        try:
            if any(point.device == device for point in mount_points(pid)):
                out.append(Holder(pid, _command(pid), "a copy in its mount namespace"))
        except (OSError, ValueError):
            continue
    return out


def describe(found: list[Holder]) -> str:
    """Names for a message."""
    text = ", ".join(str(holder) for holder in found[:_MAX_NAMED])
    return text + (f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else "")


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def _namespace(pid: int | str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


def _how(pid: int, point: MountPoint) -> str | None:
    for name in ("cwd", "root", "exe"):
        if _mount_of(f"/proc/{pid}/{name}") == point.id:
            return name
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return None
    for number in numbers:
        if _field(f"/proc/{pid}/fdinfo/{number}") == point.id:
            return f"fd {number}"
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")
    except OSError:
        return None
    inside = point.directory.rstrip("/") + "/"
    return "map" if any(inside in line for line in maps.splitlines()) else None


def _mount_of(link: str) -> int | None:
    try:
        fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _field(f"/proc/self/fdinfo/{fd}")
    finally:
        os.close(fd)


def _field(fdinfo: str) -> int | None:
    try:
        for line in Path(fdinfo).read_text().splitlines():
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    except OSError:
        pass
    return None
