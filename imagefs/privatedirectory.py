"""Directories that nobody else may write to: the state directory and the block cache.

What lies there is believed: records say what to unmount and remove, a socket is taken for our server's, a
block that was verified since boot is served as it is. In a place like /tmp somebody else may have made the
directory first. Called before anything in it is looked at; no state, any thread.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from imagefs import errors


def make(path: Path) -> None:
    """Make the directory if it is missing, and `check` it. OSError if it cannot be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    check(path)


def check(path: Path) -> None:
    """ConfigurationError unless the directory, if there is one, is ours; others' permissions on it are taken
    away."""
    try:
        link = path.lstat()
        # Where a link points could be ours, and still not what its maker should have us use.
        if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.geteuid()):
            raise errors.ConfigurationError(f"{path} is a symbolic link of user {link.st_uid}")
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except PermissionError as exc:
        raise errors.ConfigurationError(f"{path} is not ours to use: {exc.strerror}") from exc
    except OSError as exc:
        raise errors.ConfigurationError(f"{path}: {exc.strerror}") from exc
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise errors.ConfigurationError(
                f"{path} belongs to user {status.st_uid}, not to us ({os.geteuid()}): it cannot be trusted; "
                "choose another directory"
            )
        if stat.S_IMODE(status.st_mode) & 0o077:
            os.fchmod(fd, stat.S_IMODE(status.st_mode) & 0o700)
    except OSError as exc:
        raise errors.ConfigurationError(f"{path} is open to others, and stays so: {exc.strerror}") from exc
    finally:
        os.close(fd)
