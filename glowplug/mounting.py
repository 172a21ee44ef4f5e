"""Mounting and unmounting an image on this machine: device server, table of mounts and assembly put together.

Called by the verbs mount, umount and run. The id of a mount's record is its owner's name at the device
server, so that what a killed command attached can be released by whoever finds the record (`collect`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowplug import device_server, mountlist, namespaces, process, settings
from imagefs import assembly, errors, holders, mounts, syscalls
from imagefs import mount as mount_layer
from imagefs.fuse import control, statedirectory
from imagefs.mount import Choice, Mode
from imagefs.mounts import MountTable, Record

if TYPE_CHECKING:
    from imagefs.image import LazyImage
    from imagefs.origin.connect import Options

_DAEMON_END_SECONDS = 10.0
_COPIES_SECONDS = 0.5


def mount(
    ref: str,
    directory: Path,
    options: assembly.Options,
    storage: settings.Storage,
    origins: Options,
    open_image: Callable[[], LazyImage],
    server: device_server.Starting | None,
) -> tuple[LazyImage, Path, Choice]:
    """Mount an image at a directory, without `server` file by file. Returns the image, the directory's full
    path, and how it was mounted."""
    table = MountTable(storage.state_dir)
    found = table.find(directory)  # first: where an earlier mount is dead, stat(2) fails
    if found is not None:
        raise errors.BusyError(_mounted_already(found, server))
    directory = assembly.check_directory(directory)
    pid, start = os.getpid(), mounts.process_start(os.getpid())
    record = Record(mounts.mount_id(directory), str(directory), ref, "", options.writable, pid, start)
    image = open_image()
    if server is None:
        why = "asked for" if options.mode else "only root may mount(2)"
    else:
        client = server.client()
        collect(table, client)
        choice = _mount_in_kernel(image, record, table, client, options, origins)
        if choice is not None:
            return image, directory, choice
        why = "this kernel cannot mount EROFS"
    choice = Choice(Mode.FUSE, why)
    _mount_files(image, record, table, options, storage, origins)
    return image, directory, choice


def run(
    ref: str,
    image: LazyImage,
    spec: process.Process,
    options: assembly.Options,
    storage: settings.Storage,
    origins: Options,
    client: control.DeviceClient,
) -> int:
    """Run a process in an image; returns its exit code. What it writes goes to a tmpfs.

    The mounts lie in a namespace of this process: they go with it, whatever ends it.
    """
    table = MountTable(storage.state_dir)
    collect(table, client)
    pid, start = os.getpid(), mounts.process_start(os.getpid())
    record = Record(f"run-{pid}-{start}", "", ref, "", True, pid, start, ephemeral=True)
    folder = table.claim(record) / "private"
    try:
        with namespaces.signals_held():
            layers, pack = assembly.layer_specs(image), assembly.pack_spec(image)
            devices = client.attach(record.id, layers, origins, pack)
        namespaces.enter_private_mounts()
        _forget_other_mounts(storage.state_dir)
        folder.mkdir()
        syscalls.mount("glowplug", folder, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=700")
        root, behind = folder / "root", folder / "behind"
        root.mkdir()
        behind.mkdir()
        if _assemble(image, devices, behind, root, options, record, client) is None:
            raise errors.ConfigurationError("this kernel cannot mount EROFS, which run needs")
        with namespaces.signals_held():
            return namespaces.run(root, spec)
    finally:
        mount_layer.unmount_all([folder, folder / "root"])
        release(record, table, client)


def umount(directory: Path, state_dir: Path, *, force: bool) -> None:
    """Undo `mount`, or what is left of it. BusyError names who uses it; NotFoundError if it is not ours."""
    directory = Path(os.path.realpath(directory))
    table = MountTable(state_dir)
    record = table.find(directory)
    if record is None:
        raise errors.NotFoundError(
            f"{directory} is not a mount of glowplug with state directory {state_dir}"
            + ("; umount(8) is for other mounts" if os.path.ismount(directory) else "")
        )
    point = holders.top_mount(str(directory))
    if point is not None and point.source == mountlist.SOURCE:
        _unmount(directory, point, force=force)
        left = "" if force else _copies(point.device)
        if left:
            raise errors.BusyError(
                f"{directory} is unmounted here, but there is still {left}; "
                f"once that is gone, run `glowplug umount {directory}` again"
            )
    elif point is not None and _is_below(point):
        raise errors.BusyError(
            f"something else ({point.filesystem}) is mounted over {directory}; unmount that first"
        )
    _unmount_leftovers(table.folder(record.id))
    if record.pid is not None:
        _await_end(record)
    release(record, table, control.DeviceClient.connect(state_dir))


def _mounted_already(record: Record, server: device_server.Starting | None) -> str:
    served = server is None or any(record.id in d["owners"] for d in server.client().status()["devices"])
    wrong = mountlist.problem(record, served=served)
    if wrong is None:
        return f"{record.directory} is mounted already; `glowplug umount {record.directory}` first"
    return f"{record.directory} has an earlier mount: {wrong}, then mount again"


def release(record: Record, table: MountTable, client: control.DeviceClient | None) -> None:
    """Give back what a record stands for, once nothing of it is mounted: devices, then the record. The
    device server ends with its last device."""
    if client is not None:
        client.detach(record.id)
    table.forget(record)
    if client is not None:
        client.stop_if_idle()


def collect(table: MountTable, client: control.DeviceClient | None) -> None:
    """Release the records of runs whose process is gone; their mounts went with their namespace."""
    for record in table.records():
        if record.ephemeral and not record.owner_lives():
            with contextlib.suppress(errors.ImagefsError, OSError):
                if client is not None:
                    client.detach(record.id)
                table.forget(record)


def _forget_other_mounts(state_dir: Path) -> None:
    """In a mount namespace of our own: let go of the copies of all mounts of ours, whichever state directory
    they are of, so that they can be unmounted, and their devices freed, while we live."""
    ours = str(statedirectory.device_directory(state_dir))
    copies = [point.directory for point in holders.mount_points() if point.source == mountlist.SOURCE]
    mount_layer.unmount_all([Path(directory) for directory in copies if directory != ours])


def _mount_in_kernel(
    image: LazyImage,
    record: Record,
    table: MountTable,
    client: control.DeviceClient,
    options: assembly.Options,
    origins: Options,
) -> Choice | None:
    try:
        # Whole or not at all: an attach that was cut short could arrive after its own detach.
        with namespaces.signals_held():
            folder = table.claim(record)
            layers, pack = assembly.layer_specs(image), assembly.pack_spec(image)
            devices = client.attach(record.id, layers, origins, pack)
        choice = _assemble(image, devices, folder, Path(record.directory), options, record, client)
        if choice is not None:
            table.update(dataclasses.replace(record, mode=choice.mode.value, pid=None, pid_start=None))
            return choice
    except BaseException:
        if table.is_claimed(record):
            _undo(record, table, client)
        raise
    _undo(record, table, client)
    return None


def _assemble(
    image: LazyImage,
    devices: Sequence[Path],
    folder: Path,
    directory: Path,
    options: assembly.Options,
    record: Record,
    client: control.DeviceClient,
) -> Choice | None:
    """As assembly.assemble; a read that failed comes with the device server's own account of it. The server
    is told of the mounts, which read ahead more once the start is over."""
    try:
        files = client.layer_files(record.id)
        try:
            assembled = assembly.assemble(image, devices, folder, directory, options, files)
        except errors.ImagefsError:
            if all(file.exists() for file in files.values()):
                raise
            # The cache needed the room meanwhile.
            assembled = assembly.assemble(image, devices, folder, directory, options, {})
    except errors.UnavailableError as exc:
        why = _last_error(client, record.id)
        raise errors.UnavailableError(f"{exc}: {why}" if why else str(exc)) from exc
    if assembled is None:
        return None
    client.started(record.id, assembled.backing_devices)
    return assembled.choice


def _last_error(client: control.DeviceClient, owner: str) -> str | None:
    """What the device server said last of a read that failed in one of the owner's layers."""
    with contextlib.suppress(errors.ImagefsError, OSError):
        for device in client.status()["devices"]:
            if owner in device["owners"] and device["last_error"] is not None:
                return str(device["last_error"]["message"])
    return None


def _undo(record: Record, table: MountTable, client: control.DeviceClient) -> None:
    """Undo a mount that failed; its own error is the one to show."""
    point = holders.top_mount(record.directory)
    if point is not None and point.source == mountlist.SOURCE:
        mount_layer.unmount_all([Path(record.directory)])
    with contextlib.suppress(errors.ImagefsError, OSError):
        release(record, table, client)


def _mount_files(
    image: LazyImage,
    record: Record,
    table: MountTable,
    options: assembly.Options,
    storage: settings.Storage,
    origins: Options,
) -> None:
    from imagefs.fuse import files_daemon

    if options.writable:
        raise errors.ConfigurationError("--rw needs EROFS in the kernel and root; --mode fuse is read-only")
    folder = table.claim(dataclasses.replace(record, mode=Mode.FUSE.value))
    try:
        pid = files_daemon.start(
            files_daemon.Job(
                reference=files_daemon.pinned(image),
                directory=record.directory,
                origins=origins.to_json(),
                cache_dir=str(storage.cache_dir),
                cache_quota_bytes=storage.cache_quota_bytes,
                free_floor_bytes=settings.free_floor_bytes(storage),
                read_deadline_seconds=storage.read_deadline_seconds,
                suid=options.suid,
                dev=options.dev,
            ),
            folder / "log",
        )
    except BaseException:
        table.forget(record)
        raise
    table.update(
        dataclasses.replace(record, mode=Mode.FUSE.value, pid=pid, pid_start=mounts.process_start(pid))
    )


def _unmount(directory: Path, point: holders.MountPoint, *, force: bool) -> None:
    try:
        if os.geteuid() == 0:
            syscalls.umount(directory, syscalls.MNT_DETACH if force else 0)
        else:
            _fusermount(directory, force=force)
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise errors.ConfigurationError(f"cannot unmount {directory}: {exc.strerror}") from exc
        inside = [f"a mount at {child}" for child in holders.children(point)]
        found = [*inside, holders.describe(holders.holding(point))]
        raise errors.BusyError(
            f"{directory} is in use by {', '.join(filter(None, found)) or 'a process that ended just now'}; "
            "end it, or use --force"
        ) from exc


def _fusermount(directory: Path, *, force: bool) -> None:
    result = subprocess.run(
        ["fusermount3", "-u", *(["-z"] if force else []), str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        text = result.stderr.strip()
        raise OSError(errno.EBUSY if "busy" in text else errno.EPERM, text, str(directory))


def _copies(device: str) -> str:
    """Where else the filesystem is mounted, empty if nowhere. Every new mount namespace has it at first: a
    `run` that is starting is given the moment that it takes to let go."""
    deadline = time.monotonic() + _COPIES_SECONDS
    while (found := holders.copies(device)) and time.monotonic() < deadline:
        time.sleep(0.02)
    binds = [f"a bind mount of it at {p.directory}" for p in holders.mount_points() if p.device == device]
    return ", ".join([*binds, *([holders.describe(found)] if found else [])])


def _unmount_leftovers(folder: Path) -> None:
    """Layer mounts that a killed command left below the record's folder."""
    mount_layer.unmount_all(
        [
            Path(point.directory)
            for point in holders.mount_points()
            if Path(point.directory).is_relative_to(folder)
        ]
    )


def _is_below(point: holders.MountPoint) -> bool:
    """Whether one of our mounts at the same directory is hidden under this one."""
    same = [other for other in holders.mount_points() if other.directory == point.directory]
    return any(other.source == mountlist.SOURCE for other in same)


def _await_end(record: Record) -> None:
    """The process of a file-level mount ends by itself once it is unmounted."""
    deadline = time.monotonic() + _DAEMON_END_SECONDS
    while record.owner_lives() and time.monotonic() < deadline:
        time.sleep(0.01)


def report(
    ref: str, image: LazyImage, directory: Path, choice: Choice, options: assembly.Options
) -> dict[str, Any]:
    """What `glowplug mount --json` prints."""
    return {
        "reference": ref,
        "source_digest": image.source_digest,
        "block_image_digest": image.manifest.digest,
        "directory": str(directory),
        "mode": choice.mode.value,
        "why": choice.why,
        "writable": options.writable,
        "layers": len(image.layers),
    }
