"""What is warm on this node: images fetched before anybody starts them, pins, and how much of what is here.

The routes of the API for whoever prepares nodes (the warm pool, an operator). Any thread. A prefetched or
pinned image is kept without snapshots, also over a reboot; `unpin` lets it go. `prefetch` answers when the
layers' metadata is here; the blocks come in the background, `is_warm` says how many.

    POST /api/v1/prefetch {"image"}    POST /api/v1/pin {"image"}    POST /api/v1/unpin {"image"}
    GET  /api/v1/warm[?image=]         GET  /api/v1/cache            POST /api/v1/cache/gc

Others in the cluster have the same on the port for peers, but for the cache (`register_cluster`).

An image is a reference as containerd writes it (or docker://...), the digest of its manifest, or that of its
block image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from agent import api, lookup
from agent.fill import OWNER_PREFIX, Devices
from agent.observer import Observer
from agent.rows import ImageRow
from imagefs import errors, reference


class WarmDevices(Devices, Protocol):
    """What of the device client is used here; imagefs.fuse.control.DeviceClient."""

    def pin(self, owner: str) -> None:
        """See DeviceClient."""

    def unpin(self, owner: str) -> None:
        """See DeviceClient."""

    def collect(self) -> dict[str, int]:
        """See DeviceClient."""
        ...

    def status(self) -> dict[str, Any]:
        """See DeviceClient."""
        ...


class Marks(Protocol):
    """What of the store is used here."""

    def set_pinned(self, block_digest: str, pinned: bool) -> None:
        """See Store."""

    def set_prefetched(self, block_digest: str, prefetched: bool) -> None:
        """See Store."""


class KnownImages(Protocol):
    """What of images.py is used here."""

    def rows(self) -> list[ImageRow]:
        """See Images."""
        ...

    def attach(self, block_digest: str) -> object:
        """See Images."""

    def pull(self, reference: str) -> ImageRow:
        """See Images."""
        ...

    def refresh(self, block_digest: str) -> None:
        """See Images."""

    def released(self, block_digest: str) -> None:
        """See Images."""


class Copier(Protocol):
    """fill.Fills."""

    def begin(self, row: ImageRow) -> None:
        """See Fills."""


@dataclasses.dataclass(frozen=True, slots=True)
class Warmth:
    """How much of an image is here. `complete`: a start needs no block from anywhere. `copy` is the state of
    the background copy, None without one."""

    image: str
    source_digest: str
    block_digest: str
    present_bytes: int
    total_bytes: int
    complete: bool
    pinned: bool
    prefetched: bool
    copy: str | None
    error: str | None

    def to_json(self) -> dict[str, Any]:
        """As the API gives it, with the fraction."""
        fraction = self.present_bytes / self.total_bytes if self.total_bytes else 1.0
        return {**dataclasses.asdict(self), "fraction": round(fraction, 4)}


class Warm:
    """See the module."""

    def __init__(
        self, images: KnownImages, marks: Marks, devices: WarmDevices, copier: Copier, observer: Observer
    ) -> None:
        self._images = images
        self._marks = marks
        self._devices = devices
        self._copier = copier
        self._observer = observer

    def register(self, routes: api.Routes) -> None:
        """Add the routes of the module."""
        routes.add("POST", "/api/v1/prefetch", lambda request: self.prefetch(_image(request)).to_json())
        routes.add("POST", "/api/v1/pin", lambda request: self.pin(_image(request)).to_json())
        routes.add("POST", "/api/v1/unpin", self._answer_unpin)
        routes.add("GET", "/api/v1/warm", self._answer_warm, public=True)
        routes.add("GET", "/api/v1/cache", lambda request: self.cache(), public=True)
        routes.add("POST", "/api/v1/cache/gc", lambda request: {**self._devices.collect()})

    def register_cluster(self, routes: api.Routes, permit: Callable[[str], None]) -> None:
        """Add what others in the cluster may ask. `permit` raises DeniedError for a place (a REF without tag)
        that they may not have this node fetch from; what is here already may be named all the same."""

        def permitted(request: api.Request) -> str:
            image = _image(request)
            if self._find(image) is None:
                place = lookup.from_text(image).reference
                permit(str(dataclasses.replace(place, tag=None, digest=None)))
            return image

        routes.add("POST", "/api/v1/prefetch", lambda request: self.prefetch(permitted(request)).to_json())
        routes.add("POST", "/api/v1/pin", lambda request: self.pin(permitted(request)).to_json())
        routes.add("POST", "/api/v1/unpin", self._answer_unpin)
        routes.add("GET", "/api/v1/warm", self._answer_warm)

    def prefetch(self, image: str) -> Warmth:
        """Have an image here before anybody starts it: its metadata when this returns, its blocks in the
        background."""
        row = self._find(image) or self._images.pull(image)
        self._marks.set_prefetched(row.block_digest, True)
        self._images.refresh(row.block_digest)
        self._copier.begin(row)
        if not row.prefetched:
            text = f"{row.reference}: fetched in the background, before anybody starts it"
            self._observer.event("prefetch", text, image=row.reference)
        return self._warmth(dataclasses.replace(row, prefetched=True))

    def pin(self, image: str) -> Warmth:
        """Keep an image, and what is and will be here of its blocks, from eviction. ConfigurationError when
        the cache's quota does not leave room for that."""
        row = self._find(image) or self._images.pull(image)
        self._images.attach(row.block_digest)
        self._devices.pin(OWNER_PREFIX + row.block_digest)
        self._marks.set_pinned(row.block_digest, True)
        self._images.refresh(row.block_digest)
        return self._warmth(dataclasses.replace(row, pinned=True))

    def unpin(self, image: str) -> None:
        """Neither pinned nor prefetched any longer: it goes with its last snapshot. NotFoundError."""
        row = self._known(image)
        self._marks.set_pinned(row.block_digest, False)
        self._marks.set_prefetched(row.block_digest, False)
        self._images.refresh(row.block_digest)
        self._devices.unpin(OWNER_PREFIX + row.block_digest)
        self._devices.stop_fill(OWNER_PREFIX + row.block_digest)  # it begins again where settings say so
        self._images.released(row.block_digest)

    def is_warm(self, image: str) -> Warmth:
        """How much of an image is here. NotFoundError if it is not known on this node."""
        return self._warmth(self._known(image))

    def cache(self) -> dict[str, Any]:
        """The cache, its copies, and the images that are kept."""
        status = self._devices.status()
        kept = [row for row in self._images.rows() if row.pinned or row.prefetched]
        return {
            "cache": status["cache"],
            "fill": status["fill"],
            "kept": [
                {
                    "image": row.reference,
                    "block_digest": row.block_digest,
                    "pinned": row.pinned,
                    "prefetched": row.prefetched,
                }
                for row in kept
            ],
        }

    # -- inside ------------------------------------------------------------------------------------

    def _answer_unpin(self, request: api.Request) -> dict[str, Any]:
        self.unpin(_image(request))
        return {}

    def _answer_warm(self, request: api.Request) -> dict[str, Any]:
        image = request.query.get("image")
        if image is not None:
            return self.is_warm(image).to_json()
        return {"images": [self._warmth(row).to_json() for row in self._images.rows()]}

    def _find(self, image: str) -> ImageRow | None:
        if reference.DIGEST.match(image):
            names = {image}
        else:
            names = {image, lookup.from_text(image).name, lookup.image_name(image)}
        rows = [row for row in self._images.rows() if _names(row) & names]
        return max(rows, key=lambda row: row.created_ns, default=None)  # a tag moves; the latest is meant

    def _known(self, image: str) -> ImageRow:
        row = self._find(image)
        if row is None:
            raise errors.NotFoundError(f"{image} is not on this node; `glowplug prefetch {image}` fetches it")
        return row

    def _warmth(self, row: ImageRow) -> Warmth:
        self._images.attach(row.block_digest)  # after a reboot nobody may have used it yet
        owner = OWNER_PREFIX + row.block_digest
        layers = self._devices.coverage(owner).values()
        copies = {copy["owner"]: copy for copy in self._devices.fills()["copies"]}
        copy = copies.get(owner, {})
        return Warmth(
            image=row.reference,
            source_digest=row.source_digest,
            block_digest=row.block_digest,
            present_bytes=sum(layer.present_bytes for layer in layers),
            total_bytes=sum(layer.total_bytes for layer in layers),
            complete=all(layer.complete for layer in layers),
            pinned=row.pinned,
            prefetched=row.prefetched,
            copy=copy.get("state"),
            error=copy.get("error"),
        )


def _image(request: api.Request) -> str:
    return request.string("image")


def _names(row: ImageRow) -> set[str]:
    return {row.reference, row.source_digest, row.block_digest}
