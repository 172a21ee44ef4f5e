"""From a REF to layers that can be read lazily: the shell that walks the chain of trust.

    REF -> (OCI index -> platform) -> source manifest -> referrers -> artifact.choose -> block image manifest
        -> config, block maps, boot pack's table (in parallel), each verified by its descriptor -> LazyImage

A REF of the block image itself, or of an index of block images, enters the chain further down. Called by
every verb that reads an image; runs on the caller's thread, blob reads on a short-lived pool.

Everything here was written by strangers: sizes and counts are bounded before anything is read, and what two
places say about one thing (map and manifest, manifest and config, manifest and subject) must agree.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from imagefs import artifact, blockmap, bootpack, errors, futures, platforms
from imagefs.artifact import BlockImage, Descriptor, Layer, Manifest
from imagefs.lazylayer import LazyLayer
from imagefs.origin import Origin, connect
from imagefs.reference import Reference

_log = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 8 * 1024 * 1024
MAX_INDEX_DEPTH = 3
"""An OCI index may list indexes; a chain longer than this is refused."""
MAX_INDEX_ENTRIES = 1024
"""Manifests that one index may list. An index of every platform there is has a few dozen."""
MAX_CANDIDATES = 16
"""Block images of one source that are offered to a policy that refuses them, before we give up."""
_PARALLEL_READS = 16

Accept = Callable[[Origin, str, Manifest], None]
"""A trust policy: raises DeniedError for a block image manifest, found in that origin for that source digest,
that must not be used. Asked before anything that the manifest names is read."""


@dataclasses.dataclass(frozen=True, slots=True)
class LazyImage:
    """A block image whose manifest, config and block maps are at hand and verified.

    `layers` is bottom first and runs parallel to `block_image.layers` and `map_bytes` (the maps as stored).
    `boot_pack` is None as well where the block image has one that cannot be used: it makes a start fast, not
    possible. `sources` are the manifests on the way from the REF to the source manifest, an index first;
    empty where the REF led to the block image without them.
    """

    reference: Reference
    manifest: Manifest
    block_image: BlockImage
    config: bytes
    layers: tuple[LazyLayer, ...]
    map_bytes: tuple[bytes, ...]
    origin: Origin
    boot_pack: bootpack.Table | None = None
    sources: tuple[Manifest, ...] = ()

    @property
    def source_digest(self) -> str:
        """Digest of the source image's manifest."""
        return self.block_image.subject.digest

    def config_document(self) -> dict[str, Any]:
        """The source image's config, parsed."""
        return artifact.parse_json_object(self.config, f"config of {self.reference}")


def open_image(
    ref: Reference,
    *,
    platform: platforms.Platform | None = None,
    block_repository: Reference | None = None,
    source_digest: str | None = None,
    options: connect.Options | None = None,
    accept: Accept | None = None,
) -> LazyImage:
    """Open the block image of `ref`: of a source image, or a block image itself.

    `block_repository` names another place where the block image of a source lies. `source_digest` is the
    manifest digest of a source that need not be asked for, or has no origin (docker-archive:,
    docker-daemon:), which makes `block_repository` necessary. `accept` is the trust policy; of several
    candidates the first that it takes is used. Raises NotFoundError when there is no block image,
    DeniedError when there is none that may be used, IntegrityError when the parts do not belong together.
    """
    options = options or connect.Options()
    wanted = platform or platforms.host()
    if source_digest is not None:
        if block_repository is None:
            raise errors.ConfigurationError(
                f"{ref}: nothing can refer to an image in {ref.transport}; say with --block-repository "
                "where its block image is"
            )
        return _open_referrer(ref, source_digest, connect.connect(block_repository, options), accept)
    origin = connect.connect(ref, options)
    *indexes, manifest = _choose_platform(origin, connect.selector(ref), wanted, ref)
    document = artifact.parse_json_object(manifest.data, f"manifest of {ref}")
    if artifact.is_block_image(document):
        if accept is not None:
            accept(origin, artifact.decode(manifest.data).subject.digest, manifest)
        return _load(ref, manifest, origin)
    place = origin if block_repository is None else connect.connect(block_repository, options)
    image = _open_referrer(ref, manifest.digest, place, accept)
    config = artifact.decode_descriptor(document.get("config"), f"manifest of {ref}: config")
    if config.digest != image.block_image.config.digest:
        raise errors.IntegrityError(
            f"block image {image.manifest.digest} of {ref} carries config {image.block_image.config.digest}, "
            f"the source has {config.digest}; convert the image again"
        )
    return dataclasses.replace(image, sources=(*indexes, manifest))


def index_entries(manifest: Manifest, what: str) -> list[Descriptor]:
    """The descriptors that an OCI index or Docker manifest list holds."""
    entries = artifact.parse_json_object(manifest.data, what).get("manifests")
    if not isinstance(entries, list):
        raise errors.InvalidInputError(f"{what}: manifests is not a list")
    if len(entries) > MAX_INDEX_ENTRIES:
        raise errors.InvalidInputError(
            f"{what}: {len(entries)} manifests, at most {MAX_INDEX_ENTRIES} are read"
        )
    return [artifact.decode_descriptor(entry, f"{what}: manifests[{n}]") for n, entry in enumerate(entries)]


def _choose_platform(origin: Origin, name: str, wanted: platforms.Platform, ref: Reference) -> list[Manifest]:
    """The manifest for a platform, after the indexes that led to it."""
    found: list[Manifest] = []
    for _ in range(MAX_INDEX_DEPTH):
        manifest = origin.read_manifest(name)
        found.append(manifest)
        if manifest.media_type not in artifact.INDEX_TYPES:
            return found
        what = f"index {manifest.digest} of {ref}"
        name = platforms.choose(index_entries(manifest, what), wanted, what).digest
    raise errors.InvalidInputError(f"{ref}: more than {MAX_INDEX_DEPTH} indexes inside one another")


def _open_referrer(ref: Reference, digest: str, origin: Origin, accept: Accept | None) -> LazyImage:
    manifest = _referrer(ref, digest, origin, accept)
    image = _load(ref, manifest, origin)
    if image.source_digest != digest:
        raise errors.IntegrityError(
            f"{origin.name} lists {manifest.digest} as block image of {digest}, but its subject is "
            f"{image.source_digest}"
        )
    return image


def _referrer(ref: Reference, digest: str, origin: Origin, accept: Accept | None) -> Manifest:
    """The manifest of the block image of a source: of those that may be used, the one that is chosen."""
    candidates = list(origin.referrers(digest))
    refused: errors.DeniedError | None = None
    for _ in range(MAX_CANDIDATES):
        chosen = artifact.choose(candidates)
        if chosen is None:
            break
        manifest = origin.read_manifest(chosen.digest)
        if accept is None:
            return manifest
        try:
            accept(origin, digest, manifest)
        except errors.DeniedError as exc:
            refused = refused or exc
            candidates = [each for each in candidates if each.digest != chosen.digest]
        else:
            return manifest
    if refused is not None:
        raise refused
    raise errors.NotFoundError(
        f"no block image for {ref} ({digest}) in {origin.name}: run `glowplug convert {ref}`"
    )


def _load(ref: Reference, manifest: Manifest, origin: Origin) -> LazyImage:
    image = artifact.decode(manifest.data)
    if image.config.size > MAX_CONFIG_BYTES:
        raise errors.InvalidInputError(
            f"{ref}: config of {image.config.size} bytes, limit {MAX_CONFIG_BYTES}"
        )
    total = sum(layer.block_map.size for layer in image.layers)
    if total > blockmap.MAX_MAP_BYTES:
        raise errors.InvalidInputError(
            f"{ref}: block maps of {total} bytes in all, limit {blockmap.MAX_MAP_BYTES}"
        )
    wanted = [image.config, *(layer.block_map for layer in image.layers)]
    pool = concurrent.futures.ThreadPoolExecutor(min(_PARALLEL_READS, len(wanted) + 1))
    try:
        reading = pool.submit(read_boot_pack, image, origin)
        config, *maps = futures.results([pool.submit(_read_blob, origin, each) for each in wanted])
        _check_diff_ids(ref, image, config)
        layers = tuple(
            _lazy_layer(ref, number, layer, data, origin)
            for number, (layer, data) in enumerate(zip(image.layers, maps, strict=True))
        )
        boot_pack = _usable_boot_pack(ref, layers, reading)
    finally:
        # Not waited for: after an error, or Ctrl-C, a read may hang in an origin for minutes.
        pool.shutdown(wait=False, cancel_futures=True)
    return LazyImage(
        reference=ref,
        manifest=manifest,
        block_image=image,
        config=config,
        layers=layers,
        map_bytes=tuple(maps),
        origin=origin,
        boot_pack=boot_pack,
    )


def read_boot_pack(image: BlockImage, origin: Origin) -> bootpack.Table | None:
    """The table of a block image's boot pack, verified; None if it has none. Whether its records lie inside
    the layer images, `bootpack.check_layers` knows."""
    if image.boot_pack is None:
        return None
    descriptor = image.boot_pack.table
    if descriptor.size > bootpack.MAX_TABLE_BYTES:
        raise errors.InvalidInputError(
            f"boot pack table {descriptor.digest}: {descriptor.size} bytes, limit {bootpack.MAX_TABLE_BYTES}"
        )
    table = bootpack.decode(_read_blob(origin, descriptor))
    data = image.boot_pack.data
    if (table.data_digest, table.data_bytes) != (data.digest, data.size):
        raise errors.IntegrityError(
            f"boot pack: its data is {table.data_digest} of {table.data_bytes} bytes in the table, "
            f"{data.digest} of {data.size} in the manifest"
        )
    return table


def _usable_boot_pack(
    ref: Reference,
    layers: Sequence[LazyLayer],
    reading: concurrent.futures.Future[bootpack.Table | None],
) -> bootpack.Table | None:
    try:
        (table,) = futures.results([reading])
        if table is not None:
            bootpack.check_layers(table, {layer.map_digest: layer.block_map for layer in layers})
    except errors.ImagefsError as exc:
        _log.warning("%s: started without its boot pack: %s", ref, exc)
        return None
    return table


def _read_blob(origin: Origin, descriptor: Descriptor) -> bytes:
    data = origin.read_blob(descriptor.digest, descriptor.size)
    if len(data) != descriptor.size:
        raise errors.IntegrityError(
            f"{origin.name}: {descriptor.digest} has {len(data)} bytes, its descriptor says {descriptor.size}"
        )
    return data


def _check_diff_ids(ref: Reference, image: BlockImage, config: bytes) -> None:
    document = artifact.parse_json_object(config, f"config of {ref}")
    rootfs = document.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if diff_ids is None and not image.layers:
        return
    if not isinstance(diff_ids, list) or len(diff_ids) != len(image.layers):
        count = len(diff_ids) if isinstance(diff_ids, list) else "no"
        raise errors.IntegrityError(
            f"{ref}: config lists {count} layers, the block image has {len(image.layers)}"
        )
    for number, (layer, diff_id) in enumerate(zip(image.layers, diff_ids, strict=True)):
        if layer.diff_id != diff_id:
            raise errors.IntegrityError(
                f"{ref}: layer {number}: the block image has diff_id {layer.diff_id}, the config {diff_id}"
            )


def _lazy_layer(ref: Reference, number: int, layer: Layer, data: bytes, origin: Origin) -> LazyLayer:
    try:
        value = blockmap.decode(data)
    except errors.InvalidInputError as exc:
        raise errors.InvalidInputError(f"{ref}: layer {number} ({layer.block_map.digest}): {exc}") from exc
    for field, in_map, in_manifest in (
        ("blob digest", f"sha256:{value.blob_digest.hex()}", layer.blob.digest),
        ("blob size", value.blob_bytes, layer.blob.size),
        ("diff_id", f"sha256:{value.diff_id.hex()}", layer.diff_id),
    ):
        if in_map != in_manifest:
            raise errors.IntegrityError(
                f"{ref}: layer {number}: {field} is {in_map} in the block map, {in_manifest} in the manifest"
            )
    return LazyLayer(layer.block_map.digest, layer.blob.digest, value, origin)
