"""Reads finished layer images back: for a layer that depends on those below it.

A finished layer is a spool file of this run, or a blob in an origin that was found there. Either way its blocks
are verified against the block map and decompressed as they are wanted; the few last ones are kept, under one
budget for the whole stack. One thread: the worker of the layer above.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable

from converter import blob
from imagefs import frames
from imagefs.lazylayer import LazyLayer

_BUDGET_BYTES = 32 << 20


class RecentBlocks:
    """Decompressed blocks of several layers, the least recently used leave first."""

    def __init__(self, budget_bytes: int = _BUDGET_BYTES) -> None:
        self._blocks: collections.OrderedDict[tuple[int, int], bytes] = collections.OrderedDict()
        self._left = budget_bytes

    def get(self, layer: int, index: int, load: Callable[[], bytes]) -> bytes:
        """Block `index` of layer number `layer`, by `load` if it is not here."""
        key = layer, index
        data = self._blocks.get(key)
        if data is None:
            data = self._blocks[key] = load()
            self._left -= len(data)
            while self._left < 0 and len(self._blocks) > 1:
                _, old = self._blocks.popitem(last=False)
                self._left += len(old)
        self._blocks.move_to_end(key)
        return data


class LayerImage:
    """The bytes of layer number `number`: the read function of an `erofs.Reader`."""

    def __init__(self, number: int, layer: blob.FinishedBlob | LazyLayer, recent: RecentBlocks) -> None:
        self._number = number
        self._layer = layer
        self._map = layer.block_map
        self._recent = recent

    def __call__(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, which lie inside the image."""
        size = self._map.block_bytes
        out = bytearray()
        while len(out) < length:
            index, start = divmod(offset + len(out), size)
            data = self._recent.get(self._number, index, lambda index=index: self._load(index))  # type: ignore[misc]
            out += data[start : start + length - len(out)]
        return bytes(out)

    def _load(self, index: int) -> bytes:
        block = self._map.blocks[index]
        layer = self._layer
        compressed = memoryview(bytearray(block.compressed_bytes))
        if isinstance(layer, LazyLayer):
            layer.origin.read_range(layer.blob_digest, block.offset, compressed)
        else:
            with open(layer.path, "rb", buffering=0) as file:
                os.preadv(file.fileno(), [compressed], layer.start + block.offset)
        return frames.decode_block(self._map, index, compressed, layer.map_digest)
