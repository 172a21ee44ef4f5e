"""Taking the agent out of a host: the reverse of install.py.

Called by `glowplug agent uninstall`, on its thread, as root. Containers that have snapshots of ours would not
start again, so it is refused while there are any. containerd's part is all or nothing, and comes first: the
agent is stopped when nobody asks it any more. What is on the disk stays: settings, database, cache.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from agent import config, containerdconfig, containerdprobe, host, hostfiles, store, tomledit
from agent.containerdconfig import SNAPSHOTTER
from agent.daemon import DEVICE_OWNER
from agent.host import Change
from agent.reconcile import DATABASE
from agent.snapshots import Kind
from imagefs import errors, holders, syscalls
from imagefs.fuse.control import DeviceClient

_SHOWN_KEYS = 5


def uninstall(change: Change, *, force: bool) -> None:
    """See the module. BusyError while containers use the snapshotter, unless forced."""
    place = change.host
    settings = config.load(place.settings_file) if place.settings_file.exists() else config.Settings()
    try:
        used = _used(settings)
    except errors.ConfigurationError as exc:
        if not force:
            raise
        used = [str(exc)]
    if used and not force:
        shown = ", ".join(used[:_SHOWN_KEYS]) + (", ..." if len(used) > _SHOWN_KEYS else "")
        raise errors.BusyError(
            f"{len(used)} containers use the snapshotter: {shown}; remove them first (drain the node), or "
            "--force: they go on running, but cannot be started again"
        )
    with change.undone_on_failure():
        if _write_containerd(change) and change.restart:
            change.restart_containerd(lambda _: None)
            change.say("containerd was restarted")
    if change.restart:
        _stop(change, settings, in_use=bool(used))
    for name in (host.AGENT_UNIT, host.KEEPER_UNIT):
        change.files.remove(place.place(host.UNIT_DIRECTORY) / name)
    if change.restart:
        change.services("daemon-reload")
    with contextlib.suppress(errors.ConfigurationError):
        for reference in sorted({row.reference for row in _rows(settings, store.Store.images)}):
            change.say(f"not whole on this node, remove it and pull it again if it is wanted: {reference}")
    change.say(f"uninstalled; left: {place.settings_file}, {settings.root}, {settings.cache.directory}")


def _used(settings: config.Settings) -> list[str]:
    """The keys of snapshots that containers have."""
    found = containerdprobe.unfinished_snapshots(settings.socket)
    if found is not None:
        return found
    rows = _rows(settings, store.Store.walk)
    return [
        row.name for row in rows if row.kind is not Kind.COMMITTED and not containerdprobe.is_check(row.name)
    ]


def _rows(settings: config.Settings, read: Callable[[store.Store], list[Any]]) -> list[Any]:
    """From the database of an agent that does not run; nothing if there is none. ConfigurationError if it
    cannot be read."""
    path = settings.root / DATABASE
    if not path.exists():
        return []
    try:
        opened = store.Store.open(path)
    except errors.ImagefsError as exc:
        raise errors.ConfigurationError(
            f"whether containers use the snapshotter cannot be told without the agent: {exc}; --force goes on"
        ) from exc
    with contextlib.closing(opened):
        return read(opened)


def _write_containerd(change: Change) -> bool:
    place = change.host
    main = hostfiles.text(place.containerd_config)
    plan = containerdconfig.without(main)
    changed = change.files.remove(place.drop_in)
    if plan.main != main:
        changed = True
        if plan.main:
            change.files.write(place.containerd_config, plan.main)
        else:
            change.files.remove(place.containerd_config)
    effective = containerdprobe.effective(place.containerd, place.containerd_config)
    if SNAPSHOTTER in (effective.get("proxy_plugins") or {}):
        raise errors.ConfigurationError(
            f"{place.containerd_config} still names the snapshotter, in lines that do not end in "
            f"{tomledit.MARK!r} (a program wrote the file anew?): take them out by hand"
        )
    if changed:
        change.say(f"{place.containerd_config} is as it was without us")
    link = containerdprobe.image_filesystem(effective)
    if link.is_symlink():
        link.unlink()
    return changed


def _stop(change: Change, settings: config.Settings, *, in_use: bool) -> None:
    for unit in (host.AGENT_UNIT, host.KEEPER_UNIT):
        if (change.host.place(host.UNIT_DIRECTORY) / unit).exists():
            change.services("disable", "--now", unit)
    if in_use:
        change.say("the device server goes on for the containers that run, until the next boot")
        return
    below = tuple(f"{os.path.realpath(settings.root / name)}/" for name in ("layers", "mapped"))
    for point in reversed(holders.mount_points()):
        if point.directory.startswith(below):
            with contextlib.suppress(OSError):
                syscalls.umount(point.directory, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    client = DeviceClient.connect(settings.state)
    if client is None:
        return
    owners = {owner for device in client.status()["devices"] for owner in device["owners"]}
    for owner in sorted(owners):
        if owner.startswith(("image:", "peer:")):
            client.detach(owner)
    client.detach(DEVICE_OWNER)
    if not client.stop_if_idle():
        change.say("the device server goes on for what `glowplug mount` has mounted")
