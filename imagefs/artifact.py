"""The block image as an OCI artifact: its manifest, its descriptors, and which of several candidates counts.

Pure: bytes in, values out. The first links of the chain of trust are checked by whoever calls: the manifest
against its digest (the origins do that), each block map against its descriptor. docs/format.md has the form.

A block image manifest holds, in source layer order (bottom first), one pair per layer: block map, layer blob;
then, if it has a boot pack, one more pair: the pack's table, its data. Its config is the source image's own
config blob, so that a container can be started from the block image alone; its `subject` is the source
manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from imagefs import errors, reference

ARTIFACT_TYPE = "application/vnd.glowplug.block-image.v1"
MAP_MEDIA_TYPE = "application/vnd.glowplug.block-map.v1"
BLOB_MEDIA_TYPE = "application/vnd.glowplug.layer-blob.v1+zstd"
PACK_TABLE_MEDIA_TYPE = "application/vnd.glowplug.boot-pack-table.v1"
PACK_DATA_MEDIA_TYPE = "application/vnd.glowplug.boot-pack.v1+zstd"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_INDEX)

REUSE_KEY = "dev.glowplug.reuse-key"
"""Annotation on each block map descriptor: the key under which this layer may be reused (`reuse_key`)."""
DIFF_ID = "dev.glowplug.diff-id"
"""Annotation on each block map descriptor: the `diff_id` of the layer, for readers of the manifest."""
BOOT_PACK = "dev.glowplug.boot-pack"
"""Annotation on the manifest of a block image with a boot pack: the digest of the pack's table. Lists of
referrers repeat it, so that `choose` sees it."""
BOOT_PACK_GENERATION = "dev.glowplug.boot-pack-generation"
"""Annotation beside BOOT_PACK: a decimal number; a pack made later has a higher one."""

MAX_LAYERS = 512
MAX_GENERATION = 999_999_999


@dataclasses.dataclass(frozen=True, slots=True)
class Descriptor:
    """An OCI content descriptor. `size` in bytes; `annotations` and `platform` as in the OCI image spec."""

    media_type: str
    digest: str
    size: int
    artifact_type: str | None = None
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    platform: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest or OCI index as stored: `digest` is the sha256 of `data`."""

    media_type: str
    digest: str
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a block image."""

    block_map: Descriptor
    blob: Descriptor
    reuse_key: str
    diff_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class BootPack:
    """The boot pack of a block image (`bootpack.py`)."""

    table: Descriptor
    data: Descriptor
    generation: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class BlockImage:
    """A decoded block image manifest. `layers` is bottom first."""

    subject: Descriptor
    config: Descriptor
    layers: tuple[Layer, ...]
    boot_pack: BootPack | None = None


def digest_of(data: bytes) -> str:
    """`sha256:` digest of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def canonical_json(value: object) -> bytes:
    """The one JSON form of a value: sorted keys, no spaces, UTF-8; so that digests are deterministic.
    InvalidInputError for a string that UTF-8 cannot hold, as JSON's escapes can make one."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise errors.InvalidInputError(
            f"a lone surrogate in {exc.object[exc.start - 40 : exc.end]!r}"
        ) from exc


def reuse_key(
    *,
    layout_version: int,
    diff_id: str,
    chain_id: str | None,
    block_bytes: int,
    frame_bytes: int,
    compression_level: int,
    libzstd_version: int,
) -> str:
    """The key under which a converted layer may stand for a source layer (design: "Which layers are
    reusable"). `layout_version` is the layer image writer's; `chain_id` is given only for a layer that
    depends on what lies below it."""
    own = f"chain={chain_id}" if chain_id else f"diff={diff_id}"
    made_with = f"level={compression_level}/zstd={libzstd_version}"
    return f"v{layout_version}/block={block_bytes}/frame={frame_bytes}/{made_with}/{own}"


def encode(image: BlockImage) -> bytes:
    """The manifest's bytes: canonical JSON, the same for the same input."""
    layers: list[dict[str, Any]] = []
    for layer in image.layers:
        annotations = {REUSE_KEY: layer.reuse_key, DIFF_ID: layer.diff_id}
        layers.append(encode_descriptor(dataclasses.replace(layer.block_map, annotations=annotations)))
        layers.append(encode_descriptor(layer.blob))
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": encode_descriptor(image.config),
        "layers": layers,
        "subject": encode_descriptor(image.subject),
    }
    if image.boot_pack is not None:
        layers += (encode_descriptor(image.boot_pack.table), encode_descriptor(image.boot_pack.data))
        document["annotations"] = annotations_of(image.boot_pack)
    return canonical_json(document)


def annotations_of(pack: BootPack) -> dict[str, str]:
    """What the manifest of a block image with this pack, and its entry in a list of referrers, say of it."""
    return {BOOT_PACK: pack.table.digest, BOOT_PACK_GENERATION: str(pack.generation)}


def is_block_image(document: Mapping[str, Any]) -> bool:
    """Whether a parsed manifest says that it is a block image of a version we read."""
    return document.get("artifactType") == ARTIFACT_TYPE


def decode(data: bytes) -> BlockImage:
    """Parse a block image manifest. Raises InvalidInputError naming the field."""
    document = parse_json_object(data, "block image manifest")
    if not is_block_image(document):
        raise errors.InvalidInputError(
            f"manifest: artifactType {document.get('artifactType')!r} is not a block image ({ARTIFACT_TYPE})"
        )
    entries = document.get("layers")
    if not isinstance(entries, list) or len(entries) % 2 or len(entries) > 2 * MAX_LAYERS + 2:
        raise errors.InvalidInputError(
            "block image manifest: layers is not a list of (block map, blob) pairs"
        )
    boot_pack = _decode_boot_pack(document, entries)
    if boot_pack is not None:
        entries = entries[:-2]
    layers = []
    for number in range(0, len(entries), 2):
        block_map = decode_descriptor(entries[number], f"layers[{number}]")
        blob = decode_descriptor(entries[number + 1], f"layers[{number + 1}]")
        if block_map.media_type != MAP_MEDIA_TYPE or blob.media_type != BLOB_MEDIA_TYPE:
            raise errors.InvalidInputError(
                f"block image manifest: layers[{number}] is not a (map, blob) pair"
            )
        diff_id = block_map.annotations.get(DIFF_ID, "")
        if not reference.DIGEST.match(diff_id):
            raise errors.InvalidInputError(
                f"block image manifest: layers[{number}]: annotation {DIFF_ID} missing"
            )
        layers.append(Layer(block_map, blob, block_map.annotations.get(REUSE_KEY, ""), diff_id))
    return BlockImage(
        subject=decode_descriptor(document.get("subject"), "subject"),
        config=decode_descriptor(document.get("config"), "config"),
        layers=tuple(layers),
        boot_pack=boot_pack,
    )


def _decode_boot_pack(document: Mapping[str, Any], entries: list[Any]) -> BootPack | None:
    annotations = _strings(document.get("annotations"), "block image manifest: annotations")
    if BOOT_PACK not in annotations:
        return None
    if len(entries) < 2:
        raise errors.InvalidInputError("block image manifest: layers lacks the boot pack that it announces")
    number = len(entries) - 2
    table = decode_descriptor(entries[number], f"layers[{number}]")
    data = decode_descriptor(entries[number + 1], f"layers[{number + 1}]")
    if table.media_type != PACK_TABLE_MEDIA_TYPE or data.media_type != PACK_DATA_MEDIA_TYPE:
        raise errors.InvalidInputError(f"block image manifest: layers[{number}] is not a boot pack's table")
    generation = _generation(annotations)
    if generation == 0 or annotations[BOOT_PACK] != table.digest:
        raise errors.InvalidInputError(
            f"block image manifest: annotations say boot pack {annotations[BOOT_PACK]!r} of generation "
            f"{annotations.get(BOOT_PACK_GENERATION)!r}, layers[{number}] is {table.digest}"
        )
    return BootPack(table, data, generation)


def _generation(annotations: Mapping[str, str]) -> int:
    """Of a boot pack, 1 or more; 0 without one, or if the annotation is malformed."""
    text = annotations.get(BOOT_PACK_GENERATION, "")
    if BOOT_PACK not in annotations or not (text.isascii() and text.isdigit() and len(text) <= 9):
        return 0
    return int(text)


def next_generation(candidates: Iterable[Descriptor]) -> int:
    """The generation that a new boot pack needs, to count before the packs of these block images."""
    found = [_generation(c.annotations) for c in candidates if c.artifact_type == ARTIFACT_TYPE]
    return min(max(found, default=0) + 1, MAX_GENERATION)


def choose(candidates: Iterable[Descriptor]) -> Descriptor | None:
    """The block image among the referrers of one source manifest, or None.

    The rule: of those whose artifactType this build reads, the one whose boot pack has the highest
    generation (any before none); of several, the one with the lowest digest. Every node makes the same
    choice from the same set, whatever order a registry lists it in.
    """
    own = [c for c in candidates if c.artifact_type == ARTIFACT_TYPE]
    return min(own, key=lambda c: (-_generation(c.annotations), c.digest), default=None)


def encode_descriptor(value: Descriptor) -> dict[str, Any]:
    """A descriptor as a JSON object."""
    out: dict[str, Any] = {"mediaType": value.media_type, "digest": value.digest, "size": value.size}
    if value.artifact_type:
        out["artifactType"] = value.artifact_type
    if value.annotations:
        out["annotations"] = dict(value.annotations)
    if value.platform:
        out["platform"] = dict(value.platform)
    return out


def decode_descriptor(value: object, where: str) -> Descriptor:
    """A descriptor from parsed JSON. Raises InvalidInputError naming `where` and the field."""
    if not isinstance(value, dict):
        raise errors.InvalidInputError(f"{where}: descriptor missing")
    media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if not isinstance(media_type, str):
        raise errors.InvalidInputError(f"{where}: mediaType missing")
    if not isinstance(digest, str) or not reference.DIGEST.match(digest):
        raise errors.InvalidInputError(f"{where}: digest {digest!r} is not a sha256 digest")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise errors.InvalidInputError(f"{where}: size {size!r} is not a byte count")
    artifact_type = value.get("artifactType")
    return Descriptor(
        media_type=media_type,
        digest=digest,
        size=size,
        artifact_type=artifact_type if isinstance(artifact_type, str) else None,
        annotations=_strings(value.get("annotations"), f"{where}.annotations"),
        platform=_platform(value.get("platform")),
    )


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object from bytes. Raises InvalidInputError; depth bombs are refused like other bad JSON."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise errors.InvalidInputError(f"{what}: not JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise errors.InvalidInputError(f"{what}: not a JSON object")
    return document


def _strings(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise errors.InvalidInputError(f"{where}: not a map of strings")
    return value


def _platform(value: object) -> dict[str, str] | None:
    if not isinstance(value, dict):
        return None
    return {k: v for k, v in value.items() if isinstance(v, str)}
