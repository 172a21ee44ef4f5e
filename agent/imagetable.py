"""The images that are known now, and by what they are found: the store's rows in memory.

Owned by images.py; any thread, each method one short critical section. The store is the truth; this is what
a Prepare looks at, because it must not wait for a disk.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from agent.store import ImageRow
from imagefs import errors


class ImageTable:
    """See the module."""

    def __init__(self, rows: Iterable[ImageRow]) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, ImageRow] = {}
        self._by_source: dict[str, str] = {}
        self._by_chain: dict[str, dict[str, int]] = {}
        self._held_until: dict[str, float] = {}
        for row in rows:
            self.put(row)

    def rows(self) -> list[ImageRow]:
        """All of them."""
        with self._lock:
            return list(self._rows.values())

    def find(self, block_digest: str) -> ImageRow | None:
        """By the digest of the block image."""
        with self._lock:
            return self._rows.get(block_digest)

    def row(self, block_digest: str) -> ImageRow:
        """As `find`. NotFoundError."""
        found = self.find(block_digest)
        if found is None:
            raise errors.NotFoundError(f"block image {block_digest} is not known here")
        return found

    def of_source(self, source_digest: str | None) -> ImageRow | None:
        """By the digest of the source image's manifest."""
        with self._lock:
            return self._rows.get(self._by_source.get(source_digest or "", ""))

    def layer_of_chain(self, chain_id: str, wanted: ImageRow | None) -> tuple[str, int] | None:
        """Where the layers up to a chain id are: (block image, index), in the wanted image if it is there."""
        with self._lock:
            places = self._by_chain.get(chain_id, {})
            if wanted is not None and wanted.block_digest in places:
                return wanted.block_digest, places[wanted.block_digest]
            return next(iter(places.items()), None)

    def put(self, row: ImageRow) -> None:
        """Add or replace."""
        with self._lock:
            self._rows[row.block_digest] = row
            self._by_source[row.source_digest] = row.block_digest
            for number, layer in enumerate(row.layers):
                self._by_chain.setdefault(layer.chain_id, {})[row.block_digest] = number

    def drop(self, row: ImageRow) -> set[str]:
        """Remove. Returns the map digests of its layers that no other image has."""
        with self._lock:
            self._rows.pop(row.block_digest, None)
            self._held_until.pop(row.block_digest, None)
            if self._by_source.get(row.source_digest) == row.block_digest:
                del self._by_source[row.source_digest]
            for layer in row.layers:
                places = self._by_chain.get(layer.chain_id, {})
                places.pop(row.block_digest, None)
                if not places:
                    self._by_chain.pop(layer.chain_id, None)
            left = {layer.map_digest for other in self._rows.values() for layer in other.layers}
            return {layer.map_digest for layer in row.layers} - left

    def hold(self, block_digest: str, until: float) -> None:
        """Keep an image that has no snapshots yet until this time of the caller's clock."""
        with self._lock:
            if block_digest in self._rows:
                self._held_until[block_digest] = max(self._held_until.get(block_digest, 0.0), until)

    def let_go(self, block_digest: str) -> None:
        """The image has snapshots: it needs no hold any more."""
        with self._lock:
            self._held_until.pop(block_digest, None)

    def held_until(self, block_digest: str) -> float:
        """Until when an image is held; 0 if it is not."""
        with self._lock:
            return self._held_until.get(block_digest, 0.0)
