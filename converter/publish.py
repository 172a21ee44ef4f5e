"""The destination of a conversion: layers as they are finished, then the block image, then the tag.

Called by the pipeline: `put_layer` from its upload threads while other layers still convert, the rest from
the main thread once every layer is there. Nothing is tagged before everything it names is stored; an
interrupted conversion leaves blobs, and layers that the next try finds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from converter import copying, errors, reuse
from converter.source import SourceImage
from imagefs import artifact, blockmap
from imagefs.artifact import Descriptor
from imagefs.origin import BlobSource, BytesSource, FileSource, Origin


@dataclasses.dataclass(frozen=True, slots=True)
class FinishedLayer:
    """A layer ready to be published. Its blob is the whole of `file`, or lies in `found`'s origin."""

    key: reuse.Key
    map_bytes: bytes
    block_map: blockmap.BlockMap
    blob: Descriptor
    file: Path | None
    found: reuse.FoundLayer | None

    @property
    def map_descriptor(self) -> Descriptor:
        """The descriptor of the block map."""
        return Descriptor(artifact.MAP_MEDIA_TYPE, artifact.digest_of(self.map_bytes), len(self.map_bytes))


class Destination:
    """One origin that block images go to, and the layer cache that is filled beside it. `check` is called
    before each piece of an upload, and raises to break it off."""

    def __init__(self, origin: Origin, cache: reuse.LayerIndex | None, check: Callable[[], None]) -> None:
        self.origin = origin
        self._layers = reuse.LayerIndex(origin)
        self._cache = cache
        self._check = check

    def links(self, folder: Path) -> bool:
        """Whether a layer's file in `folder` is stored as it is, not copied."""
        return self.origin.links(folder) or (self._cache is not None and self._cache.origin.links(folder))

    def put_layer(self, layer: FinishedLayer) -> None:
        """Store blob and map, and make the layer findable."""
        if layer.file is not None:
            self._put_new(self._layers, layer, layer.file)
            if self._cache is not None:
                self._put_new(self._cache, layer, layer.file)
            return
        assert layer.found is not None
        copying.bring_blob(layer.blob, layer.found.origin, self.origin)
        self._put_map(self.origin, layer)
        if layer.found.origin is not self.origin:
            self._layers.record(layer.key, layer.map_descriptor, layer.blob)

    def put_image(self, image: SourceImage, layers: Sequence[FinishedLayer], tag: str | None) -> Descriptor:
        """Store the block image of `image`, whose layers are all stored, and point `tag` at it."""
        total = sum(len(layer.map_bytes) for layer in layers)
        if total > blockmap.MAX_MAP_BYTES:
            raise errors.LimitError(
                f"{image.name}: block maps of {total} bytes, readers take {blockmap.MAX_MAP_BYTES}; "
                "choose larger blocks or frames (--block-size, --frame-size)"
            )
        config = image.config_descriptor
        self.origin.put_blob(config.digest, config.size, BytesSource(image.config))
        data = artifact.encode(
            artifact.BlockImage(
                subject=image.subject,
                config=config,
                layers=tuple(
                    artifact.Layer(layer.map_descriptor, layer.blob, str(layer.key), layer.key.diff_id)
                    for layer in layers
                ),
            )
        )
        digest = self.origin.put_manifest(data, artifact.OCI_MANIFEST, tag)
        return Descriptor(artifact.OCI_MANIFEST, digest, len(data), artifact.ARTIFACT_TYPE)

    def put_index(self, images: Sequence[tuple[Descriptor, SourceImage]], tag: str) -> Descriptor:
        """Store an OCI index of block images, one per platform, and point `tag` at it."""
        data = artifact.canonical_json(
            {
                "schemaVersion": 2,
                "mediaType": artifact.OCI_INDEX,
                "manifests": [_entry(descriptor, image) for descriptor, image in images],
            }
        )
        digest = self.origin.put_manifest(data, artifact.OCI_INDEX, tag)
        return Descriptor(artifact.OCI_INDEX, digest, len(data))

    def _put_new(self, index: reuse.LayerIndex, layer: FinishedLayer, file: Path) -> None:
        digest, size = layer.blob.digest, layer.blob.size
        if not index.origin.link_blob(digest, size, file):
            index.origin.put_blob(digest, size, _Checked(FileSource(file, size), self._check))
        self._put_map(index.origin, layer)
        index.record(layer.key, layer.map_descriptor, layer.blob)

    def _put_map(self, origin: Origin, layer: FinishedLayer) -> None:
        descriptor = layer.map_descriptor
        origin.put_blob(descriptor.digest, descriptor.size, BytesSource(layer.map_bytes))


def _entry(descriptor: Descriptor, image: SourceImage) -> dict[str, Any]:
    platform = {"os": image.platform.system, "architecture": image.platform.architecture}
    if image.platform.variant:
        platform["variant"] = image.platform.variant
    return artifact.encode_descriptor(dataclasses.replace(descriptor, platform=platform))


@dataclasses.dataclass(frozen=True, slots=True)
class _Checked:
    """A blob source whose reader stops when the conversion was cancelled."""

    source: BlobSource
    check: Callable[[], None]

    def open(self, offset: int) -> Iterator[bytes]:
        for piece in self.source.open(offset):
            self.check()
            yield piece
