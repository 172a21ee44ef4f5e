"""Lower filesystems of a few things, and trees built over them."""

from __future__ import annotations

import dataclasses
import io
import stat
from collections.abc import Iterator

from converter import limits, rootedpath, tarstream, tree
from converter.node import find
from converter.rootedpath import Path
from tests.fixtures.tars import Builder

LIMITS = limits.Limits()


@dataclasses.dataclass(frozen=True)
class Thing:
    """A LowerEntry in memory."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    rdev_major: int = 0
    rdev_minor: int = 0
    target: bytes = b""
    content: bytes = b""
    xattrs: dict[bytes, bytes] | None = None

    @property
    def size(self) -> int:
        return len(self.content)

    def hole_ahead(self, offset: int) -> int:
        return 0

    def read(self, offset: int, length: int) -> bytes:
        return self.content[offset : offset + length]


class Things(dict[str, Thing]):
    """A `Lower` in memory, by path."""

    def lookup(self, path: Path) -> tree.LowerEntry | None:
        return self.get("/" + b"/".join(path).decode())

    def children(self, path: Path) -> Iterator[bytes]:
        for name in self:
            parts = rootedpath.clean(name.encode())
            if parts and parts[:-1] == path:
                yield parts[-1]


def directory(mode: int = 0o755, uid: int = 0, gid: int = 0, mtime_ns: int = 0) -> Thing:
    return Thing(stat.S_IFDIR | mode, uid, gid, mtime_ns)


def file(content: bytes = b"", mode: int = 0o644) -> Thing:
    return Thing(stat.S_IFREG | mode, content=content)


def symlink(target: bytes) -> Thing:
    return Thing(stat.S_IFLNK | 0o777, target=target)


def build(builder: Builder, bounds: limits.Limits = LIMITS) -> tree.LayerTree:
    built = tree.LayerTree(bounds)
    for entry in tarstream.TarReader(io.BytesIO(bytes(builder)), bounds):
        built.add(entry)
    return built


def at(built: tree.LayerTree, path: str) -> tree.Node:
    found = find(built.root, rootedpath.clean(path.encode()))
    assert found is not None, f"{path} is not in the tree"
    return found


def names(built: tree.LayerTree) -> list[str]:
    found = []
    pending: list[tuple[str, tree.Node]] = [("", built.root)]
    while pending:
        path, node = pending.pop()
        for name, child in (node.children or {}).items():
            found.append(f"{path}/{name.decode()}")
            pending.append((found[-1], child))
    return sorted(found)
