"""What is wrong with a node, and how to mend it: facts in, findings out.

Pure. doctorprobes.py gathers the facts, `glowplug agent doctor` prints the findings. A check is a function of
the facts that gives findings: "ok" says what was looked at, "warning" is something that costs (speed, or
safety in a rare case), "problem" something that makes pods fail, or be pulled as ever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from agent.config import Settings
from agent.containerdconfig import Mode

Level = Literal["ok", "warning", "problem"]
KUBELET_GC_PERCENT = 15
"""kubelet deletes images when less than this is free, unless it was told otherwise."""

_RESEND_KERNEL = (6, 9)
_RESEND_FEW = "reads that are under way when a process of the device server dies fail"
_LOW_INODES = 10_000
_LOW_PERCENT = 5
"""Of a disk: less is a problem whatever it is for."""
_CLOCK_SECONDS = 300.0


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """`mend` is what to do, "" when all is well."""

    check: str
    level: Level
    found: str
    mend: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """`erofs` is "file", "device" (a loop device is needed) or "none"."""

    release: str
    version: tuple[int, int]
    erofs: Literal["file", "device", "none"]
    fuse_device: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Containerd:
    """`lacking` is what its configuration lacks for its `mode`; `unknown` why the running daemon does not
    know us, None if it does; `cri` whether kubelet can use it."""

    line: tuple[int, int]
    mode: Mode
    lacking: tuple[str, ...]
    unknown: str | None
    cri: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Socket:
    """A unix socket of ours; `mode` and `owner` None if there is none. `answers`: somebody listens."""

    path: Path
    mode: int | None
    owner: int | None
    answers: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Disk:
    """The file system below a directory (or where it would be). `overlay` is why the kernel takes no
    overlay's upper directory there, "" if it does, None if it is not asked for."""

    path: Path
    total_bytes: int
    free_bytes: int
    free_inodes: int | None
    writable: bool
    overlay: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """An image that was asked for at its registry; `error` None if its manifest came. `denied`: for want of
    credentials."""

    reference: str
    error: str | None
    denied: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Mounts:
    """Of the layers' mount points: how many are alive, which do not answer, which nothing in the database
    is mounted there for. `quarantined` are snapshots, with the reason."""

    alive: int = 0
    dead: tuple[str, ...] = ()
    orphaned: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """Seconds by which our newest file was written after now (negative: before)."""

    ahead_seconds: float
    synchronized: bool | None


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """All that the checks look at."""

    settings: Settings
    root_user: bool
    kernel: Kernel
    containerd: Containerd | str
    agent: Socket
    api: Socket
    not_ready: dict[str, str]
    device_server: bool
    root: Disk
    cache: Disk
    database: str | None
    mounts: Mounts
    images: tuple[Image, ...]
    clock: Clock


def examine(facts: Facts) -> list[Finding]:
    """The findings of all checks, in the order in which to mend."""
    return [finding for check in _CHECKS for finding in check(facts)]


# -- the machine -----------------------------------------------------------------------------------------


def _rights(facts: Facts) -> Iterator[Finding]:
    if not facts.root_user:
        yield Finding("rights", "problem", "not run as root", "run it as root: much cannot be seen otherwise")


def _kernel(facts: Facts) -> Iterator[Finding]:
    kernel = facts.kernel
    if kernel.erofs == "none":
        yield Finding(
            "erofs",
            "problem",
            f"Linux {kernel.release} mounts no EROFS: every image is pulled as ever",
            "load the module (modprobe erofs), or take a kernel with CONFIG_EROFS_FS",
        )
    elif kernel.erofs == "device":
        yield Finding(
            "erofs",
            "warning",
            f"Linux {kernel.release} mounts EROFS from block devices only: each layer takes a loop device",
            "nothing must be done; Linux 6.12 or newer mounts files, with less memory",
        )
    else:
        yield Finding("erofs", "ok", f"Linux {kernel.release} mounts EROFS from files")
    if not kernel.fuse_device:
        yield Finding("fuse", "problem", "/dev/fuse is missing", "load the module: modprobe fuse")
    elif kernel.version < _RESEND_KERNEL:
        yield Finding(
            "fuse",
            "warning",
            f"Linux {kernel.release}: a crash of the device server is not survived: {_RESEND_FEW}",
            "nothing must be done; Linux 6.9 or newer queues them again",
        )
    else:
        yield Finding("fuse", "ok", "a crash of the device server is survived (Linux 6.9 or newer)")


def _clock(facts: Facts) -> Iterator[Finding]:
    if facts.clock.ahead_seconds > _CLOCK_SECONDS:
        yield Finding(
            "clock",
            "problem",
            f"the clock is wrong: our newest file is from {facts.clock.ahead_seconds:.0f} s after now; "
            "certificates and credentials seem not yet valid",
            "synchronize it (systemd-timesyncd, chrony)",
        )
    elif facts.clock.synchronized is False:
        yield Finding(
            "clock", "warning", "the kernel says that its clock is not synchronized", "run an NTP client"
        )
    else:
        yield Finding("clock", "ok", "plausible")


# -- containerd and the agent ------------------------------------------------------------------------------


def _containerd(facts: Facts) -> Iterator[Finding]:
    found = facts.containerd
    if isinstance(found, str):
        yield Finding(
            "containerd", "problem", found, "install containerd 1.6 or newer, or name its program and file"
        )
        return
    name = f"containerd {found.line[0]}.{found.line[1]}"
    if not found.lacking:
        whom = "all pods" if found.mode == "default" else "pods of its RuntimeClass"
        yield Finding("containerd-config", "ok", f"{name} is configured to use the agent for {whom}")
    else:
        yield Finding(
            "containerd-config",
            "problem",
            f"{name} is not configured for the agent: {'; '.join(found.lacking)}",
            "glowplug agent install (--dry-run shows what it changes)",
        )
    if found.unknown is not None:
        yield Finding(
            "containerd",
            "problem",
            found.unknown,
            "start containerd, or restart it if its configuration is newer",
        )
    elif not found.cri:
        yield Finding(
            "containerd",
            "warning",
            f"{name} knows the agent, but serves no CRI: kubelet cannot use it",
            "take cri out of disabled_plugins, if this is a Kubernetes node",
        )
    else:
        yield Finding("containerd", "ok", f"{name} knows the agent, and serves CRI")


def _agent(facts: Facts) -> Iterator[Finding]:
    for name, socket in (("agent", facts.agent), ("api", facts.api)):
        if socket.mode is None or not socket.answers:
            what = "is not there" if socket.mode is None else "is there, but nobody listens"
            yield Finding(
                name,
                "problem",
                f"{socket.path} {what}",
                "systemctl status glowplug-agent; journalctl -u glowplug-agent",
            )
        elif socket.mode & 0o077 or socket.owner != 0:
            yield Finding(
                name,
                "problem",
                f"{socket.path} is open to others (mode {socket.mode:o}, user {socket.owner}): who may "
                "connect may remove containers' files",
                f"chmod 600 {socket.path}; restart the agent",
            )
        else:
            yield Finding(name, "ok", f"{socket.path} answers")
    if facts.not_ready:
        wrong = "; ".join(f"{name}: {why}" for name, why in facts.not_ready.items())
        yield Finding("ready", "problem", f"the agent is not ready: {wrong}", "its log says more")
    if not facts.device_server:
        yield Finding(
            "device-server",
            "problem",
            f"no device server runs in {facts.settings.state}: lazy images cannot be read",
            f"systemctl restart glowplug-keeper; {facts.settings.state}/server.log says why it ended",
        )
    else:
        yield Finding("device-server", "ok", "answers")


# -- disks -------------------------------------------------------------------------------------------------


def _disks(facts: Facts) -> Iterator[Finding]:
    for name, disk in (("root", facts.root), ("cache", facts.cache)):
        yield from _disk(name, disk)
    if facts.root.overlay:
        yield Finding(
            "overlay",
            "problem",
            f"{facts.settings.root} cannot hold containers' writable layers: {facts.root.overlay}",
            "put `root` on ext4, xfs (ftype=1) or another file system that overlayfs takes as upper layer",
        )
    elif facts.root.overlay == "":
        yield Finding("overlay", "ok", "overlayfs takes its upper directories on root's file system")
    yield from _limits(facts)


def _disk(name: str, disk: Disk) -> Iterator[Finding]:
    free = f"{_size(disk.free_bytes)} of {_size(disk.total_bytes)} are free"
    if not disk.writable:
        yield Finding(
            f"disk-{name}", "problem", f"{disk.path} cannot be written to", "remount it, or choose another"
        )
    elif disk.free_inodes is not None and disk.free_inodes < _LOW_INODES:
        found = f"{disk.path}: {disk.free_inodes} inodes are free"
        yield Finding(
            f"disk-{name}", "problem", found, "remove files, or make the file system anew with more"
        )
    elif _has_less(disk, _LOW_PERCENT):
        yield Finding(f"disk-{name}", "problem", f"{disk.path}: {free}", "free space, or use a larger disk")
    else:
        yield Finding(f"disk-{name}", "ok", f"{disk.path}: {free}")


def _has_less(disk: Disk, percent: int) -> bool:
    """Free space, than that part of the whole."""
    return disk.free_bytes * 100 < disk.total_bytes * percent


def _limits(facts: Facts) -> Iterator[Finding]:
    cache, disk = facts.settings.cache, facts.cache
    if cache.free_floor_percent <= KUBELET_GC_PERCENT:
        yield Finding(
            "cache-limits",
            "warning",
            f"cache.free_floor_percent is {cache.free_floor_percent}: kubelet begins to delete images "
            f"below {KUBELET_GC_PERCENT} % free, before the cache gives anything up",
            f"set it above {KUBELET_GC_PERCENT} (or above what imageGCHighThresholdPercent leaves)",
        )
    elif _has_less(disk, cache.free_floor_percent) and not _has_less(disk, _LOW_PERCENT):
        yield Finding(
            "cache-limits",
            "warning",
            f"{_size(disk.free_bytes)} of {_size(disk.total_bytes)} are free, less than "
            f"cache.free_floor_percent ({cache.free_floor_percent} %): the cache keeps nothing new, blocks "
            "are served from memory and fetched again",
            "free space, put cache.directory on another disk, or lower cache.free_floor_percent",
        )
    elif disk.total_bytes and cache.quota_bytes > disk.total_bytes * (100 - cache.free_floor_percent) // 100:
        yield Finding(
            "cache-limits",
            "warning",
            f"cache.quota_bytes ({_size(cache.quota_bytes)}) is more than the disk may hold: the cache is "
            f"limited by the floor of {cache.free_floor_percent} % alone",
            "set a smaller quota, or use a larger disk",
        )
    else:
        yield Finding(
            "cache-limits", "ok", f"{_size(cache.quota_bytes)}, {cache.free_floor_percent} % stay free"
        )


# -- state and origins -------------------------------------------------------------------------------------


def _state(facts: Facts) -> Iterator[Finding]:
    if facts.database is not None:
        yield Finding(
            "database",
            "problem",
            facts.database,
            "restart the agent: it moves a damaged database aside, and takes its last good copy",
        )
    mounts = facts.mounts
    if mounts.dead:
        yield Finding(
            "mounts",
            "problem",
            f"{len(mounts.dead)} layer mounts do not answer: {_some(mounts.dead)}",
            "restart the agent, which mounts them anew; containers that run on them must be started again",
        )
    else:
        yield Finding("mounts", "ok", f"{mounts.alive} layers are mounted, and answer")
    if mounts.orphaned:
        yield Finding(
            "orphans",
            "warning",
            f"{len(mounts.orphaned)} layer mounts are nobody's: {_some(mounts.orphaned)}",
            "restart the agent, which takes them away",
        )
    if mounts.quarantined:
        yield Finding(
            "quarantine",
            "problem",
            f"{len(mounts.quarantined)} snapshots cannot be used: {_some(mounts.quarantined)}",
            "they come back by themselves when the reason is gone; otherwise remove and pull their images",
        )


def _registries(facts: Facts) -> Iterator[Finding]:
    for image in facts.images:
        if image.error is None:
            yield Finding("registry", "ok", f"{image.reference} can be read")
        elif image.denied:
            yield Finding(
                "registry",
                "problem",
                f"{image.reference}: {image.error}",
                "credentials: see the table `credentials` of the settings, and docs/install.md",
            )
        else:
            yield Finding(
                "registry",
                "problem",
                f"{image.reference}: {image.error}",
                "see that the node reaches the registry; mirrors come from containerd's certs.d",
            )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


_CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _rights,
    _kernel,
    _clock,
    _containerd,
    _agent,
    _disks,
    _state,
    _registries,
)
