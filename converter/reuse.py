"""Layers that were converted before: where they are looked for, and what is checked before one is used.

A layer index is a set of tags in an origin, one per reuse key: `glowplug-layer-` and 32 hex digits of the
key's sha256. The tag names a small artifact manifest, the block map its config and the blob its layer, which
also keeps the two from garbage collection. Tags are what registries, buckets and folders all have, so the
destination and the local layer cache (an OCI layout) are used through one class.

Whatever is found was written by strangers: the full key, the map's digest and parameters, and the blob's
presence are checked. What fails a check is treated as absent, because converting again is always right.

A found map names the compressed layer that it was made from. The blob is a function of the tar alone, so for
another compression of the same tar the map is written anew around the same blob: reuse and conversion give
the same digests.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

from imagefs import artifact, blockmap, errors, lazylayer
from imagefs.artifact import Descriptor
from imagefs.origin import Origin

LAYER_ARTIFACT_TYPE = "application/vnd.glowplug.layer.v1"
_UNUSABLE = (errors.NotFoundError, errors.InvalidInputError, errors.IntegrityError)


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """What a converted layer must have been made from and with. `chain_id` is None for a layer that depends
    on its own tar alone. `layout_version` is erofs_writer.LAYOUT_VERSION."""

    layout_version: int
    diff_id: str
    chain_id: str | None
    block_bytes: int
    frame_bytes: int
    compression_level: int
    libzstd_version: int

    def __str__(self) -> str:
        return artifact.reuse_key(**dataclasses.asdict(self))

    def fits(self, value: blockmap.BlockMap) -> bool:
        """Whether a block map says that it was made from and with this."""
        return (
            self.diff_id == f"sha256:{value.diff_id.hex()}"
            and self.chain_id == (None if value.chain_id is None else f"sha256:{value.chain_id.hex()}")
            and self.block_bytes == value.block_bytes
            and self.frame_bytes == value.frame_bytes
            and self.compression_level == value.compression_level
            and self.libzstd_version == value.libzstd_version
        )


@dataclasses.dataclass(frozen=True, slots=True)
class FoundLayer:
    """A converted layer in `origin`: its map as stored there, and its blob."""

    key: Key
    block_map: blockmap.BlockMap
    blob: Descriptor
    origin: Origin

    def map_for(self, source_digest: str) -> bytes:
        """The block map for a source layer of this digest."""
        raw = bytes.fromhex(source_digest.removeprefix("sha256:"))
        return blockmap.encode(dataclasses.replace(self.block_map, source_digest=raw))


class LayerIndex:
    """The converted layers that one origin holds."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin

    def find(self, key: Key) -> FoundLayer | None:
        """The layer under `key`, checked, or None."""
        try:
            manifest = self.origin.read_manifest(_tag(key))
            document = artifact.parse_json_object(manifest.data, "layer manifest")
            layers = document.get("layers")
            if not isinstance(layers, list) or len(layers) != 1:
                return None
            block_map = artifact.decode_descriptor(document.get("config"), "layer manifest: config")
            blob = artifact.decode_descriptor(layers[0], "layer manifest: layers[0]")
            if block_map.annotations.get(artifact.REUSE_KEY) != str(key):
                return None
            return open_layer(self.origin, key, block_map, blob)
        except _UNUSABLE:
            return None

    def record(self, key: Key, block_map: Descriptor, blob: Descriptor) -> None:
        """Make a layer whose map and blob are in the origin findable."""
        annotations = {artifact.REUSE_KEY: str(key), artifact.DIFF_ID: key.diff_id}
        data = artifact.canonical_json(
            {
                "schemaVersion": 2,
                "mediaType": artifact.OCI_MANIFEST,
                "artifactType": LAYER_ARTIFACT_TYPE,
                "config": artifact.encode_descriptor(dataclasses.replace(block_map, annotations=annotations)),
                "layers": [artifact.encode_descriptor(blob)],
            }
        )
        self.origin.put_manifest(data, artifact.OCI_MANIFEST, _tag(key))


class ReferrerLayers:
    """The layers of the block images that an origin already holds for one source manifest."""

    def __init__(self, origin: Origin, source_digest: str) -> None:
        self.origin = origin
        self._layers = {layer.reuse_key: layer for layer in _referrer_layers(origin, source_digest)}

    def find(self, key: Key) -> FoundLayer | None:
        """The layer under `key`, checked, or None."""
        layer = self._layers.get(str(key))
        if layer is None:
            return None
        try:
            return open_layer(self.origin, key, layer.block_map, layer.blob)
        except _UNUSABLE:
            return None


def open_layer(origin: Origin, key: Key, map_descriptor: Descriptor, blob: Descriptor) -> FoundLayer | None:
    """The layer behind two descriptors if it is what `key` asks for and its blob is there."""
    data = origin.read_blob(map_descriptor.digest, min(map_descriptor.size, blockmap.MAX_MAP_BYTES))
    block_map = blockmap.decode(data)
    if not key.fits(block_map) or blob.media_type != artifact.BLOB_MEDIA_TYPE:
        return None
    if (f"sha256:{block_map.blob_digest.hex()}", block_map.blob_bytes) != (blob.digest, blob.size):
        return None
    if not origin.has_blob(blob.digest):
        return None
    return FoundLayer(key, block_map, blob, origin)


def lazy_layer(found: FoundLayer) -> lazylayer.LazyLayer:
    """A found layer, to be read block by block."""
    digest = artifact.digest_of(blockmap.encode(found.block_map))
    return lazylayer.LazyLayer(digest, found.blob.digest, found.block_map, found.origin)


def _referrer_layers(origin: Origin, source_digest: str) -> Iterator[artifact.Layer]:
    for candidate in origin.referrers(source_digest):
        if candidate.artifact_type != artifact.ARTIFACT_TYPE:
            continue
        try:
            yield from artifact.decode(origin.read_manifest(candidate.digest).data).layers
        except _UNUSABLE:
            continue


def _tag(key: Key) -> str:
    return "glowplug-layer-" + hashlib.sha256(str(key).encode()).hexdigest()[:32]
