"""Where a layer's tree meets the layers below it: what is inherited, moved, and marked for overlayfs.

Pure; the second half of converter.tree, which calls it once a layer, after the last entry.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Callable

from converter import errors, rootedpath
from converter.mergedlower import OPAQUE_XATTR, ORIGIN_XATTR, Lower, is_whiteout
from converter.node import (
    Node,
    children_of,
    copy_attributes,
    cut_off,
    drop,
    find,
    hidden_below,
    is_symlink,
    refuse,
    set_attributes,
)
from converter.rootedpath import Path
from converter.tarentry import Entry, Kind


@dataclasses.dataclass(frozen=True, slots=True)
class Missing:
    """A hard link whose target this tar lacks. The Node stands for the target, under both names."""

    parent: Node
    path: Path
    entry: Entry


def inherits(root: Node) -> bool:
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


@dataclasses.dataclass(frozen=True, slots=True)
class CombinedLinks:
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


class Settling:
    """Gives implied directories what the lower layers have at their place."""

    def __init__(
        self,
        root: Node,
        lower: Lower,
        missing: dict[Node, Missing],
        make_directory: Callable[[Path, Entry], Node],
    ) -> None:
        self._root = root
        self._lower = lower
        self._missing = missing
        self._make_directory = make_directory
        self._links = CombinedLinks(root, lower)
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
                        copy_attributes(node, below)
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
        self._merge(node, self._make_directory(place, entry))

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
                    missing = self._missing[child]
                    self._missing[child] = dataclasses.replace(missing, parent=into)
                names[name] = child if existing is None else self._winner(child, existing, into, name)

    def _stands_in(self, node: Node, parent: Node, name: bytes) -> bool:
        """Whether the name is that of a hard link's missing target (and not the link's own)."""
        missing = self._missing.get(node)
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
                entry = self._missing[one].entry
                refuse(
                    entry, f"a hard link to the directory {rootedpath.show(rootedpath.clean(entry.linkname))}"
                )
            self._aliases[one] = other
            return other
        drop(other)
        cut_off(one)
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


def write_overlay_marks(root: Node) -> None:
    """Write opaque directories as overlayfs wants them, without the whiteouts in them, which hide nothing.

    A directory that only one layer has is listed as it is, whiteouts and all, unless it says that it was
    copied up (`origin`; empty: from nobody knows where): then overlayfs leaves them out, as in a merged one.
    Whether a layer below has the directory is not this layer's to know, so each with a whiteout says so.
    """
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
        elif node is not root and any(is_whiteout(child) for child in names.values()):
            node.xattrs = {**(node.xattrs or {}), ORIGIN_XATTR: b""}
        pending.extend((child, hidden) for child in names.values() if child.children is not None)
