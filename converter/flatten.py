"""The reference for what an image must look like: its layers' tars applied one after another to one tree.

Pure. `glowplug check --against-source` compares the result with the mounted image (converter.compare). It
shares with converter.tree how an entry is read and a path followed, but not the mechanism: here whiteouts
delete, and a later layer changes the same tree, while converter.tree makes overlayfs do that.

Where extractors differ, this follows overlayfs: a hard link to a file of a lower layer makes a copy of it
under both names (overlayfs cannot add names to a lower inode), other names that it had keep the old one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping

from converter import budget, rootedpath, tarstream
from converter import node as inodes
from converter.limits import Limits
from converter.node import Node, children_of, refuse
from converter.rootedpath import Path
from converter.tarentry import Entry, Kind

_READ_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Attributes:
    """What a file of the image must be.

    `mode` is the full st_mode, `size` that of regular files (else 0), `sha256` of a regular file's content
    (else None). Names with the same `link_group` are one inode; each other inode has a number of its own.
    """

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    rdev_major: int
    rdev_minor: int
    target: bytes
    xattrs: Mapping[bytes, bytes]
    sha256: bytes | None
    link_group: int


class Flattened:
    """The merged tree of an image."""

    def __init__(self, root: Node, digests: Mapping[Node, bytes]) -> None:
        self._root = root
        self._digests = digests

    def walk(self) -> Iterator[tuple[Path, Attributes]]:
        """Every path with its attributes, ascending: directories before their content, siblings by name."""
        groups: dict[Node, int] = {}
        yield (), self._attributes(self._root, groups.setdefault(self._root, 0))
        names: list[bytes] = []
        levels = [iter(sorted(children_of(self._root).items()))]
        while levels:
            for name, node in levels[-1]:
                yield (*names, name), self._attributes(node, groups.setdefault(node, len(groups)))
                if node.children is not None:
                    names.append(name)
                    levels.append(iter(sorted(node.children.items())))
                    break
            else:
                levels.pop()
                del names[-1:]

    def _attributes(self, node: Node, group: int) -> Attributes:
        digest = self._digests.get(node)
        return Attributes(
            mode=node.mode,
            uid=node.uid,
            gid=node.gid,
            mtime_ns=node.mtime_ns,
            size=node.size if digest is not None else 0,
            rdev_major=node.rdev_major,
            rdev_minor=node.rdev_minor,
            target=node.target,
            xattrs=node.xattrs or {},
            sha256=digest,
            link_group=group,
        )


def flatten(layers: Iterable[tarstream.Source], limits: Limits) -> Flattened:
    """Apply the layers' uncompressed tars, bottom first. InvalidLayerError and LimitError as the reader's."""
    root = Node(inodes.IMPLIED_MODE, children={}, implied=True)
    digests: dict[Node, bytes] = {}
    for source in layers:
        _Layer(root, digests, limits).apply(source)
    return Flattened(root, digests)


class _Layer:
    """Applies one layer's tar to the tree.

    `own` holds the nodes that this layer made, went through or changed: whiteouts spare them, because they
    remove only what was there before the layer. `listed` holds the directories it has entries for.
    """

    def __init__(self, root: Node, digests: dict[Node, bytes], limits: Limits) -> None:
        self._root = root
        self._digests = digests
        self._limits = limits
        self._own: set[Node] = {root}
        self._listed: set[Node] = set()
        self._copied_names: set[tuple[Node, bytes]] = set()
        self._aufs_links: dict[bytes, Node] = {}
        self._budget = budget.Budget(limits)
        self._view = memoryview(bytearray(_READ_BYTES))

    def apply(self, source: tarstream.Source) -> None:
        reader = tarstream.TarReader(source, self._limits)
        for entry in reader:
            node = self._add(entry)
            if node is not None:
                digest = hashlib.sha256()
                while count := reader.readinto(self._view):
                    digest.update(self._view[:count])
                self._digests[node] = digest.digest()

    def _add(self, entry: Entry) -> Node | None:
        """Apply an entry; returns the regular file whose content follows."""
        path = rootedpath.clean(entry.name)
        if inodes.is_aufs_metadata(path):
            if not inodes.is_aufs_link_target(path, entry):
                return None
            node = self._aufs_links[path[1]] = inodes.make_node(entry)
            return node
        if not path:
            if entry.kind is not Kind.DIRECTORY:
                refuse(entry, f"the root directory cannot be a {entry.kind.value}")
            inodes.set_attributes(self._root, inodes.make_node(entry))
            return None
        parent, name = self._directory(path[:-1], entry), path[-1]
        if name == inodes.OPAQUE_MARKER:
            self._remove_older(parent)
        elif name.startswith(inodes.WHITEOUT):
            self._white_out(parent, inodes.removed_name(path, entry))
        elif entry.kind is Kind.HARD_LINK:
            self._put(parent, name, self._link_target(entry), entry)
        else:
            node = inodes.make_node(entry)
            existing = children_of(parent).get(name)
            if node.children is not None and existing is not None and existing.children is not None:
                inodes.set_attributes(existing, node)
                node = existing
            self._put(parent, name, node, entry)
            if node.children is not None:
                self._listed.add(node)
            return node if entry.kind is Kind.FILE else None
        return None

    def _put(self, parent: Node, name: bytes, node: Node, entry: Entry) -> None:
        if len(name) > inodes.MAX_NAME_BYTES:
            refuse(entry, f"a name of {len(name)} bytes, Linux allows {inodes.MAX_NAME_BYTES}")
        self._budget.count_entry(entry)
        self._budget.count_attributes(node.target, node.xattrs, entry)
        children_of(parent)[name] = node
        self._own.add(node)
        self._copied_names.discard((parent, name))

    def _directory(self, path: Path, entry: Entry) -> Node:
        """The directory at `path`, links followed, made where it is missing."""
        node = self._root
        for name in path:
            child = children_of(node).get(name)
            if child is not None and inodes.is_symlink(child):
                return self._directory(inodes.follow(self._root, path, entry), entry)
            if child is not None and child.children is None and self._is_own(node, name, child):
                refuse(entry, f"{rootedpath.show(path)} leads through something that is not a directory")
            if child is None or child.children is None:
                child = Node(inodes.IMPLIED_MODE, children={}, implied=True)
                self._put(node, name, child, entry)
            self._own.add(child)
            node = child
        return node

    def _is_own(self, parent: Node, name: bytes, node: Node) -> bool:
        return node in self._own and (parent, name) not in self._copied_names

    def _white_out(self, parent: Node, name: bytes) -> None:
        existing = children_of(parent).get(name)
        if existing is None:
            return
        if not self._is_own(parent, name, existing):
            del children_of(parent)[name]
        elif existing.children is not None:
            self._cut_off(existing)
            self._remove_older(existing)

    def _remove_older(self, directory: Node) -> None:
        """Remove what lower layers have in a directory."""
        pending = [directory]
        while pending:
            parent = pending.pop()
            names = children_of(parent)
            for name, child in list(names.items()):
                if not self._is_own(parent, name, child):
                    del names[name]
                elif child.children is not None:
                    self._cut_off(child)
                    pending.append(child)

    def _cut_off(self, directory: Node) -> None:
        """The lower layers' directory is gone; what this layer needs of it is a new one."""
        if directory not in self._listed:
            inodes.set_attributes(directory, Node(inodes.IMPLIED_MODE))

    def _link_target(self, entry: Entry) -> Node:
        path = rootedpath.clean(entry.linkname)
        if not path:
            refuse(entry, "a hard link to the root directory")
        if path[0] == inodes.AUFS_LINKS and path[-1] in self._aufs_links:
            return self._aufs_links[path[-1]]
        parent = inodes.find(self._root, inodes.follow(self._root, path[:-1], entry))
        name = path[-1]
        node = parent.children.get(name) if parent is not None and parent.children is not None else None
        if parent is None or node is None:
            refuse(entry, f"a hard link to {rootedpath.show(path)}, which is nowhere")
        if inodes.is_directory(node):
            refuse(entry, f"a hard link to the directory {rootedpath.show(path)}")
        if node in self._own:
            return node
        copy = dataclasses.replace(node)
        if node in self._digests:
            self._digests[copy] = self._digests[node]
        self._put(parent, name, copy, entry)
        self._copied_names.add((parent, name))
        return copy
