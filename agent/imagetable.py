"""The images that are known now, and by what they are found: the store's rows in memory.

Owned by images.py; any thread, each method one short critical section. The store is the truth; this is what
a Prepare looks at, because it must not wait for a disk.

A block image is believed because of the place that lists it (a repository, as a REF without tag): whoever may
push there could forge the files of any layer. So an image, and each of its layers, stands for images of the
places that list it, and of no others; unless the trust policy vouches for the block image itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Set

from agent.rows import ImageRow
from imagefs import errors


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What images may have in common: `files` in root/maps (the digests of block maps and of boot packs'
    tables), names of `devices`."""

    files: Set[str]
    devices: Set[str]


class ImageTable:
    """See the module."""

    def __init__(
        self, rows: Iterable[ImageRow], *, place_matters: bool, is_trusted: Callable[[ImageRow], bool]
    ) -> None:
        """`is_trusted`: whether the policy of today still takes an image of yesterday. One that it does not
        stays for the snapshots that it has, and gives layers to others once it was found, and accepted, anew.
        """
        self._place_matters = place_matters
        self._lock = threading.Lock()
        self._rows: dict[str, ImageRow] = {}
        self._by_source: dict[tuple[str, str], str] = {}
        self._places: dict[str, set[str]] = {}
        self._named: set[str] = set()
        self._coming: list[Parts] = []
        self._by_chain: dict[str, dict[str, int]] = {}
        self._held_until: dict[str, float] = {}
        for row in rows:
            self._put(row)
            if is_trusted(row):
                self._admit(row, row.origin_ref)

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

    def of_source(self, source_digest: str | None, place: str) -> ImageRow | None:
        """By the digest of the source image's manifest, for an image whose block image is looked for in
        `place`."""
        with self._lock:
            return self._rows.get(self._by_source.get((self._at(place), source_digest or ""), ""))

    def layer_of_chain(
        self, chain_id: str, place: str | None, wanted: ImageRow | None
    ) -> tuple[str, int] | None:
        """Where the layers up to a chain id are: (block image, index), in the wanted image if it is there.
        `place` as for `of_source`; None for who does not say which image is meant: only one that was asked
        for by name will do then."""
        with self._lock:
            places = self._by_chain.get(chain_id, {})
            if wanted is not None and wanted.block_digest in places:
                return wanted.block_digest, places[wanted.block_digest]
            return next((found for found in places.items() if self._may_serve(found[0], place)), None)

    def may_serve(self, block_digest: str, place: str | None) -> bool:
        """Whether layers of a block image may stand for those of an image; `place` as for
        `layer_of_chain`."""
        with self._lock:
            return self._may_serve(block_digest, place)

    def put(self, row: ImageRow) -> None:
        """Add one that was just accepted, or replace what is known of it."""
        with self._lock:
            known = row.block_digest in self._rows
            self._put(row)
            if not known:
                self._admit(row, row.origin_ref)

    def admit(self, block_digest: str, place: str) -> None:
        """This place lists the block image, and it may be used. Of one that is not known, nothing."""
        with self._lock:
            row = self._rows.get(block_digest)
            if row is not None:
                self._admit(row, place)

    def name(self, block_digest: str) -> None:
        """Somebody asked for the image by name."""
        with self._lock:
            if block_digest in self._rows:
                self._named.add(block_digest)

    def drop(self, row: ImageRow) -> Parts:
        """Remove. Returns what of it no other image has, or is about to have."""
        with self._lock:
            self._rows.pop(row.block_digest, None)
            self._held_until.pop(row.block_digest, None)
            self._named.discard(row.block_digest)
            for place in self._places.pop(row.block_digest, ()):
                if self._by_source.get((place, row.source_digest)) == row.block_digest:
                    del self._by_source[place, row.source_digest]
            for layer in row.layers:
                places = self._by_chain.get(layer.chain_id, {})
                places.pop(row.block_digest, None)
                if not places:
                    self._by_chain.pop(layer.chain_id, None)
            gone, others = _parts(row), self._others()
            return Parts(gone.files - others.files, gone.devices - others.devices)

    @contextlib.contextmanager
    def coming(self, row: ImageRow) -> Iterator[None]:
        """This image is being taken up: whoever drops another one leaves alone what is its, too."""
        parts = _parts(row)
        with self._lock:
            self._coming.append(parts)
        try:
            yield
        finally:
            with self._lock:
                self._coming.remove(parts)

    def files(self) -> Set[str]:
        """Those of all images, and of those that are being taken up."""
        with self._lock:
            return self._others().files

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

    # -- with the lock held ------------------------------------------------------------------------

    def _others(self) -> Parts:
        """What all images have that are here, or are coming."""
        parts = [*map(_parts, self._rows.values()), *self._coming]
        return Parts(
            {file for each in parts for file in each.files}, {name for each in parts for name in each.devices}
        )

    def _put(self, row: ImageRow) -> None:
        self._rows[row.block_digest] = row
        for number, layer in enumerate(row.layers):
            self._by_chain.setdefault(layer.chain_id, {})[row.block_digest] = number

    def _admit(self, row: ImageRow, place: str) -> None:
        self._places.setdefault(row.block_digest, set()).add(self._at(place))
        self._by_source[self._at(place), row.source_digest] = row.block_digest

    def _may_serve(self, block_digest: str, place: str | None) -> bool:
        if place is not None:
            return self._at(place) in self._places.get(block_digest, ())
        row = self._rows.get(block_digest)
        if row is None or block_digest not in self._places:
            return False
        return row.pinned or row.prefetched or block_digest in self._named

    def _at(self, place: str) -> str:
        """The place that counts: any is as good as another where the place does not matter."""
        return place if self._place_matters else ""


def _parts(row: ImageRow) -> Parts:
    tables = {row.boot_pack.table_digest} if row.boot_pack is not None else set()
    maps = {layer.map_digest for layer in row.layers}
    return Parts(maps | tables, {row.device(layer) for layer in row.layers})
