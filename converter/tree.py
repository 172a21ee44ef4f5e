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

from converter import budget, rootedpath, settling
from converter.limits import Limits
from converter.mergedlower import Lower, LowerEntry, MergedLower, is_whiteout
from converter.node import (
    AUFS_LINKS,
    IMPLIED_MODE,
    MAX_NAME_BYTES,
    OPAQUE_MARKER,
    WHITEOUT,
    Node,
    children_of,
    copy_attributes,
    cut_off,
    drop,
    follow,
    hidden_below,
    is_aufs_link_target,
    is_aufs_metadata,
    is_directory,
    is_symlink,
    make_node,
    refuse,
    removed_name,
    set_attributes,
)
from converter.rootedpath import Path
from converter.tarentry import Entry, Kind

__all__ = ["Copy", "LayerTree", "Lower", "LowerEntry", "MergedLower", "Node", "is_whiteout"]


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """The data of a lower layer's regular file, to be written into this layer for `node`."""

    node: Node
    entry: LowerEntry


class LayerTree:
    """One layer. `add` every entry in the tar's order, `resolve` once, then read `root`.

    `entries` counts the inodes made, implied directories included; the limits bound them and what they keep.
    """

    def __init__(self, limits: Limits) -> None:
        self.root = Node(IMPLIED_MODE, children={}, implied=True)
        self._budget = budget.Budget(limits)
        self._missing: dict[Node, settling.Missing] = {}
        self._aufs_links: dict[bytes, Node] = {}
        # Tars list a directory's content together: the last parent, by the text before the last slash.
        self._parent_text: bytes | None = None
        self._parent = self.root

    @property
    def entries(self) -> int:
        """The inodes made so far."""
        return self._budget.entries

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
            self._budget.count_attributes(b"", node.xattrs, entry)
            set_attributes(existing, node)
            existing.order = self.entries
        else:
            self._count(node, entry)
            self._replaced(existing)
            node.opaque = node.children is not None
            names[name] = node
        return node if entry.kind is Kind.FILE else None

    def _place(self, entry: Entry) -> tuple[Node, bytes]:
        """The directory an entry belongs into and its name there; an empty name for the root itself."""
        text, _, name = entry.name.rstrip(b"/").rpartition(b"/")
        named = rootedpath.is_name(name)
        if named and text == self._parent_text:
            parent = self._parent
        elif named:
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
                self._replaced(existing)
            children_of(parent)[name] = node
        else:
            cut_off(existing)

    def _add_hard_link(self, parent: Node, name: bytes, entry: Entry) -> None:
        target = self._link_target(entry)
        existing = children_of(parent).get(name)
        if existing is target:
            return
        target.links += 1
        if existing is not None:
            self._replaced(existing)
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
            self._budget.count_path(resolved, entry)
            self._budget.count_attributes(entry.linkname, None, entry)
            # Kept for its name and place; xattrs of a link's own count for nothing.
            self._missing[node] = settling.Missing(parent, resolved, entry._replace(xattrs=None))
        elif is_whiteout(node):
            refuse(entry, f"a hard link to {rootedpath.show(path)}, which this layer removes")
        elif is_directory(node):
            refuse(entry, f"a hard link to the directory {rootedpath.show(path)}")
        return node

    def _count(self, node: Node, entry: Entry) -> None:
        self._budget.count_entry(entry)
        if node.target or node.xattrs:
            self._budget.count_attributes(node.target, node.xattrs, entry)
        node.order = self._budget.entries

    def _replaced(self, node: Node) -> None:
        self._parent_text = None
        drop(node)

    # -- meeting the layers below ------------------------------------------------------------------

    def depends_on_lower(self) -> bool:
        """Whether the layer image depends on the layers below, so that its key is the chain_id."""
        if self.root.opaque or any(node.links > 0 for node in self._missing):
            return True
        return settling.inherits(self.root)

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
            settling.Settling(self.root, lower, self._missing, self._directory).run()
            if self.root.opaque:
                # The marker stood in a directory that is a link to the root below.
                self._hide_all(lower)
            copies = self._copy_up(found)
        settling.write_overlay_marks(self.root)
        return copies

    def _hide_all(self, lower: Lower) -> None:
        """An opaque root: overlayfs knows no such thing, so every name below is hidden by itself."""
        names = children_of(self.root)
        for name in lower.children(()):
            existing = names.get(name)
            if existing is None:
                names[name] = Node(stat.S_IFCHR, order=self.entries)
            else:
                cut_off(existing)
        self.root.opaque = False

    def _look_up_missing(self, lower: Lower) -> dict[Node, LowerEntry]:
        """The link targets that lower layers have, looked up while the tree's paths are still the tar's."""
        links = settling.CombinedLinks(self.root, lower)
        found = {}
        for node, missing in self._missing.items():
            if node.links <= 0:
                continue
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
            copy_attributes(node, below)
            node.size, node.target = below.size, below.target
            node.rdev_major, node.rdev_minor = below.rdev_major, below.rdev_minor
            if stat.S_ISREG(below.mode):
                copies.append(Copy(node, below))
        return copies
