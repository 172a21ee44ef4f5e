"""Compares a mounted image with what its source says it must be: the first difference, as a sentence.

The shell around converter.flatten: it walks a real directory with lstat, readlink, xattrs and reads. Called
by `glowplug check --against-source`; one thread; needs the right to read every file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import stat
from collections.abc import Generator, Iterator

from converter import rootedpath
from converter.flatten import Attributes, Flattened
from converter.rootedpath import Path

_READ_BYTES = 1 << 20
_COMPARED_XATTRS = (b"security.", b"user.", b"system.posix_acl_")
_OF_THE_HOST = frozenset((b"security.selinux", b"security.ima", b"security.evm", b"security.SMACK64"))
"""A host's policy shows these on files that have none."""
_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """One difference; as text a sentence."""

    path: Path
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{rootedpath.show(self.path)}: {self.what}: expected {self.expected}, found {self.found}"


def first_difference(expected: Flattened, mounted_root: pathlib.Path) -> str | None:
    """The first of `differences` as a sentence, None if there is none."""
    with contextlib.closing(differences(expected, mounted_root)) as found:
        first = next(found, None)
    return str(first) if first is not None else None


def differences(expected: Flattened, mounted_root: pathlib.Path) -> Generator[Difference, None, None]:
    """Where a directory tree is not what it must be, in the order of paths, at most one for each path.

    Compared are type, permissions, owner, mtime, xattrs (security, user, ACLs), device numbers, link targets,
    which names are one inode, and content. OSError if the tree cannot be read.
    """
    root_fd = os.open(mounted_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield from _differences(expected, _Mounted(root_fd))
    finally:
        os.close(root_fd)


def _differences(expected: Flattened, mounted: _Mounted) -> Iterator[Difference]:
    """Both walks ascend: go along them side by side."""
    wanted, found = expected.walk(), mounted.walk()
    want, have = next(wanted, None), next(found, None)
    while want or have:
        if want and (not have or want[0] < have[0]):
            yield Difference(want[0], "missing", _kind(want[1].mode), "nothing")
            want = next(wanted, None)
        elif have and (not want or have[0] < want[0]):
            yield Difference(have[0], "too much", "nothing", _kind(have[1].st_mode))
            have = next(found, None)
        elif want and have:
            if difference := mounted.difference(want[0], want[1], have[1]):
                yield Difference(want[0], *difference)
            want, have = next(wanted, None), next(found, None)


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), f"type {stat.S_IFMT(mode):#o}")


@dataclasses.dataclass(slots=True)
class _Mounted:
    """A directory tree, everything in it addressed from its root, so that no path gets longer than Linux
    takes (a tar's paths are bounded) and no more than two descriptors are open at once."""

    root_fd: int
    inodes: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    groups: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def walk(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Every path with its lstat, in the order of Flattened.walk."""
        yield (), os.fstat(self.root_fd)
        names: list[bytes] = []
        levels = [iter(self._names(()))]
        while levels:
            for name in levels[-1]:
                path = (*names, name)
                status = os.stat(_text(path), dir_fd=self.root_fd, follow_symlinks=False)
                yield path, status
                if stat.S_ISDIR(status.st_mode):
                    names.append(name)
                    levels.append(iter(self._names(path)))
                    break
            else:
                levels.pop()
                del names[-1:]

    def _names(self, path: Path) -> list[bytes]:
        with self._open(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
            return sorted(os.fsencode(name) for name in os.listdir(fd))

    def difference(self, path: Path, want: Attributes, have: os.stat_result) -> tuple[str, str, str] | None:
        """What differs, expected and found; None if nothing does."""
        if stat.S_IFMT(want.mode) != stat.S_IFMT(have.st_mode):
            return "type differs", _kind(want.mode), _kind(have.st_mode)
        # A symbolic link's permissions mean nothing and differ between filesystems.
        if want.mode != have.st_mode and not stat.S_ISLNK(want.mode):
            return "mode differs", f"{stat.S_IMODE(want.mode):04o}", f"{stat.S_IMODE(have.st_mode):04o}"
        if (want.uid, want.gid) != (have.st_uid, have.st_gid):
            return "owner differs", f"{want.uid}:{want.gid}", f"{have.st_uid}:{have.st_gid}"
        if want.mtime_ns != have.st_mtime_ns:
            return "mtime differs", f"{want.mtime_ns} ns", f"{have.st_mtime_ns} ns"
        if stat.S_ISCHR(want.mode) or stat.S_ISBLK(want.mode):
            numbers = os.major(have.st_rdev), os.minor(have.st_rdev)
            if (want.rdev_major, want.rdev_minor) != numbers:
                return "device differs", f"{want.rdev_major}:{want.rdev_minor}", f"{numbers[0]}:{numbers[1]}"
        if stat.S_ISLNK(want.mode):
            target = os.fsencode(os.readlink(_text(path), dir_fd=self.root_fd))
            if want.target != target:
                return "link target differs", repr(want.target), repr(target)
        return (
            self._xattr_difference(path, want)
            or self._group_difference(want, have)
            or (self._content_difference(path, want, have) if want.sha256 is not None else None)
        )

    def _xattr_difference(self, path: Path, want: Attributes) -> tuple[str, str, str] | None:
        with self._open(path, os.O_PATH) as fd:
            place = f"/proc/self/fd/{fd}"
            names = {os.fsencode(name) for name in os.listxattr(place)}
            names = {name for name in names if name.startswith(_COMPARED_XATTRS)}
            names -= _OF_THE_HOST - want.xattrs.keys()
            expected = {name for name in want.xattrs if name.startswith(_COMPARED_XATTRS)}
            for name in sorted(names | expected):
                value = os.getxattr(place, name) if name in names else None
                if want.xattrs.get(name) != value:
                    label = f"xattr {name.decode('utf-8', 'backslashreplace')} differs"
                    return label, repr(want.xattrs.get(name)), repr(value)
        return None

    def _group_difference(self, want: Attributes, have: os.stat_result) -> tuple[str, str, str] | None:
        if stat.S_ISDIR(want.mode):
            return None
        inode = have.st_dev, have.st_ino
        known_inode = self.groups.setdefault(want.link_group, inode)
        known_group = self.inodes.setdefault(inode, want.link_group)
        if known_inode != inode:
            return "hard link differs", "the same inode as an earlier name", "another one"
        if known_group != want.link_group:
            return "hard link differs", "an inode of its own", "that of an earlier name"
        return None

    def _content_difference(
        self, path: Path, want: Attributes, have: os.stat_result
    ) -> tuple[str, str, str] | None:
        if want.size != have.st_size:
            return "size differs", f"{want.size} bytes", f"{have.st_size} bytes"
        digest = hashlib.sha256()
        with self._open(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
            while data := os.read(fd, _READ_BYTES):
                digest.update(data)
        if want.sha256 != digest.digest():
            return "content differs", f"sha256 {(want.sha256 or b'').hex()}", f"sha256 {digest.hexdigest()}"
        return None

    @contextlib.contextmanager
    def _open(self, path: Path, flags: int) -> Iterator[int]:
        fd = os.open(_text(path), flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.root_fd)
        try:
            yield fd
        finally:
            os.close(fd)


def _text(path: Path) -> bytes:
    return b"/".join(path) or b"."
