"""The metadata region of a layer image: every inode, directory, attribute and small tail, in one stretch.

Pure. Called by `erofs_writer` at the end of a layer, in two walks over the tree: `plan` places every inode,
because a directory names its children by their places, and tells the region's size before anyone has to know
where the region lies; `write` writes it there. Between the two there are eight bytes per name; the tree is
the only other thing whose size depends on the layer.

Order: the root, then for each directory, depth first, its children in name order, so that a lookup and the
`stat` of what it found meet the same page, and `find` and `ls -R` walk forward. A directory's entries lie
inline beside its inode up to their last full 4 KiB.

Invariants: an inode never crosses a 4 KiB boundary, nor does an inline tail; nid 0 is not used (st_ino 0
means "no entry" to some readers of directories); nothing is placed further back than `_WINDOW_BLOCKS` from
the end reached so far, so that blocks can be handed over while the region grows.
"""

from __future__ import annotations

import array
import bisect
import dataclasses
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from converter import errors
from converter.tree import Node
from imagefs.erofs import ondisk

_BLOCK = ondisk.BLOCK_BYTES
_INODE_BYTES = ondisk.INODE_BYTES
_SLOT = ondisk.SLOT_BYTES
_DIRENT_BYTES = ondisk.DIRENT.size

_WINDOW_BLOCKS = 8
"""Gaps left by what did not fit are filled for this many blocks: less than the smallest block of a map."""
_SMALLEST_GAP = 2 * _SLOT


class Target(Protocol):
    """Where the region is written; offsets are bytes in the image."""

    def at(self, offset: int) -> tuple[memoryview, int]:
        """A buffer and the position in it for `offset`, good to the end of that 4 KiB."""

    def done_below(self, offset: int) -> None:
        """Nothing below `offset` is written any more."""


@dataclasses.dataclass(slots=True)
class Plan:
    """Every place in the region, from its start. `region_bytes` is a multiple of 4096; `inodes` counts them.

    `nids`: of each name in walking order, the root first. `firsts`: of each directory in the order it is
    met, where in `nids` its children begin. `linked`: nid and number of names of each node with several.
    `places`: for each directory or symlink with blocks of its own, in the order met, where they are."""

    nids: array.array[int] = dataclasses.field(default_factory=lambda: array.array("Q"))
    firsts: array.array[int] = dataclasses.field(default_factory=lambda: array.array("Q"))
    places: array.array[int] = dataclasses.field(default_factory=lambda: array.array("Q"))
    linked: dict[Node, list[int]] = dataclasses.field(default_factory=dict)
    inodes: int = 0
    region_bytes: int = 0

    @property
    def root_nid(self) -> int:
        """The root directory's nid."""
        return self.nids[0]


def write(root: Node, plan: Plan, start: int, data_start: int, target: Target) -> None:
    """Write the region that was planned for the tree under `root` at byte `start` of the image, whose file
    data begins at byte `data_start` (multiples of 4096)."""
    _Emission(plan, start, data_start, target).run(root)


# -- shapes: what a node needs in the region -------------------------------------------------------------


class _Shape(NamedTuple):
    """`head_bytes`: inode and xattrs; `tail_bytes`: inline after them; `blocks`: whole blocks of its own. (A
    tuple: made for every inode.)"""

    head_bytes: int
    tail_bytes: int
    blocks: int
    size: int


def _shape(node: Node) -> _Shape:
    head = _INODE_BYTES + (len(_xattr_body(node.xattrs)) if node.xattrs else 0)
    if node.children is not None:
        return _own_blocks_or_inline(head, _directory_bytes(node.children))
    if stat.S_ISLNK(node.mode):
        return _own_blocks_or_inline(head, len(node.target))
    return _Shape(head, len(node.tail), 0, node.size)


def _own_blocks_or_inline(head: int, size: int) -> _Shape:
    blocks, tail = divmod(size, _BLOCK)
    if tail and head + tail > _BLOCK:
        return _Shape(head, 0, blocks + 1, size)
    return _Shape(head, tail, blocks, size)


def _entry_names(children: dict[bytes, Node]) -> list[bytes]:
    names = list(children)
    bisect.insort(names, b".")
    bisect.insort(names, b"..")
    return names


def _entry_blocks(names: list[bytes]) -> Iterator[tuple[int, int, int]]:
    """(first, end, bytes) of each block's run of names."""
    total = _DIRENT_BYTES * len(names) + sum(map(len, names))
    if total <= _BLOCK:
        yield 0, len(names), total
        return
    first, used = 0, 0
    for number, name in enumerate(names):
        need = _DIRENT_BYTES + len(name)
        if used + need > _BLOCK:
            yield first, number, used
            first, used = number, 0
        used += need
    yield first, len(names), used


def _directory_bytes(children: dict[bytes, Node]) -> int:
    total = _DIRENT_BYTES * (len(children) + 2) + 3 + sum(map(len, children))
    if total <= _BLOCK:
        return total
    used = [block[2] for block in _entry_blocks(_entry_names(children))]
    return (len(used) - 1) * _BLOCK + used[-1]


def _xattr_body(xattrs: dict[bytes, bytes]) -> bytes:
    out = bytearray(ondisk.XATTR_HEADER.pack(0, 0, bytes(7)))
    for name, value in sorted(xattrs.items()):
        split = ondisk.split_xattr_name(name)
        if split is None:
            raise errors.InvalidLayerError(f"extended attribute {name!r}: EROFS has no place for this name")
        if len(value) > ondisk.MAX_XATTR_VALUE_BYTES:
            raise errors.InvalidLayerError(
                f"extended attribute {name!r}: {len(value)} bytes, at most {ondisk.MAX_XATTR_VALUE_BYTES} fit"
            )
        index, rest = split
        out += ondisk.XATTR_ENTRY.pack(len(rest), index, len(value)) + rest + value
        out += bytes(-len(out) % 4)
    if len(out) > ondisk.MAX_XATTR_BODY_BYTES:
        raise errors.InvalidLayerError(f"extended attributes of {len(out)} bytes on one inode")
    return bytes(out)


# -- placing -----------------------------------------------------------------------------------------------


class _Region:
    """Free space: the end, and gaps in the last few blocks. The same calls give the same places."""

    def __init__(self) -> None:
        self.end = 0
        self._gaps: list[list[int]] = []
        self._reached = 0

    def close(self) -> None:
        """Leave room after the last inode: fsck.erofs 1.5 reads 12 bytes of xattrs behind each inode, also
        where there are none, and calls the end of the image a corruption."""
        if self._reached == self.end:
            self._grow(1)

    def place(self, length: int) -> int:
        """`length` (at most 4096) bytes that stay inside one block, from a multiple of 32."""
        length = (length + _SLOT - 1) & -_SLOT
        for gap in self._gaps:
            offset = gap[0]
            if offset + length <= gap[1]:
                gap[0] = offset + length
                self._reached = max(self._reached, gap[0])
                if gap[1] - gap[0] < _SMALLEST_GAP:
                    self._gaps.remove(gap)
                return offset
        offset = self._grow(1)
        self._reached = offset + length
        if _BLOCK - length >= _SMALLEST_GAP:
            self._gaps.append([offset + length, offset + _BLOCK])
        return offset

    def place_blocks(self, count: int) -> int:
        """`count` whole blocks."""
        return self._grow(count)

    def place_long(self, shape: _Shape) -> int:
        """An inode whose head and tail pass 4096 bytes: it starts so that its tail stays in one block."""
        shift = 0
        into_block = shape.head_bytes % _BLOCK
        if into_block + shape.tail_bytes > _BLOCK:
            shift = (_BLOCK - into_block + _SLOT - 1) & -_SLOT
        length = (shift + shape.head_bytes + shape.tail_bytes + _SLOT - 1) & -_SLOT
        offset = self._grow(-(-length // _BLOCK))
        self._reached = offset + length
        return offset + shift

    def _grow(self, count: int) -> int:
        offset = self.end
        self.end += count * _BLOCK
        if self._gaps:
            oldest = self.end - _WINDOW_BLOCKS * _BLOCK
            self._gaps = [gap for gap in self._gaps if gap[0] >= oldest]
        return offset


def plan(root: Node) -> Plan:
    """Place everything in the tree under `root`. Leaves each directory's `children` in name order. Raises
    InvalidLayerError for what EROFS cannot hold."""
    made = Plan()
    region = _Region()
    # Slot 0 stays empty, so that no inode has nid 0.
    region.place(_SLOT)
    nids = made.nids
    stack = [(root, _place(root, region, made))]
    while stack:
        directory, number = stack.pop()
        made.firsts[number] = len(nids)
        below: list[tuple[Node, int]] = []
        for node in (directory.children or {}).values():
            if node.children is not None:
                below.append((node, _place(node, region, made)))
                continue
            if node.links > 1:
                known = made.linked.get(node)
                if known is not None:
                    known[1] += 1
                    nids.append(known[0])
                    continue
            _place(node, region, made)
            if node.links > 1:
                made.linked[node] = [nids[-1], 1]
        stack.extend(reversed(below))
    region.close()
    made.region_bytes = region.end
    return made


def _place(node: Node, region: _Region, made: Plan) -> int:
    """Place one inode; returns a directory's number in the order met (0 for anything else)."""
    number = 0
    if node.children is not None:
        _sort_in_place(node.children)
        number = len(made.firsts)
        made.firsts.append(0)
    shape = _shape(node)
    if shape.blocks:
        made.places.append(region.place_blocks(shape.blocks))
    length = shape.head_bytes + shape.tail_bytes
    offset = region.place(length) if length <= _BLOCK else region.place_long(shape)
    made.nids.append(offset // _SLOT)
    made.inodes += 1
    return number


def _sort_in_place(children: dict[bytes, Node]) -> None:
    items = sorted(children.items())
    children.clear()
    children.update(items)


# -- writing -----------------------------------------------------------------------------------------------


class _Emission:
    """The second walk: same order, now with every place known."""

    def __init__(self, plan: Plan, start: int, data_start: int, target: Target) -> None:
        self._plan = plan
        self._start = start
        self._data_start = data_start
        self._target = target
        self._cursor = 0
        self._directories = 0
        self._places = iter(plan.places)
        self._inode_number = 0
        self._reached = start

    def run(self, root: Node) -> None:
        root_nid = self._plan.root_nid
        self._emit(root, root_nid, root_nid)
        self._cursor = 1
        pending = set(self._plan.linked)
        stack = [(root, root_nid)]
        while stack:
            directory, own_nid = stack.pop()
            below: list[tuple[Node, int]] = []
            for node in (directory.children or {}).values():
                nid = self._plan.nids[self._cursor]
                self._cursor += 1
                if node.links > 1 and node.children is None:
                    if node not in pending:
                        continue
                    pending.remove(node)
                self._emit(node, nid, own_nid)
                if node.children is not None:
                    below.append((node, nid))
            stack.extend(reversed(below))

    def _emit(self, node: Node, nid: int, parent_nid: int) -> None:
        offset = self._start + nid * _SLOT
        kind = stat.S_IFMT(node.mode)
        links, size, place, tail = 1, node.size, 0, node.tail
        if node.children is not None:
            links, size, place, tail = self._emit_directory(node, nid, parent_nid)
        elif kind == stat.S_IFREG:
            place = self._data_start + node.data_start >> ondisk.BLOCK_BITS if node.data_start >= 0 else 0
        elif kind == stat.S_IFLNK:
            size, place, tail = self._emit_target(node)
        else:
            size, tail = 0, b""
            if kind in (stat.S_IFCHR, stat.S_IFBLK):
                place = _rdev(node)
        if node.links > 1 and node.children is None:
            links = self._plan.linked[node][1]
        xattrs = _xattr_body(node.xattrs) if node.xattrs else b""
        self._inode_number += 1
        seconds, nanoseconds = divmod(node.mtime_ns, ondisk.NANOSECONDS)
        # Only now: blocks of the node's own may lie before its inode.
        self._advance(offset)
        buffer, position = self._target.at(offset)
        ondisk.INODE.pack_into(
            buffer,
            position,
            ondisk.FORMAT_INLINE if tail else ondisk.FORMAT_PLAIN,
            ondisk.xattr_units(len(xattrs)),
            node.mode,
            0,
            size,
            place,
            self._inode_number,
            node.uid,
            node.gid,
            seconds,
            nanoseconds,
            links,
        )
        if xattrs or tail:
            self._write(offset + _INODE_BYTES, xattrs + tail)

    def _emit_directory(self, node: Node, nid: int, parent_nid: int) -> tuple[int, int, int, bytes]:
        """Write a directory's full blocks; returns its links, size, block address and inline tail."""
        children = node.children or {}
        first = self._plan.firsts[self._directories]
        self._directories += 1
        shape = _shape(node)
        names = _entry_names(children)
        types = ondisk.FILE_TYPES
        numbers = list(self._plan.nids[first : first + len(children)])
        kinds = [types[stat.S_IFMT(child.mode)] for child in children.values()]
        links = 2 + kinds.count(types[stat.S_IFDIR])
        for name, number in ((b".", nid), (b"..", parent_nid)):
            at = bisect.bisect_left(names, name)
            numbers.insert(at, number)
            kinds.insert(at, types[stat.S_IFDIR])
        place = self._start + next(self._places) if shape.blocks else 0
        blocks_left, offset, tail = shape.blocks, place, b""
        for begin, end, _ in _entry_blocks(names):
            data = _dirent_block(names[begin:end], numbers[begin:end], kinds[begin:end])
            if blocks_left:
                self._write(offset, data)
                blocks_left -= 1
                offset += _BLOCK
            else:
                tail = data
        return links, shape.size, place >> ondisk.BLOCK_BITS, tail

    def _emit_target(self, node: Node) -> tuple[int, int, bytes]:
        """Write a symlink's target if it has a block of its own; returns size, block address, inline tail."""
        shape = _shape(node)
        if not shape.blocks:
            return shape.size, 0, node.target
        place = self._start + next(self._places)
        self._write(place, node.target)
        return shape.size, place >> ondisk.BLOCK_BITS, b""

    def _advance(self, offset: int) -> None:
        block = offset & -_BLOCK
        if block > self._reached:
            self._reached = block
            self._target.done_below(max(block - _WINDOW_BLOCKS * _BLOCK, self._start))

    def _write(self, offset: int, data: bytes) -> None:
        while data:
            self._advance(offset)
            room = _BLOCK - offset % _BLOCK
            buffer, position = self._target.at(offset)
            piece = data[:room]
            buffer[position : position + len(piece)] = piece
            offset += len(piece)
            data = data[room:]


def _dirent_block(names: Sequence[bytes], nids: Sequence[int], kinds: Sequence[int]) -> bytes:
    pack = ondisk.DIRENT.pack
    records = []
    offset = _DIRENT_BYTES * len(names)
    for name, nid, kind in zip(names, nids, kinds, strict=True):
        records.append(pack(nid, offset, kind))
        offset += len(name)
    return b"".join(records) + b"".join(names)


def _rdev(node: Node) -> int:
    if not (0 <= node.rdev_major < 1 << 12 and 0 <= node.rdev_minor < 1 << 20):
        raise errors.InvalidLayerError(f"device number {node.rdev_major}:{node.rdev_minor} is out of range")
    return ondisk.encode_rdev(node.rdev_major, node.rdev_minor)
