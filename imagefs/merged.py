"""One view over stacked layer images, by the rules of overlayfs. Pure over the layers' readers.

Used by the file-level mount (fuse/files.py). The rules, for a name looked up through a directory that exists
in several layers, topmost first:

* a 0/0 character device is a whiteout: the name does not exist, whatever lies below;
* anything but a directory hides all below it;
* directories merge, down to one that is opaque (trusted.overlay.opaque = "y") or a layer where the name is
  not a directory; the topmost one's attributes show;
* hard links keep one inode number: that of the layer's inode, marked with the layer's number.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Iterator, Sequence

from imagefs.erofs import Inode, Reader, ondisk

_OPAQUE = b"trusted.overlay.opaque"
_PRIVATE = b"trusted.overlay."
_LAYER_SHIFT = 48


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One file of the merged view. `stack` holds (layer number, inode), topmost first; more than one only for
    a directory that is merged. `attributes` is the entry whose attributes show."""

    stack: tuple[tuple[int, Inode], ...]
    attributes: tuple[int, Inode]

    @property
    def inode(self) -> Inode:
        """The inode whose attributes show."""
        return self.attributes[1]

    @property
    def number(self) -> int:
        """Inode number, unique in the view."""
        layer, inode = self.attributes
        return _number(layer, inode.nid)


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """A name in a directory: its file type (ondisk.FILE_TYPES) and inode number."""

    name: bytes
    file_type: int
    number: int


class MergedView:
    """Layers bottom first; `root_implied[n]`: layer n's root directory has no attributes of its own."""

    def __init__(self, readers: Sequence[Reader], root_implied: Sequence[bool]) -> None:
        self._readers = readers
        stack = []
        for layer in reversed(range(len(readers))):
            root = readers[layer].root()
            stack.append((layer, root))
            if self._opaque(layer, root):
                break
        named = [entry for entry in stack if not root_implied[entry[0]]]
        self._root = Node(tuple(stack), named[0] if named else stack[0])
        self.root_is_implied = not named

    @property
    def root(self) -> Node:
        """The root directory."""
        return self._root

    def lookup(self, directory: Node, name: bytes) -> Node | None:
        """The file called `name`, or None."""
        found: list[tuple[int, Inode]] = []
        for layer, parent in directory.stack:
            reader = self._readers[layer]
            inode = reader.lookup(parent, name)
            if inode is None:
                continue
            if not stat.S_ISDIR(inode.mode):
                if not found and not _whiteout(inode):
                    found.append((layer, inode))
                break
            found.append((layer, inode))
            if self._opaque(layer, inode):
                break
        return Node(tuple(found), found[0]) if found else None

    def readdir(self, directory: Node) -> Iterator[Name]:
        """The names in a directory, without . and .."""
        seen: set[bytes] = set()
        device = ondisk.FILE_TYPES[stat.S_IFCHR]
        for layer, parent in directory.stack:
            reader = self._readers[layer]
            for entry in reader.readdir(parent):
                if entry.name in seen:
                    continue
                seen.add(entry.name)
                if entry.file_type != device or not _whiteout(reader.inode(entry.nid)):
                    yield Name(entry.name, entry.file_type, _number(layer, entry.nid))

    def read(self, file: Node, offset: int, length: int) -> bytes:
        """Bytes of a regular file, short at its end."""
        layer, inode = file.attributes
        return self._readers[layer].read(inode, offset, length)

    def readlink(self, link: Node) -> bytes:
        """Target of a symlink."""
        layer, inode = link.attributes
        return self._readers[layer].readlink(inode)

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        """Extended attributes, without overlayfs's own."""
        layer, inode = node.attributes
        found = self._readers[layer].xattrs(inode)
        return {name: value for name, value in found.items() if not name.startswith(_PRIVATE)}

    def _opaque(self, layer: int, inode: Inode) -> bool:
        return self._readers[layer].xattrs(inode).get(_OPAQUE) == b"y"


def _number(layer: int, nid: int) -> int:
    return (layer + 1) << _LAYER_SHIFT | nid


def _whiteout(inode: Inode) -> bool:
    return stat.S_ISCHR(inode.mode) and inode.rdev_major == 0 and inode.rdev_minor == 0
