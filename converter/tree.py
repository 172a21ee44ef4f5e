"""The tree of one layer, built entry by entry from its tar, in overlayfs' terms.

Pure. The pipeline calls `LayerTree.add` for every entry of a tar, then `resolve` once, then gives `root` to
the EROFS writer; one thread. The result, mounted by overlayfs over the layers below, equals what extracting
the layers one after another gives:

* `.wh.NAME` becomes a whiteout (character device 0/0), `.wh..wh..opq` an opaque directory. Both act on the
  layers below only, wherever they stand in the tar (OCI image spec, "Whiteouts").
* A directory that took the place of anything else within the tar, or that the tar also whites out, is opaque:
  what lies below at its name must not shine through.
* Directories that the tar left out are implied; overlayfs shows the topmost directory's attributes, so
  `resolve` copies them from below. An implied directory that is a symbolic link below has its content moved
  to where the link leads. Hard links to files of lower layers are copied up, as overlayfs does.

A Node in `children` is alive; one that was replaced has `links` 0 and its data in the image is dead.
"""

from __future__ import annotations

import dataclasses
import stat
from typing import NoReturn

from converter import errors, rootedpath, tarstream
from converter.limits import Limits
from converter.mergedlower import OPAQUE_XATTR, OVERLAY_PREFIX, Lower, LowerEntry, MergedLower, is_whiteout
from converter.rootedpath import Path
from converter.tarstream import Entry, Kind

__all__ = ["Copy", "LayerTree", "Lower", "LowerEntry", "MergedLower", "Node", "is_whiteout", "make_node"]

WHITEOUT = b".wh."
WHITEOUT_META = b".wh..wh."
OPAQUE_MARKER = b".wh..wh..opq"
AUFS_LINKS = b".wh..wh.plnk"
IMPLIED_MODE = stat.S_IFDIR | 0o755
MAX_NAME_BYTES = 255
MAX_TARGET_BYTES = 4095

_FORMATS = {
    Kind.FILE: stat.S_IFREG,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHARACTER: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.FIFO: stat.S_IFIFO,
}
_FORMAT_MASK = 0o170000
_ACL_XATTRS = (b"system.posix_acl_access", b"system.posix_acl_default")


@dataclasses.dataclass(slots=True, eq=False)
class Node:
    """One inode. Hard links are several names for the same Node.

    `mode` is the full st_mode. `data_start` is the byte offset of the file's data in the layer image
    (multiple of 4096) for its first `size - len(tail)` bytes, -1 when all of it is in `tail`; `tail` is kept
    inline beside the inode. `implied` marks a directory that the tar did not list itself, `opaque` one that
    hides what lies below it. `order` counts up over the tar: which of two came later.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    rdev_major: int = 0
    rdev_minor: int = 0
    size: int = 0
    data_start: int = -1
    tail: bytes = b""
    target: bytes = b""
    xattrs: dict[bytes, bytes] | None = None
    children: dict[bytes, Node] | None = None
    links: int = 1
    implied: bool = False
    opaque: bool = False
    order: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """The data of a lower layer's regular file, to be written into this layer for `node`."""

    node: Node
    entry: LowerEntry


@dataclasses.dataclass(frozen=True, slots=True)
class _Missing:
    """A hard link whose target this tar lacks. The Node stands for the target, under both names."""

    parent: Node
    path: Path
    entry: Entry


def make_node(entry: Entry) -> Node:
    """The inode of an entry that is not a hard link. InvalidLayerError for what a layer may not hold."""
    kind = entry.kind
    if kind is Kind.CHARACTER and not entry.rdev_major and not entry.rdev_minor:
        refuse(entry, "a character device 0/0, which overlayfs takes for a whiteout")
    if kind is Kind.SYMLINK and not 0 < len(entry.linkname) <= MAX_TARGET_BYTES:
        refuse(
            entry, f"a symbolic link's target has 1 to {MAX_TARGET_BYTES} bytes, not {len(entry.linkname)}"
        )
    return Node(
        _FORMATS[kind] | entry.mode,
        entry.uid,
        entry.gid,
        entry.mtime_ns,
        entry.rdev_major,
        entry.rdev_minor,
        len(entry.linkname) if kind is Kind.SYMLINK else entry.size,
        target=entry.linkname if kind is Kind.SYMLINK else b"",
        xattrs=_kept_xattrs(entry) if entry.xattrs else None,
        children={} if kind is Kind.DIRECTORY else None,
    )


def _kept_xattrs(entry: Entry) -> dict[bytes, bytes] | None:
    """Those that Linux would store on such a file. The others (a Mac's, say) every extractor drops, too."""
    kept = {}
    for name, value in (entry.xattrs or {}).items():
        if name.startswith(OVERLAY_PREFIX):
            refuse(entry, f"xattr {name.decode('utf-8', 'backslashreplace')}, which belongs to overlayfs")
        if name in _ACL_XATTRS:
            keep = entry.kind is Kind.DIRECTORY or (entry.kind is not Kind.SYMLINK and name == _ACL_XATTRS[0])
        elif name.startswith(b"user."):
            keep = entry.kind in (Kind.FILE, Kind.DIRECTORY)
        else:
            keep = name.startswith((b"security.", b"trusted."))
        if keep:
            kept[name] = value
    return kept or None


def refuse(entry: Entry, problem: str) -> NoReturn:
    """Raise InvalidLayerError for an entry."""
    raise errors.InvalidLayerError(f"{tarstream.describe(entry.name, entry.offset)}: {problem}")


def is_aufs_metadata(path: Path) -> bool:
    """Whether the path lies in what AUFS keeps for itself in a layer's root."""
    return bool(path) and path[0].startswith(WHITEOUT_META) and path[0] != OPAQUE_MARKER


def is_aufs_link_target(path: Path, entry: Entry) -> bool:
    """Of AUFS' metadata, which makes nothing itself, whether hard links may point at this entry."""
    return path[0] == AUFS_LINKS and len(path) == 2 and entry.kind is Kind.FILE


def removed_name(path: Path, entry: Entry) -> bytes:
    """What a whiteout, other than the opaque marker, removes."""
    name = path[-1][len(WHITEOUT) :]
    if not rootedpath.is_name(name):
        refuse(entry, "a whiteout that names nothing")
    return name


def is_directory(node: Node) -> bool:
    """Whether the node is a directory."""
    return node.children is not None


def is_symlink(node: Node) -> bool:
    """Whether the node is a symbolic link."""
    return node.mode & _FORMAT_MASK == stat.S_IFLNK


def children_of(node: Node) -> dict[bytes, Node]:
    """The names in a directory."""
    assert node.children is not None
    return node.children


def find(root: Node, path: Path) -> Node | None:
    """The node at a path, no links followed."""
    node: Node | None = root
    for name in path:
        if node is None or node.children is None:
            return None
        node = node.children.get(name)
    return node


def follow(root: Node, path: Path, entry: Entry) -> Path:
    """The path with all of the tree's links followed; InvalidLayerError, naming the entry, for too many."""
    place: Node | None = root
    try:
        return rootedpath.follow(path, place, _enter)
    except rootedpath.LoopError as exc:
        refuse(entry, str(exc))


def _enter(parent: Node | None, name: bytes) -> tuple[Node | None, bytes | None]:
    node = parent.children.get(name) if parent is not None and parent.children is not None else None
    return node, node.target if node is not None and is_symlink(node) else None


def set_attributes(node: Node, source: Node) -> None:
    """Give a directory the attributes of a later entry of the same name."""
    node.mode, node.uid, node.gid = source.mode, source.uid, source.gid
    node.mtime_ns, node.xattrs = source.mtime_ns, source.xattrs
    node.implied = False


class LayerTree:
    """One layer. `add` every entry in the tar's order, `resolve` once, then read `root`.

    `entries` counts the inodes made, implied directories included; Limits.max_entries bounds it.
    """

    def __init__(self, limits: Limits) -> None:
        self.root = Node(IMPLIED_MODE, children={}, implied=True)
        self.entries = 0
        self._limits = limits
        self._missing: dict[Node, _Missing] = {}
        self._aufs_links: dict[bytes, Node] = {}
        # Tars list a directory's content together: the last parent, by the text before the last slash.
        self._parent_text: bytes | None = None
        self._parent = self.root

    @property
    def root_implied(self) -> bool:
        """Whether the tar had no entry for its root."""
        return self.root.implied

    # -- building ----------------------------------------------------------------------------------

    def add(self, entry: Entry) -> Node | None:
        """Put an entry into the tree. Returns the Node whose data must now be written, None if there is none.

        Raises InvalidLayerError and LimitError, naming the entry and its byte offset in the tar.
        """
        if WHITEOUT in entry.name:
            path = rootedpath.clean(entry.name)
            if is_aufs_metadata(path):
                return self._add_aufs_metadata(path, entry)
            if path and path[-1].startswith(WHITEOUT):
                self._add_whiteout(path, entry)
                return None
        parent, name = self._place(entry)
        if not name:
            if entry.kind is not Kind.DIRECTORY:
                refuse(entry, f"the root directory cannot be a {entry.kind.value}")
            set_attributes(self.root, make_node(entry))
            return None
        if entry.kind is Kind.HARD_LINK:
            self._add_hard_link(parent, name, entry)
            return None
        node = make_node(entry)
        names = children_of(parent)
        existing = names.get(name)
        if existing is None:
            self._count(node, entry)
            names[name] = node
        elif node.children is not None and existing.children is not None:
            set_attributes(existing, node)
            existing.order = self.entries
        else:
            self._count(node, entry)
            self._drop(existing)
            node.opaque = node.children is not None
            names[name] = node
        return node if entry.kind is Kind.FILE else None

    def _place(self, entry: Entry) -> tuple[Node, bytes]:
        """The directory an entry belongs into and its name there; an empty name for the root itself."""
        text, _, name = entry.name.rstrip(b"/").rpartition(b"/")
        if text == self._parent_text and rootedpath.is_name(name):
            parent = self._parent
        elif rootedpath.is_name(name):
            parent = self._directory(rootedpath.clean(text), entry)
            self._parent_text, self._parent = text, parent
        else:
            path = rootedpath.clean(entry.name)
            if not path:
                return self.root, b""
            parent, name = self._directory(path[:-1], entry), path[-1]
        if len(name) > MAX_NAME_BYTES:
            refuse(entry, f"a name of {len(name)} bytes, Linux allows {MAX_NAME_BYTES}")
        return parent, name

    def _directory(self, path: Path, entry: Entry, *, create_over_whiteout: bool = True) -> Node:
        """The directory at `path`, links of this layer followed, made where it is missing."""
        node = self.root
        for name in path:
            child = children_of(node).get(name)
            if child is None or (create_over_whiteout and is_whiteout(child)):
                if len(name) > MAX_NAME_BYTES:
                    refuse(entry, f"a name of {len(name)} bytes, Linux allows {MAX_NAME_BYTES}")
                removed = child is not None
                child = Node(IMPLIED_MODE, children={}, implied=not removed, opaque=removed)
                self._count(child, entry)
                children_of(node)[name] = child
            elif child.children is None:
                if is_symlink(child):
                    path = follow(self.root, path, entry)
                    return self._directory(path, entry, create_over_whiteout=create_over_whiteout)
                refuse(entry, f"{rootedpath.show(path)} leads through something that is not a directory")
            node = child
        return node

    def _add_aufs_metadata(self, path: Path, entry: Entry) -> Node | None:
        if not is_aufs_link_target(path, entry):
            return None
        node = make_node(entry)
        self._count(node, entry)
        node.links = 0
        self._aufs_links[path[1]] = node
        return node

    def _add_whiteout(self, path: Path, entry: Entry) -> None:
        parent = self._directory(path[:-1], entry)
        if path[-1] == OPAQUE_MARKER:
            parent.opaque = True
            return
        name = removed_name(path, entry)
        existing = children_of(parent).get(name)
        missing = self._missing.get(existing) if existing is not None else None
        if existing is None or (missing and missing.parent is parent and missing.path[-1] == name):
            # Nothing of this tar's own stands there; a missing link target is the layers' below.
            node = Node(stat.S_IFCHR)
            self._count(node, entry)
            if existing is not None:
                self._drop(existing)
            children_of(parent)[name] = node
        else:
            _cut_off(existing)

    def _add_hard_link(self, parent: Node, name: bytes, entry: Entry) -> None:
        target = self._link_target(entry)
        existing = children_of(parent).get(name)
        if existing is target:
            return
        target.links += 1
        if existing is not None:
            self._drop(existing)
        children_of(parent)[name] = target

    def _link_target(self, entry: Entry) -> Node:
        path = rootedpath.clean(entry.linkname)
        if not path:
            refuse(entry, "a hard link to the root directory")
        if path[0] == AUFS_LINKS and path[-1] in self._aufs_links:
            return self._aufs_links[path[-1]]
        parent = self._directory(path[:-1], entry, create_over_whiteout=False)
        node = children_of(parent).get(path[-1])
        if node is None:
            node = Node(stat.S_IFREG)
            self._count(node, entry)
            children_of(parent)[path[-1]] = node
            resolved = (*follow(self.root, path[:-1], entry), path[-1])
            self._missing[node] = _Missing(parent, resolved, entry)
        elif is_whiteout(node):
            refuse(entry, f"a hard link to {rootedpath.show(path)}, which this layer removes")
        elif is_directory(node):
            refuse(entry, f"a hard link to the directory {rootedpath.show(path)}")
        return node

    def _count(self, node: Node, entry: Entry) -> None:
        self.entries += 1
        node.order = self.entries
        if self.entries > self._limits.max_entries:
            raise errors.LimitError(
                f"{tarstream.describe(entry.name, entry.offset)}: {self.entries} entries, implied directories"
                f" included, the limit is {self._limits.max_entries} (--max-entries)"
            )

    def _drop(self, node: Node) -> None:
        """Take a name away from a node, and from everything below it."""
        self._parent_text = None
        pending = [node]
        while pending:
            node = pending.pop()
            node.links -= 1
            if node.children is not None:
                pending.extend(node.children.values())

    # -- meeting the layers below ------------------------------------------------------------------

    def depends_on_lower(self) -> bool:
        """Whether the layer image depends on the layers below, so that its key is the chain_id."""
        if self.root.opaque or any(node.links > 0 for node in self._missing):
            return True
        return _inherits(self.root)

    def resolve(self, lower: Lower | None) -> list[Copy]:
        """Settle what depends on the layers below (None: there are none); call it once, after the last `add`.

        Returns the file data to be copied into this layer. InvalidLayerError for a hard link to nothing.
        """
        copies: list[Copy] = []
        if lower is None or self.root.opaque:
            for node, missing in self._missing.items():
                if node.links > 0:
                    refuse(missing.entry, f"a hard link to {rootedpath.show(missing.path)}, which is nowhere")
        if lower is not None:
            if self.root.opaque:
                self._hide_all(lower)
            found = self._look_up_missing(lower)
            _Settling(self, lower).run()
            if self.root.opaque:
                # The marker stood in a directory that is a link to the root below.
                self._hide_all(lower)
            copies = self._copy_up(found)
        _write_overlay_marks(self.root)
        return copies

    def _hide_all(self, lower: Lower) -> None:
        """An opaque root: overlayfs knows no such thing, so every name below is hidden by itself."""
        names = children_of(self.root)
        for name in lower.children(()):
            existing = names.get(name)
            if existing is None:
                self.entries += 1
                names[name] = Node(stat.S_IFCHR, order=self.entries)
            else:
                _cut_off(existing)
        self.root.opaque = False

    def _look_up_missing(self, lower: Lower) -> dict[Node, LowerEntry]:
        """The link targets that lower layers have, looked up while the tree's paths are still the tar's."""
        links = _CombinedLinks(self.root, lower)
        found = {}
        for node, missing in self._missing.items():
            path = (*links.follow(missing.path[:-1], missing.entry), missing.path[-1])
            below = None if hidden_below(self.root, path) else lower.lookup(path)
            if below is not None:
                found[node] = below
        return found

    def _copy_up(self, found: dict[Node, LowerEntry]) -> list[Copy]:
        copies = []
        for node, missing in self._missing.items():
            if node.links <= 0:
                continue
            below = found.get(node)
            if below is None:
                refuse(missing.entry, f"a hard link to {rootedpath.show(missing.path)}, which is in no layer")
            if stat.S_ISDIR(below.mode):
                refuse(missing.entry, f"a hard link to the directory {rootedpath.show(missing.path)}")
            _copy_attributes(node, below)
            node.size, node.target = below.size, below.target
            node.rdev_major, node.rdev_minor = below.rdev_major, below.rdev_minor
            if stat.S_ISREG(below.mode):
                copies.append(Copy(node, below))
        return copies


def _cut_off(node: Node) -> None:
    """The thing below at a node's name is removed: nothing of it shines through, nothing is inherited."""
    if node.children is not None:
        node.opaque = True
        node.implied = False


def _copy_attributes(node: Node, source: LowerEntry) -> None:
    node.mode, node.uid, node.gid, node.mtime_ns = source.mode, source.uid, source.gid, source.mtime_ns
    kept = {
        name: value for name, value in (source.xattrs or {}).items() if not name.startswith(OVERLAY_PREFIX)
    }
    node.xattrs = kept or None


def _inherits(root: Node) -> bool:
    """Whether a directory below the root takes its attributes from the layers below."""
    pending = [root]
    while pending:
        node = pending.pop()
        if node.opaque:
            continue
        for child in children_of(node).values():
            if child.implied:
                return True
            if child.children is not None:
                pending.append(child)
    return False


def hidden_below(root: Node, path: Path) -> bool:
    """Whether this layer's directories on the way hide what the lower layers have at `path`."""
    node: Node | None = root
    for name in path:
        if node is None:
            return False
        if node.opaque or node.children is None:
            return True
        node = node.children.get(name)
    return False


@dataclasses.dataclass(frozen=True, slots=True)
class _CombinedLinks:
    """Symbolic links as seen in this layer laid over the lower ones."""

    root: Node
    lower: Lower

    def follow(self, path: Path, entry: Entry) -> Path:
        """The path with all links followed; InvalidLayerError for too many."""
        try:
            root: Path = ()
            return rootedpath.follow(path, root, self._enter)
        except rootedpath.LoopError as exc:
            refuse(entry, str(exc))

    def _enter(self, parent: Path, name: bytes) -> tuple[Path, bytes | None]:
        path = (*parent, name)
        node = find(self.root, path)
        if node is not None and not node.implied:
            return path, node.target if is_symlink(node) else None
        below = None if hidden_below(self.root, path) else self.lower.lookup(path)
        return path, below.target if below is not None and stat.S_ISLNK(below.mode) else None


class _Settling:
    """Gives implied directories what the lower layers have at their place."""

    def __init__(self, tree: LayerTree, lower: Lower) -> None:
        self._tree = tree
        self._root = tree.root
        self._lower = lower
        self._links = _CombinedLinks(tree.root, lower)
        self._aliases: dict[Node, Node] = {}

    def run(self) -> None:
        settled: set[Node] = set()
        for _ in range(rootedpath.MAX_LINKS):
            moves = self._settle(settled)
            if not moves:
                self._replace_aliases()
                return
            for path in moves:
                self._move(path)
        raise errors.InvalidLayerError(
            f"{rootedpath.show(moves[0])}: too many symbolic links in lower layers"
        )

    def _settle(self, settled: set[Node]) -> list[Path]:
        """Give implied directories the attributes they have below; returns those that are links there."""
        moves: list[Path] = []
        names: list[bytes] = []
        # One iterator a level, rather than a path for every directory: a path may have 2,000 names.
        levels = [] if self._root.opaque else [iter(children_of(self._root).items())]
        while levels:
            for name, node in levels[-1]:
                if node.children is None:
                    continue
                if node.implied and node not in settled:
                    path = (*names, name)
                    below = self._lower.lookup(path)
                    if below is not None and stat.S_ISLNK(below.mode):
                        moves.append(path)
                        continue
                    settled.add(node)
                    if below is not None and stat.S_ISDIR(below.mode):
                        _copy_attributes(node, below)
                if not node.opaque:
                    names.append(name)
                    levels.append(iter(node.children.items()))
                    break
            else:
                levels.pop()
                del names[-1:]
        return moves

    def _move(self, path: Path) -> None:
        """Move an implied directory's content to where the link at its path below leads."""
        parent = find(self._root, path[:-1])
        node = children_of(parent).pop(path[-1], None) if parent is not None and parent.children else None
        if node is None or node.children is None:
            return  # an earlier move of this round took its parent along
        # For messages only: what stands here is no single entry.
        entry = Entry(b"/".join(path), Kind.DIRECTORY, 0, 0, 0, 0, 0, b"", 0, 0, None, None, 0)
        place = self._links.follow(path, entry)
        below = None if hidden_below(self._root, place) else self._lower.lookup(place)
        if find(self._root, place) is None and below is not None and not stat.S_ISDIR(below.mode):
            refuse(entry, f"is a link to {rootedpath.show(place)} in a lower layer, which is not a directory")
        self._merge(node, self._tree._directory(place, entry))

    def _merge(self, source: Node, into: Node) -> None:
        pending = [(source, into)]
        while pending:
            source, into = pending.pop()
            into.opaque |= source.opaque
            if not source.implied and (into.implied or source.order > into.order):
                set_attributes(into, source)
            names = children_of(into)
            for name, child in children_of(source).items():
                existing = names.get(name)
                if existing is not None and child.children is not None and existing.children is not None:
                    pending.append((child, existing))
                    continue
                if self._stands_in(child, source, name):
                    missing = self._tree._missing[child]
                    self._tree._missing[child] = dataclasses.replace(missing, parent=into)
                names[name] = child if existing is None else self._winner(child, existing, into, name)

    def _stands_in(self, node: Node, parent: Node, name: bytes) -> bool:
        """Whether the name is that of a hard link's missing target (and not the link's own)."""
        missing = self._tree._missing.get(node)
        return missing is not None and missing.parent is parent and missing.path[-1] == name

    def _winner(self, one: Node, other: Node, parent: Node, name: bytes) -> Node:
        """Which of two nodes of one layer has their common name: the later, and any before a whiteout."""
        if one is other:
            one.links -= 1
            return one
        if is_whiteout(one) or (not is_whiteout(other) and other.order > one.order):
            one, other = other, one
        if self._stands_in(one, parent, name) and not is_whiteout(other):
            # The link's target was in this tar all along, under its other path.
            if other.children is not None:
                entry = self._tree._missing[one].entry
                refuse(
                    entry, f"a hard link to the directory {rootedpath.show(rootedpath.clean(entry.linkname))}"
                )
            self._aliases[one] = other
            return other
        self._tree._drop(other)
        _cut_off(one)
        return one

    def _replace_aliases(self) -> None:
        """Give the names of a stand-in for a link's target to the target itself."""
        if not self._aliases:
            return
        pending = [self._root]
        while pending:
            names = children_of(pending.pop())
            for name, child in names.items():
                if child in self._aliases:
                    names[name] = self._aliases[child]
                elif child.children is not None:
                    pending.append(child)
        for stand_in, target in self._aliases.items():
            target.links += stand_in.links - 1
            stand_in.links = 0


def _write_overlay_marks(root: Node) -> None:
    """Write opaque directories as overlayfs wants them, without the whiteouts in them, which hide nothing and
    would be seen."""
    pending = [(root, False)]
    while pending:
        node, hidden = pending.pop()
        names = children_of(node)
        if node.opaque and not hidden and node is not root:
            node.xattrs = {**(node.xattrs or {}), OPAQUE_XATTR: b"y"}
        hidden = hidden or node.opaque
        if hidden:
            for name in [name for name, child in names.items() if is_whiteout(child)]:
                del names[name]
        pending.extend((child, hidden) for child in names.values() if child.children is not None)
