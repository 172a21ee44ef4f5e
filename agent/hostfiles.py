"""Files of the host that an installation changes: each is replaced whole, and all can be undone at once.

Used by install.py and uninstall.py, on their thread. A file keeps its mode and owner; behind a symbolic link,
its target is what is replaced. What is undone is in memory: a killed installation is repeated, not undone.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from imagefs import errors

_NEW_SUFFIX = ".glowplug-new"


class Changes:
    """What was changed so far, oldest first."""

    def __init__(self) -> None:
        self._before: list[tuple[Path, bytes | None]] = []

    def write(self, path: Path, wanted: str, mode: int = 0o644) -> bool:
        """Have the file say `wanted`. Whether that was a change."""
        path = Path(os.path.realpath(path))
        before = read(path)
        data = wanted.encode()
        if before == data:
            return False
        self._before.append((path, before))
        _replace(path, data, mode)
        return True

    def remove(self, path: Path) -> bool:
        """Have no such file. Whether there was one."""
        before = read(path)
        if before is None:
            return False
        self._before.append((path, before))
        _unlink(path)
        return True

    def undo(self) -> None:
        """Put everything back as it was."""
        while self._before:
            path, before = self._before.pop()
            if before is None:
                _unlink(path)
            else:
                _replace(path, before, 0o644)


def read(path: Path) -> bytes | None:
    """What is in it; None if it is not there. ConfigurationError if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise errors.ConfigurationError(f"cannot read {path}: {exc.strerror}") from exc


def text(path: Path) -> str:
    """The same as text, "" if it is not there. ConfigurationError if it is not UTF-8."""
    try:
        return (read(path) or b"").decode()
    except UnicodeDecodeError as exc:
        raise errors.ConfigurationError(f"{path} is not UTF-8: {exc}") from exc


def keep_copy(path: Path, suffix: str) -> Path | None:
    """A copy beside it, unless there is one; its path. None if there is nothing to copy."""
    path = Path(os.path.realpath(path))
    copy = path.with_name(path.name + suffix)
    data = read(path)
    if data is None:
        return None
    if not copy.exists():
        _replace(copy, data, stat.S_IMODE(path.stat().st_mode))
    return copy


def _replace(path: Path, data: bytes, mode: int) -> None:
    new = path.with_name(path.name + _NEW_SUFFIX)
    owner = None
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        mode, owner = stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            if owner is not None:
                os.fchown(file.fileno(), *owner)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            new.unlink()
        raise errors.ConfigurationError(f"cannot write {path}: {exc.strerror}") from exc


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise errors.ConfigurationError(f"cannot remove {path}: {exc.strerror}") from exc
