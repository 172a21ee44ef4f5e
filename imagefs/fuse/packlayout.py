"""Where a boot pack has the pages of one device, as a worker looks them up.

Pure. The server writes the extents of a device, as it gives them to a worker beside the device (wire.py);
the worker cuts each READ along them. A pack's frames are the blocks of a device of its own, which no name
leads to: what a worker holds, asks for and lets go is blocks, whichever way a page comes.

A device shows one pack at most (devices.py).
"""

from __future__ import annotations

import bisect
import dataclasses
import struct
from array import array
from collections.abc import Collection, Iterable, Iterator

from imagefs import errors

PAGE_BYTES = 4096
_EXTENT = struct.Struct("=III")

Key = tuple[int, int]
"""(node, index) of a block, or of a frame."""


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """`pages` pages of a device from `first_page` are those of a pack from `position`."""

    first_page: int
    pages: int
    position: int


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """`length` bytes of the block, or frame, `key`, from `within`."""

    key: Key
    within: int
    length: int


class Layout:
    """The extents of one device in one pack, whose node is `node` and whose frames have `frame_bytes`."""

    def __init__(self, node: int, frame_bytes: int, extents: Iterable[Extent]) -> None:
        ordered = sorted(extents, key=lambda extent: extent.first_page)
        self.node = node
        self._frame_bytes = frame_bytes
        self._first = array("I", [extent.first_page for extent in ordered])
        self._pages = array("I", [extent.pages for extent in ordered])
        self._position = array("I", [extent.position for extent in ordered])

    def find(self, offset: int) -> Segment | int:
        """The longest segment that begins with byte `offset` of the device, or, where the pack lacks that
        byte, where the next one that it has is; -1 for nowhere."""
        at = bisect.bisect_right(self._first, offset // PAGE_BYTES) - 1
        if at >= 0:
            skipped = offset - self._first[at] * PAGE_BYTES
            left = self._pages[at] * PAGE_BYTES - skipped
            if left > 0:
                frame, within = divmod(self._position[at] * PAGE_BYTES + skipped, self._frame_bytes)
                return Segment((self.node, frame), within, min(left, self._frame_bytes - within))
        return self._first[at + 1] * PAGE_BYTES if at + 1 < len(self._first) else -1


def segments(
    node: int,
    block_bytes: int,
    offset: int,
    length: int,
    layout: Layout | None,
    refused: Collection[Key],
) -> Iterator[Segment]:
    """What `length` bytes from `offset` of a device consist of, in order: frames where the layout has them,
    unless the frame is one of `refused`, else blocks."""
    end = offset + length
    while offset < end:
        stop = end
        found = layout.find(offset) if layout is not None else -1
        if isinstance(found, Segment) and found.key not in refused:
            chosen = found
        else:
            if isinstance(found, Segment):
                stop = min(end, offset + found.length)
            elif found >= 0:
                stop = min(end, found)
            index, within = divmod(offset, block_bytes)
            chosen = Segment((node, index), within, block_bytes - within)
        count = min(chosen.length, stop - offset)
        yield Segment(chosen.key, chosen.within, count)
        offset += count


def encode(extents: Iterable[Extent]) -> bytes:
    """The extents of one device."""
    return b"".join(_EXTENT.pack(each.first_page, each.pages, each.position) for each in extents)


def decode(data: bytes) -> list[Extent]:
    """The inverse of encode."""
    try:
        return [Extent(*values) for values in _EXTENT.iter_unpack(data)]
    except struct.error as exc:
        raise errors.InvalidInputError(f"extents of {len(data)} bytes: {exc}") from exc
