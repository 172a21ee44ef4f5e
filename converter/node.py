"""The inodes of an image's tree, and what an entry of a tar makes of one.

Pure; shared by converter.tree (one layer), converter.settling, converter.flatten (all layers) and the EROFS
writer. What no layer may hold is refused here.
"""

from __future__ import annotations

import dataclasses
import stat
from typing import NoReturn

from converter import errors, rootedpath, tarentry
from converter.mergedlower import OVERLAY_PREFIX, LowerEntry
from converter.rootedpath import Path
from converter.tarentry import Entry, Kind

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

    `mode` is the full st_mode. `data_start` is the byte offset of the file's data from where the layer
    image's file data begins (multiple of 4096) for its first `size - len(tail)` bytes, -1 when all of it is
    in `tail`; `tail` is kept inline beside the inode. `implied` marks a directory that the tar did not list
    itself, `opaque` one that hides what lies below it. `order` counts up over the tar: which of two came
    later.
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


def make_node(entry: Entry) -> Node:
    """The inode of an entry that is not a hard link. InvalidLayerError for what a layer may not hold."""
    _, kind, mode, uid, gid, mtime_ns, size, linkname, rdev_major, rdev_minor, xattrs, _, _ = entry
    if kind is Kind.CHARACTER and not rdev_major and not rdev_minor:
        refuse(entry, "a character device 0/0, which overlayfs takes for a whiteout")
    target = b""
    if kind is Kind.SYMLINK:
        size, target = len(linkname), linkname
        if not 0 < size <= MAX_TARGET_BYTES:
            refuse(entry, f"a symbolic link's target has 1 to {MAX_TARGET_BYTES} bytes, not {size}")
    return Node(
        _FORMATS[kind] | mode,
        uid,
        gid,
        mtime_ns,
        rdev_major,
        rdev_minor,
        size,
        target=target,
        xattrs=_kept_xattrs(entry) if xattrs else None,
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
    raise errors.InvalidLayerError(f"{tarentry.describe(entry.name, entry.offset)}: {problem}")


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


def cut_off(node: Node) -> None:
    """The thing below at a node's name is removed: nothing of it shines through, nothing is inherited."""
    if node.children is not None:
        node.opaque = True
        node.implied = False


def copy_attributes(node: Node, source: LowerEntry) -> None:
    """Give a node the attributes of a lower layer's, overlayfs' own xattrs left out."""
    node.mode, node.uid, node.gid, node.mtime_ns = source.mode, source.uid, source.gid, source.mtime_ns
    kept = {
        name: value for name, value in (source.xattrs or {}).items() if not name.startswith(OVERLAY_PREFIX)
    }
    node.xattrs = kept or None


def drop(node: Node) -> None:
    """Take a name away from a node, and from everything below it."""
    pending = [node]
    while pending:
        node = pending.pop()
        node.links -= 1
        if node.children is not None:
            pending.extend(node.children.values())
