"""How much of a layer is in the block cache: counted by the device server, read by its clients. Pure.

On the control socket a Coverage is a JSON array of its fields, because a node may have thousands of layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from typing import TYPE_CHECKING

from imagefs import errors

if TYPE_CHECKING:
    from imagefs import blockmap


@dataclasses.dataclass(frozen=True, slots=True)
class Coverage:
    """Blocks of zeros are not counted: they need neither origin nor disk. Bytes are uncompressed. A block
    that several layers share counts for each. `quiet_seconds`: since the last read that missed the cache, or
    since the device server took the layer up."""

    blocks: int
    present_blocks: int
    total_bytes: int
    present_bytes: int
    quiet_seconds: float

    @property
    def complete(self) -> bool:
        """Whether no read can need the origin."""
        return self.present_blocks == self.blocks


def count(block_map: blockmap.BlockMap, present: Container[bytes], quiet_seconds: float) -> Coverage:
    """The coverage of a layer by the blocks that are `present`."""
    blocks = present_blocks = total_bytes = present_bytes = 0
    for index, block in enumerate(block_map.blocks):
        if block.zero:
            continue
        length = block_map.block_length(index)
        blocks += 1
        total_bytes += length
        if block.digest in present:
            present_blocks += 1
            present_bytes += length
    return Coverage(blocks, present_blocks, total_bytes, present_bytes, round(quiet_seconds, 1))


def encode(value: Coverage) -> list[float]:
    """See the module."""
    return [value.blocks, value.present_blocks, value.total_bytes, value.present_bytes, value.quiet_seconds]


def decode(value: object) -> Coverage:
    """Inverse of encode. Raises InvalidInputError."""
    if (
        not isinstance(value, list)
        or len(value) != 5
        or not all(type(count) is int for count in value[:4])
        or not isinstance(value[4], int | float)
    ):
        raise errors.InvalidInputError(f"control: {value!r} is not a coverage")
    return Coverage(*value)
