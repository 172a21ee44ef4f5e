"""What `glowplug agent doctor` looks at on a node, gathered: the facts of doctor.py.

Called by the verb, on its thread. Looks, and leaves nothing behind: what has to be tried (mounting EROFS, an
overlay) is tried in a folder that is gone afterwards. A probe that hangs is given up after a while, because a
mount that does not answer is one of the things to be found.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import queue
import re
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TypeVar

from agent import (
    client,
    config,
    containerdconfig,
    containerdprobe,
    daemon,
    doctor,
    install,
    lookup,
    store,
)
from agent.reconcile import DATABASE
from agent.rows import ImageRow
from imagefs import errors, holders, syscalls
from imagefs.fuse.control import DeviceClient
from imagefs.origin import connect

_T = TypeVar("_T")
_ANSWER_SECONDS = 5.0
_MAX_IMAGES = 5


def gather(
    settings: config.Settings, containerd: str, containerd_config: Path, references: Iterable[str]
) -> doctor.Facts:
    """All facts. `references` are images to ask their registries for, beside those that the node has."""
    rows, broken, database = _database(settings)
    numbers = {layer.mount_number: row.device(layer) for row in rows for layer in row.layers}
    known = [row.reference for row in rows]
    return doctor.Facts(
        settings=settings,
        root_user=os.geteuid() == 0,
        kernel=_kernel(),
        containerd=_containerd(settings, containerd, containerd_config),
        agent=_socket(settings.socket),
        api=_socket(settings.api_socket),
        not_ready=_not_ready(settings),
        device_server=_serves(settings.state),
        root=_disk(settings.root, overlay=True),
        cache=_disk(settings.cache.directory, overlay=False),
        database=database,
        mounts=_mounts(settings.root / "layers", numbers, broken),
        images=tuple(_images(settings, [*references, *known])),
        clock=_clock(settings.root),
    )


# -- the machine -----------------------------------------------------------------------------------------


def _kernel() -> doctor.Kernel:
    release = os.uname().release
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    return doctor.Kernel(release, version, _erofs(), os.path.exists("/dev/fuse"))


def _erofs() -> Literal["file", "device", "none"]:
    """Mounts what is no EROFS: a kernel that would take a file looks into it, and then says so. Loads the
    module, as the first mount would."""
    with tempfile.TemporaryDirectory(prefix="glowplug-doctor-") as folder:
        file = Path(folder, "file")
        file.write_bytes(bytes(1 << 16))
        (Path(folder) / "here").mkdir()
        try:
            syscalls.mount(file, Path(folder, "here"), "erofs", syscalls.MS_RDONLY)
        except OSError as exc:
            if exc.errno == errno.ENOTBLK:
                return "device"
            return "none" if exc.errno in (errno.ENODEV, errno.EPERM) else "file"
    raise AssertionError("a file of zeros was mounted")


def _clock(root: Path) -> doctor.Clock:
    times = [0.0]
    for path in (root / DATABASE, root / f"{DATABASE}-wal", Path(__file__)):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    service = Path("/run/systemd/timesync")
    synchronized = (service / "synchronized").exists() if service.is_dir() else None
    return doctor.Clock(max(times) - time.time(), synchronized)


def _disk(path: Path, *, overlay: bool) -> doctor.Disk:
    place = path
    while not place.exists():
        place = place.parent
    found = os.statvfs(place)
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    try:
        with tempfile.TemporaryDirectory(prefix=".glowplug-doctor-", dir=place) as folder:
            why = _overlay(Path(folder)) if overlay else None
            writable = True
    except OSError:
        why, writable = None, False
    return doctor.Disk(path, total, free, found.f_favail if found.f_files else None, writable, why)


def _overlay(folder: Path) -> str:
    """Why overlayfs takes no upper directory here; "" if it does."""
    for name in ("lower", "upper", "work", "here"):
        (folder / name).mkdir()
    options = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
    try:
        syscalls.mount("overlay", folder / "here", "overlay", 0, options)
    except OSError as exc:
        return exc.strerror or str(exc)
    syscalls.umount(folder / "here", syscalls.MNT_DETACH)
    return ""


# -- containerd and the agent ------------------------------------------------------------------------------


def _containerd(settings: config.Settings, program: str, file: Path) -> doctor.Containerd | str:
    try:
        found = containerdprobe.find_program(program)
        line = containerdprobe.line(found)
        effective = containerdprobe.effective(found, file)
        mode = containerdconfig.mode_of(effective)
        wanted = containerdconfig.Wanted(settings.socket, settings.root, install.platform(), mode)
        lacking = tuple(containerdconfig.differences(line, effective, wanted))
    except errors.ImagefsError as exc:
        return str(exc)
    daemon_socket = containerdprobe.socket_of(effective)
    unknown = containerdprobe.knows_us(daemon_socket)
    return doctor.Containerd(line, mode, lacking, unknown, containerdprobe.serves_cri(daemon_socket))


def _socket(path: Path) -> doctor.Socket:
    try:
        status = path.stat()
    except OSError:
        return doctor.Socket(path, None, None, answers=False)
    answers = False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_ANSWER_SECONDS)
        connection.connect(os.fspath(path))
        answers = True
    return doctor.Socket(path, stat.S_IMODE(status.st_mode), status.st_uid, answers)


def _not_ready(settings: config.Settings) -> dict[str, str]:
    """In the agent's own words; nothing if it does not answer, which another check says."""
    with contextlib.suppress(errors.ImagefsError):
        answer = client.AgentClient(settings.api_socket, _ANSWER_SECONDS).get("/api/v1/status")
        found = answer.get("not_ready")
        return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
    return {}


def _serves(state: Path) -> bool:
    with contextlib.suppress(errors.ImagefsError, OSError):
        return state.is_dir() and DeviceClient.connect(state) is not None
    return False


# -- state -------------------------------------------------------------------------------------------------


def _database(settings: config.Settings) -> tuple[list[ImageRow], tuple[str, ...], str | None]:
    """The images, the quarantined snapshots with their reasons, and what is wrong with the database."""
    path = settings.root / DATABASE
    if not path.exists():
        return [], (), None
    try:
        with contextlib.closing(store.Store.open(path)) as opened:
            broken = tuple(f"{row.name} ({row.broken})" for row in opened.walk() if row.broken is not None)
            return opened.images(), broken, None
    except errors.ImagefsError as exc:
        return [], (), f"{path}: {exc}"


def _mounts(layers: Path, numbers: dict[int, str], broken: tuple[str, ...]) -> doctor.Mounts:
    alive, dead, orphaned = 0, [], []
    for point in holders.mount_points():
        place = Path(point.directory)
        if place.parent != Path(os.path.realpath(layers)) or not place.name.isdigit():
            continue
        if int(place.name) not in numbers:
            orphaned.append(point.directory)
        if _within(functools.partial(_answers, place), otherwise=False):
            alive += 1
        else:
            dead.append(point.directory)
    return doctor.Mounts(alive, tuple(dead), tuple(orphaned), broken)


def _answers(directory: Path) -> bool:
    try:
        os.listdir(directory)
        os.statvfs(directory)
    except OSError:
        return False
    return True


def _within(call: Callable[[], _T], otherwise: _T) -> _T:
    """What the call returns, `otherwise` if it takes too long; its thread is left to itself then."""
    answer: queue.SimpleQueue[_T] = queue.SimpleQueue()
    threading.Thread(target=lambda: answer.put(call()), daemon=True).start()
    try:
        return answer.get(timeout=_ANSWER_SECONDS)
    except queue.Empty:
        return otherwise


# -- origins -----------------------------------------------------------------------------------------------


def _images(settings: config.Settings, references: list[str]) -> list[doctor.Image]:
    """One image of each repository's host, as the agent would read it."""
    asked: dict[str, doctor.Image] = {}
    for text in references:
        try:
            wanted = lookup.from_text(text)
        except errors.ImagefsError as exc:
            asked[text] = doctor.Image(text, str(exc))
            continue
        if wanted.reference.host in asked or len(asked) == _MAX_IMAGES:
            continue
        asked[wanted.reference.host] = _image(text, wanted, settings)
    return list(asked.values())


def _image(text: str, wanted: lookup.Wanted, settings: config.Settings) -> doctor.Image:
    reference = wanted.reference
    try:
        with contextlib.closing(connect.connect(reference, daemon.origin_options(settings))) as origin:
            origin.read_manifest(wanted.source_digest or reference.digest or reference.tag or "latest")
    except errors.ImagefsError as exc:
        return doctor.Image(text, str(exc), denied=isinstance(exc, errors.DeniedError))
    return doctor.Image(text, None)
