"""What of the attached layers is on this machine, and what of that stays: copies, pins, files, eviction.

The part of Layers that is for the verbs of the cache (`cache`, `prefetch`, the agent's upkeep), on control
threads. No origin is asked here but by the copies, which the filler makes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from imagefs import errors
from imagefs.cache import BlockCache
from imagefs.fuse import coverage
from imagefs.fuse.fill import Filler
from imagefs.fuse.layerwriter import LayerWriter
from imagefs.lazylayer import LazyLayer


class LocalBlocks:
    """See the module. `layers` gives an owner's layers, all of them for None, and raises NotFoundError where
    the owner has none; `quiet_seconds` says how long no read of a layer has missed the cache. Pins may take
    `most_pinned_bytes`."""

    def __init__(
        self,
        cache: BlockCache,
        files: LayerWriter,
        filler: Filler,
        layers: Callable[[str | None], Sequence[LazyLayer]],
        quiet_seconds: Callable[[str], float],
        most_pinned_bytes: int,
    ) -> None:
        self._cache = cache
        self._files = files
        self._filler = filler
        self._layers = layers
        self._quiet_seconds = quiet_seconds
        self._most_pinned_bytes = most_pinned_bytes

    def fill(self, owner: str, bandwidth_bytes_per_second: int) -> None:
        """Have the rest of an owner's layers fetched in the background. NotFoundError if it has none."""
        self._layers(owner)
        self._filler.start(owner, bandwidth_bytes_per_second)

    def fills(self) -> dict[str, Any]:
        """A JSON object: the copies that were asked for; see Filler.status."""
        return self._filler.status()

    def stop_fill(self, owner: str) -> None:
        """No further copy for the owner."""
        self._filler.stop(owner)

    def coverage(self, owner: str | None) -> dict[str, list[float]]:
        """How much of each layer (of one owner, or of all) is in the cache; no disk is asked."""
        return {
            layer.map_digest: coverage.encode(
                coverage.count(layer.block_map, self._present(layer), self._quiet_seconds(layer.map_digest))
            )
            for layer in self._layers(owner)
        }

    def layer_files(self, owner: str | None) -> dict[str, str]:
        """Map digest -> file, of those layers (of one owner, or of all) that can be mounted from one
        (layerfiles.py)."""
        found = self._files.mountable(self._layers(owner))
        return {map_digest: str(path) for map_digest, path in found.items()}

    def pin(self, owner: str) -> None:
        """Keep all blocks of the owner's layers, once they are here, until `unpin`: the pin's name is the
        owner's. ConfigurationError when pins would leave no room for anything else."""
        digests: dict[bytes, int] = {}
        for layer in self._layers(owner):
            for index, block in enumerate(layer.block_map.blocks):
                if not block.zero:
                    digests[block.digest] = layer.block_map.block_length(index)
        others = {digest for name, pinned in self._cache.pins() if name != owner for digest in pinned}
        wanted_bytes = sum(length for digest, length in digests.items() if digest not in others)
        pinned_bytes = self._cache.index.occupied_bytes(others)
        if pinned_bytes + wanted_bytes > self._most_pinned_bytes:
            raise errors.ConfigurationError(
                f"cannot pin {owner}: its {wanted_bytes} bytes and the {pinned_bytes} pinned already are "
                f"more than the {self._most_pinned_bytes} that may be pinned; unpin others, or raise the "
                "cache's quota"
            )
        self._cache.pin(owner, digests)

    def unpin(self, owner: str) -> None:
        """Drop the pin of that name."""
        self._cache.unpin(owner)

    def collect(self) -> dict[str, int]:
        """Bring the cache under its limits now. A JSON object: what went, and what could not."""
        collected = self._cache.collect()
        return {
            "removed_blocks": len(collected.removed),
            "removed_bytes": sum(entry.allocated_bytes for entry in collected.removed),
            "short_bytes": collected.short_bytes,
        }

    def close(self) -> None:
        """Make no more copies; a successor goes on with them."""
        self._filler.close()

    def _present(self, layer: LazyLayer) -> Container[bytes]:
        """The blocks of a layer that need no origin, and maybe others."""
        if self._files.digest(layer.map_digest) is None:
            return self._cache
        return {block.digest for block in layer.block_map.blocks}
