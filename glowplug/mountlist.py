"""What became of the mounts in a state directory's table: for `status`, and for the messages of `mount`.

Read-only: looks at the records, at this mount namespace and at what the device server says it serves. A mount
whose server was killed with everything that kept it alive is still mounted, and answers reads with EIO:
nothing but this comparison tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imagefs import holders
from imagefs.mount import Mode
from imagefs.mounts import MountTable, Record

SOURCE = "glowplug"
"""What mountinfo shows as the source of every root that we assembled."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mounted:
    """One record. `wrong` says what is not as it should be, and what to do; None for a mount that works."""

    id: str
    directory: str
    reference: str
    mode: str
    writable: bool
    wrong: str | None


def listed(state_dir: Path, status: dict[str, Any] | None) -> Iterator[Mounted]:
    """The state directory's mounts, given its server's status (None: no server)."""
    owners = {owner for device in (status or {"devices": []})["devices"] for owner in device["owners"]}
    for record in MountTable(state_dir).records():
        wrong = problem(record, served=record.id in owners)
        yield Mounted(record.id, record.directory, record.reference, record.mode, record.writable, wrong)


def problem(record: Record, *, served: bool) -> str | None:
    """What is wrong with a mount, if anything. `served`: the device server has its layers."""
    remedy = f"run `glowplug umount {record.directory}`"
    if record.ephemeral:
        return None if record.owner_lives() else "its command was killed; the next mount or run cleans up"
    if not record.mode:
        return None if record.owner_lives() else f"the mount was never finished; {remedy}"
    if not _is_mounted(record):
        return f"not mounted here any more (a reboot, umount(8), or another mount namespace); {remedy}"
    alive = record.owner_lives() if record.mode == Mode.FUSE.value else served
    return None if alive else f"dead: the processes that served it were killed, its reads fail; {remedy}"


def _is_mounted(record: Record) -> bool:
    return any(
        point.directory == record.directory and point.source == SOURCE for point in holders.mount_points()
    )
