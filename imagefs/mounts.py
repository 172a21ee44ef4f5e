"""The table of our mounts: one folder STATE/mounts/<id>/ with a record.json for each.

Owned by whoever mounts: the record is written before the first mount(2) and removed after the last umount,
so that whatever a crash leaves behind is named by a record. A directory has at most one record. Records of
`run` name their process and are collected by the next command when it is gone. No lock is held across calls;
`claim` is atomic (rename).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from imagefs import errors, privatedirectory

_RECORD = "record.json"
_NEW = ".new-"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One mount. `mode` is "erofs", "loop" or "fuse", empty while it is being made. `pid` and `pid_start`
    name the process that is making it, or that a `run` (`ephemeral`) or a file-level mount lives and dies
    with; None for a finished mount by the kernel."""

    id: str
    directory: str
    reference: str
    mode: str
    writable: bool
    pid: int | None = None
    pid_start: int | None = None
    ephemeral: bool = False

    def owner_lives(self) -> bool:
        """Whether the process that the record names is still the same one, and running."""
        return self.pid is not None and process_start(self.pid) == self.pid_start


class MountTable:
    """The records below one state directory. ConfigurationError if that is not ours."""

    def __init__(self, state_dir: Path) -> None:
        privatedirectory.check(state_dir)
        self._state_dir = state_dir
        self._root = state_dir / "mounts"

    def folder(self, mount_id: str) -> Path:
        """Where the mount's layers, empty directories and writable part lie."""
        return self._root / mount_id

    def claim(self, record: Record) -> Path:
        """Write the record of a mount to come; returns its folder. BusyError if the directory has one."""
        folder = self.folder(record.id)
        new = self._root / f"{_NEW}{record.id}-{os.getpid()}"
        try:
            privatedirectory.make(self._state_dir)
            new.mkdir(parents=True, mode=0o700)
            self._write(new, record)
            new.rename(folder)
        except OSError as exc:
            if exc.errno in (errno.ENOTEMPTY, errno.EEXIST) and folder.is_dir():
                raise errors.BusyError(
                    f"{record.directory} is mounted already; `glowplug umount {record.directory}` first"
                ) from None
            raise errors.ConfigurationError(f"cannot write state to {folder}: {exc.strerror}") from exc
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return folder

    def update(self, record: Record) -> None:
        """Replace a claimed record."""
        self._write(self.folder(record.id), record)

    def is_claimed(self, record: Record) -> bool:
        """Whether the record there is the one that this process claimed."""
        found = self._read(self.folder(record.id))
        return found is not None and (found.pid, found.pid_start) == (record.pid, record.pid_start)

    def find(self, directory: Path) -> Record | None:
        """The record of a mounted directory."""
        return self._read(self.folder(mount_id(directory)))

    def records(self) -> Iterator[Record]:
        """All records, in order of id."""
        if self._root.is_dir():
            for folder in sorted(self._root.iterdir()):
                record = None if folder.name.startswith(_NEW) else self._read(folder)
                if record is not None:
                    yield record

    def forget(self, record: Record) -> None:
        """Remove the record and its folder. Nothing may be mounted below it any more."""
        folder = self.folder(record.id)
        for name in os.listdir(folder):
            path = folder / name
            if name != _RECORD and path.is_dir() and not path.is_symlink():
                if os.path.ismount(path):
                    raise errors.BusyError(f"{path} is still mounted")
                shutil.rmtree(path)
        shutil.rmtree(folder)

    @staticmethod
    def _write(folder: Path, record: Record) -> None:
        temporary = folder / "record.new"
        temporary.write_text(json.dumps(dataclasses.asdict(record), indent=1))
        temporary.replace(folder / _RECORD)

    def _read(self, folder: Path) -> Record | None:
        try:
            record = Record(**json.loads((folder / _RECORD).read_text()))
        except FileNotFoundError:
            if not folder.is_dir():
                return None
            # Killed while it was forgotten: nothing was mounted any more.
            return Record(folder.name, "", "", "", False)
        except (ValueError, TypeError) as exc:
            raise errors.ConfigurationError(f"{folder / _RECORD} is damaged: {exc}") from exc
        if record.id != folder.name:
            raise errors.ConfigurationError(f"{folder / _RECORD} is damaged: it is of {record.id!r}")
        return record


def mount_id(directory: Path) -> str:
    """The id of the mount on a directory: one per place, so that it can be found again by it alone."""
    return hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:16]


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with the pid, a name that is not used twice."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])
