"""What the kernel parses first is looked at before a worker gets it, wherever it comes from.

A device that shows a boot pack has its first page from two places, the pack and the layer's block 0, and what
decides between them is what arrives, and what the cache still has, at the time of each read. assembly.py
reads it once, through the device; the kernel reads it later, after a reboot even, and whoever wrote the pack
can make the two answers differ. So both places are checked here, each time that one is handed to a worker: a
descriptor that holds a superblock of which `erofs.check_superblock_of` disapproves becomes an IntegrityError,
upon which a frame's pages come by blocks, and a block's reader gets EIO.

A device without a pack has one place, whose bytes the block map's digest fixes: assembly.py's check is enough
there, and says more.

Called by Packs and Layers, in the threads that bring frames and blocks; 0.3 ms each, and nothing is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from imagefs import erofs, errors, framemask
from imagefs.arrival import Part
from imagefs.blockmap import BlockMap
from imagefs.bootstream import FirstPage
from imagefs.erofs import ondisk


def checked_frame(result: int | Exception, first_pages: Sequence[FirstPage]) -> int | Exception:
    """A pack's frame that has arrived, or why it is not to be shown."""
    if isinstance(result, int):
        for page in first_pages:
            refusal = _refusal(result, page.within, page.image_bytes)
            if refusal is not None:
                return refusal
    return result


def checked_block(result: int | Part | Exception, block_map: BlockMap) -> int | Part | Exception:
    """The block 0 of a layer, or the part of it that has arrived, or why it is not to be shown."""
    if isinstance(result, Part):
        first = framemask.touched(0, ondisk.BLOCK_BYTES, block_map.frame_bytes)
        if not framemask.covers(result.frames, first):
            return result  # nobody reads the page from this one
        return _refusal(result.fd, 0, block_map.image_bytes) or result
    if isinstance(result, int):
        return _refusal(result, 0, block_map.image_bytes) or result
    return result


def _refusal(fd: int, within: int, image_bytes: int) -> errors.IntegrityError | None:
    """The error, with the descriptor closed, if the page at `within` may not be shown."""
    try:
        erofs.check_superblock_of(os.pread(fd, ondisk.BLOCK_BYTES, within), image_bytes)
    except (errors.InvalidInputError, OSError) as exc:
        os.close(fd)
        refusal = errors.IntegrityError(f"not shown to the kernel: {exc}")
        refusal.__cause__ = exc
        return refusal
    return None
