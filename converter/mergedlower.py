"""What lies below a layer: the merged view of the layers under it, as overlayfs would show them.

Pure: the single layers come as objects with `lookup` and `children` (converter.lower reads them from finished
layer images). Used by converter.tree, which re-exports the names; one thread.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from converter.rootedpath import Path

OVERLAY_PREFIX = b"trusted.overlay."
OPAQUE_XATTR = b"trusted.overlay.opaque"
ORIGIN_XATTR = b"trusted.overlay.origin"


class _Device(Protocol):
    @property
    def mode(self) -> int: ...
    @property
    def rdev_major(self) -> int: ...
    @property
    def rdev_minor(self) -> int: ...


class LowerEntry(Protocol):
    """One inode of a lower layer. `mode` is the full st_mode, `target` a symbolic link's, else empty."""

    @property
    def mode(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def rdev_major(self) -> int: ...
    @property
    def rdev_minor(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def target(self) -> bytes: ...
    @property
    def xattrs(self) -> Mapping[bytes, bytes] | None: ...

    def hole_ahead(self, offset: int) -> int:
        """Bytes from `offset` of a regular file's content, up to its end, that are known to be zero without
        reading them; 0 where that is not known."""

    def read(self, offset: int, length: int) -> bytes:
        """A regular file's bytes from `offset`; fewer than `length` only at its end."""


class Lower(Protocol):
    """A directory tree by path. Paths are names from the root; symbolic links are not followed."""

    def lookup(self, path: Path) -> LowerEntry | None:
        """What is at `path`; None if nothing is, or a parent is not a directory. The root is ()."""

    def children(self, path: Path) -> Iterable[bytes]:
        """The names in the directory at `path`, in any order; none if it is not a directory."""


def is_whiteout(entry: _Device) -> bool:
    """Whether overlayfs takes the entry for a whiteout: a character device 0/0."""
    return stat.S_ISCHR(entry.mode) and not entry.rdev_major and not entry.rdev_minor


class MergedLower:
    """A `Lower` of several layers, each itself given as a `Lower`, the topmost first.

    Whiteouts hide, opaque directories and non-directories end the search, as in overlayfs.
    """

    def __init__(self, layers: Sequence[Lower]) -> None:
        # The last directory asked for and, from the root down to it, the layers that share in each: a tree is
        # asked for in its order, and a cache of all paths would not be bounded.
        self._names: list[bytes] = []
        self._sharing: list[tuple[Lower, ...]] = [tuple(layers)]

    def lookup(self, path: Path) -> LowerEntry | None:
        if not path:
            return next((root for layer in self._sharing[0] if (root := layer.lookup(()))), None)
        return _search(self._layers(path[:-1]), path)[0]

    def children(self, path: Path) -> Iterable[bytes]:
        layers = self._layers(path)
        names = {name for layer in layers for name in layer.children(path)}
        return sorted(name for name in names if _search(layers, (*path, name))[0] is not None)

    def _layers(self, path: Path) -> tuple[Lower, ...]:
        """The layers whose directories at `path` make up the merged one."""
        common = 0
        while common < min(len(path), len(self._names)) and path[common] == self._names[common]:
            common += 1
        del self._names[common:], self._sharing[common + 1 :]
        for name in path[common:]:
            self._names.append(name)
            self._sharing.append(_search(self._sharing[-1], tuple(self._names))[1])
        return self._sharing[-1]


def _search(layers: tuple[Lower, ...], path: Path) -> tuple[LowerEntry | None, tuple[Lower, ...]]:
    """What is at `path` in the layers that share in its parent, and those sharing in it as a directory."""
    first: LowerEntry | None = None
    sharing: list[Lower] = []
    for layer in layers:
        entry = layer.lookup(path)
        if entry is None:
            continue
        if not stat.S_ISDIR(entry.mode):
            if first is None and not is_whiteout(entry):
                first = entry
            break
        first = first or entry
        sharing.append(layer)
        if (entry.xattrs or {}).get(OPAQUE_XATTR) == b"y":
            break
    return first, tuple(sharing)
