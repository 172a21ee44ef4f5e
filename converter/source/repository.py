"""Source images in an origin: docker:// (registry), oci: (folder), s3:// (bucket).

Runs in the caller's thread; layer streams in whichever thread opens them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from converter import errors
from converter.source import (
    MAX_CONFIG_BYTES,
    SourceImage,
    SourceLayer,
    Wanted,
    check_platform,
    media,
    parse_config,
)
from imagefs import artifact, image, platforms, reference
from imagefs import errors as imagefs_errors
from imagefs.origin import Origin, connect

_REFERENCE_TYPE = "vnd.docker.reference.type"
"""Docker's annotation on index entries that describe another entry (attestations)."""

_MAX_INDEXES = 32
_MAX_IMAGES = 256


def open_images(ref: reference.Reference, options: connect.Options, wanted: Wanted) -> list[SourceImage]:
    """See source.open_images."""
    origin = connect.connect(ref, options)
    try:
        top = origin.read_manifest(connect.selector(ref))
        images = [_open_image(origin, ref, manifest) for manifest in _choose(origin, ref, top, wanted)]
    except BaseException:
        origin.close()
        raise
    if top.media_type not in artifact.INDEX_TYPES:
        check_platform(images[0].platform, wanted, str(ref))
    return images


def _choose(
    origin: Origin, ref: reference.Reference, top: artifact.Manifest, wanted: Wanted
) -> list[artifact.Manifest]:
    if top.media_type not in artifact.INDEX_TYPES:
        return [top]
    entries = list(_image_entries(origin, top, str(ref)))
    if not entries:
        raise imagefs_errors.NotFoundError(f"{ref}: the index holds no image")
    if wanted != "all":
        entries = [platforms.choose(entries, wanted or platforms.host(), str(ref))]
    if len(entries) > _MAX_IMAGES:
        raise errors.LimitError(
            f"{ref}: {len(entries)} images in one index, at most {_MAX_IMAGES} are converted"
        )
    return [origin.read_manifest(entry.digest) for entry in entries]


def _image_entries(origin: Origin, top: artifact.Manifest, name: str) -> Iterator[artifact.Descriptor]:
    """The image manifests of an index, in its order; indexes in it are followed, attestations and other
    artifacts left out."""
    # Each index once, and not many: what a few of them list between them is bounded, what they could is not.
    seen = {top.digest}
    levels = [iter(image.index_entries(top, f"{name}: index {top.digest}"))]
    while levels:
        for entry in levels[-1]:
            if entry.media_type in artifact.INDEX_TYPES:
                if len(levels) == image.MAX_INDEX_DEPTH:
                    raise errors.InvalidLayerError(
                        f"{name}: more than {image.MAX_INDEX_DEPTH} indexes inside one another"
                    )
                if entry.digest in seen:
                    continue
                seen.add(entry.digest)
                if len(seen) > _MAX_INDEXES:
                    raise errors.LimitError(f"{name}: more than {_MAX_INDEXES} indexes")
                inner = origin.read_manifest(entry.digest)
                levels.append(iter(image.index_entries(inner, f"{name}: index {inner.digest}")))
                break
            if entry.media_type in artifact.MANIFEST_TYPES and not _is_about_another(entry):
                yield entry
        else:
            levels.pop()


def _is_about_another(entry: artifact.Descriptor) -> bool:
    unknown = entry.platform is not None and entry.platform.get("os") == "unknown"
    return unknown or _REFERENCE_TYPE in entry.annotations or entry.artifact_type is not None


def manifest_parts(
    manifest: artifact.Manifest, name: str
) -> tuple[dict[str, Any], artifact.Descriptor, list[artifact.Descriptor]]:
    """Document, config and layer descriptors of an image manifest."""
    where = f"{name}: manifest {manifest.digest}"
    if manifest.media_type not in artifact.MANIFEST_TYPES:
        raise errors.InvalidLayerError(
            f"{where}: media type {manifest.media_type!r} is not an image manifest; accepted: OCI image "
            "manifest, Docker image manifest version 2 schema 2"
        )
    document = artifact.parse_json_object(manifest.data, where)
    config = artifact.decode_descriptor(document.get("config"), f"{where}: config")
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise errors.InvalidLayerError(f"{where}: layers is not a list")
    return (
        document,
        config,
        [artifact.decode_descriptor(v, f"{where}: layers[{n}]") for n, v in enumerate(layers)],
    )


def _open_image(origin: Origin, ref: reference.Reference, manifest: artifact.Manifest) -> SourceImage:
    name = str(ref)
    document, config, descriptors = manifest_parts(manifest, name)
    if artifact.is_block_image(document):
        raise errors.InvalidLayerError(f"{name}: is a block image already; convert its source image")
    for number, descriptor in enumerate(descriptors):
        media.check_layer(number, descriptor, name)
    config_bytes = origin.read_blob(config.digest, MAX_CONFIG_BYTES)
    platform, diff_ids, chain_ids = parse_config(config_bytes, len(descriptors), name)
    layers = tuple(
        SourceLayer(number, descriptor, diff_id, chain_id, _Stream(origin, descriptor))
        for number, (descriptor, diff_id, chain_id) in enumerate(
            zip(descriptors, diff_ids, chain_ids, strict=True)
        )
    )
    return SourceImage(name, manifest, config_bytes, config, platform, layers, origin)


class _Stream:
    """Opens one blob of the origin."""

    def __init__(self, origin: Origin, descriptor: artifact.Descriptor) -> None:
        self._origin = origin
        self._descriptor = descriptor

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Iterator[bytes]]:
        # Not verified here: whoever reads a source layer compares its digest (converter.sourcetar).
        pieces = self._origin.stream_range(self._descriptor.digest, 0, self._descriptor.size)
        try:
            yield pieces
        finally:
            pieces.close()
