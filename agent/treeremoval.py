"""Delete a folder that a container has filled, whatever it has put there.

Called by snapshotter.py. shutil.rmtree calls itself once a level, and ends with a RecursionError on a tree
that is deeper than Python's stack: any container can make one. It also deletes what is mounted inside. Here a
folder inside a folder is first moved to the top, so that no path is longer than two names, nothing recurses,
and two descriptors are enough. Links are not followed. The next call goes on where one that failed stopped.
"""

from __future__ import annotations

import errno
import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(root: Path) -> None:
    """OSError for what cannot be deleted: EBUSY for what is mounted inside, FileNotFoundError if there is no
    such folder."""
    top = os.open(root, _FLAGS)
    try:
        moved = (f".{secrets.token_hex(8)}.{number}" for number in itertools.count())
        while names := _entries(top):
            for name, is_folder in names:
                if is_folder:
                    _remove_folder(top, name, moved)
                else:
                    os.unlink(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(root)


def _remove_folder(top: int, name: str, moved: Iterator[str]) -> None:
    """A folder below the top: its files go, its own folders come to the top."""
    folder = os.open(name, _FLAGS, dir_fd=top)
    try:
        if os.fstat(folder).st_dev != os.fstat(top).st_dev:
            raise OSError(errno.EBUSY, "something is mounted there", name)
        for inner, is_folder in _entries(folder):
            if is_folder:
                os.rename(inner, next(moved), src_dir_fd=folder, dst_dir_fd=top)
            else:
                os.unlink(inner, dir_fd=folder)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=top)


def _entries(folder: int) -> list[tuple[str, bool]]:
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
