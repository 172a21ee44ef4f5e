"""Source images: one view over every transport that an image can come from.

Owns the values that the rest of the converter works on, and `open_images`, which picks the transport and the
platforms. A view is immutable: manifest, config and layers were read and checked against their digests when
it was made; layer bytes are streamed when a layer is converted, and verified there.

`docker-archive:` and `docker-daemon:` have no manifest of their own. One is synthesized from the config and
the uncompressed layers, canonical JSON, so that its digest is the same from any machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from converter import errors
from converter.limits import Limits
from imagefs import artifact, platforms, reference
from imagefs import errors as imagefs_errors

if TYPE_CHECKING:
    from imagefs.origin import Origin
    from imagefs.origin.connect import Options

DEFAULT_LIMITS = Limits()
MAX_CONFIG_BYTES = 8 * 1024 * 1024

AllPlatforms = Literal["all"]
Wanted = platforms.Platform | AllPlatforms | None
"""Which of an index's images: one, all, or (None) this machine's; an image without an index as it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class SourceLayer:
    """One layer, bottom is number 0. `descriptor` is the manifest's; `diff_id` is what the config claims.

    `open()` gives the blob's bytes in order in pieces of about 1 MiB; leaving the context releases what it
    holds. Nobody has verified the bytes yet.
    """

    number: int
    descriptor: artifact.Descriptor
    diff_id: str
    chain_id: str
    open: Callable[[], contextlib.AbstractContextManager[Iterator[bytes]]]


@dataclasses.dataclass(frozen=True, slots=True)
class SourceImage:
    """One image for one platform.

    `name` is the REF for messages. `manifest` is what block images name as their subject, with its
    descriptor; `origin` is where its blobs lie, None when they lie in a file.
    """

    name: str
    manifest: artifact.Manifest
    config: bytes
    config_descriptor: artifact.Descriptor
    platform: platforms.Platform
    layers: tuple[SourceLayer, ...]
    origin: Origin | None

    @property
    def subject(self) -> artifact.Descriptor:
        """The descriptor of the manifest."""
        return artifact.Descriptor(self.manifest.media_type, self.manifest.digest, len(self.manifest.data))


def open_images(
    ref: reference.Reference,
    options: Options,
    wanted: Wanted,
    work_dir: Path,
    limits: Limits = DEFAULT_LIMITS,
) -> list[SourceImage]:
    """The images of `ref` for the wanted platforms, at least one.

    `work_dir` takes what a transport must spool (docker-daemon); the caller removes it. The caller closes
    the images' origin.
    """
    from converter.source import archive, daemon, repository

    if ref.transport == "docker-archive":
        return [_checked(archive.open_image(Path(ref.location), ref.tag, str(ref), limits), wanted)]
    if ref.transport == "docker-daemon":
        return [_checked(daemon.open_image(ref, work_dir, limits), wanted)]
    return repository.open_images(ref, options, wanted)


def parse_config(
    config: bytes, layer_count: int, name: str
) -> tuple[platforms.Platform, list[str], list[str]]:
    """Platform, diff_ids and chain_ids from an image config. Raises InvalidLayerError naming the field."""
    document = artifact.parse_json_object(config, f"{name}: image config")
    rootfs = document.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or not all(
        isinstance(value, str) and reference.DIGEST.match(value) for value in diff_ids
    ):
        raise errors.InvalidLayerError(
            f"{name}: image config: rootfs.diff_ids is not a list of sha256 digests"
        )
    if len(diff_ids) != layer_count:
        raise errors.InvalidLayerError(
            f"{name}: the manifest has {layer_count} layers, the image config {len(diff_ids)} diff_ids"
        )
    if layer_count > artifact.MAX_LAYERS:
        raise errors.LimitError(f"{name}: {layer_count} layers, at most {artifact.MAX_LAYERS} are accepted")
    return platform_of_config(document), diff_ids, chain_ids(diff_ids)


def chain_ids(diff_ids: list[str]) -> list[str]:
    """The chain_id of every layer (OCI image spec, config.md "Layer ChainID")."""
    out: list[str] = []
    for diff_id in diff_ids:
        out.append(artifact.digest_of(f"{out[-1]} {diff_id}".encode()) if out else diff_id)
    return out


def platform_of_config(document: Mapping[str, Any]) -> platforms.Platform:
    """The platform that an image config names; fields that it leaves out are empty."""
    fields = (document.get(name) for name in ("os", "architecture", "variant"))
    return platforms.Platform(*(value if isinstance(value, str) else "" for value in fields))


def check_platform(found: platforms.Platform, wanted: Wanted, name: str) -> None:
    """An image that stands alone is taken as it is, unless another platform was named: NotFoundError."""
    if not isinstance(wanted, platforms.Platform):
        return
    same = (found.system, found.architecture) == (wanted.system, wanted.architecture)
    if not same or (wanted.variant and found.variant != wanted.variant):
        raise imagefs_errors.NotFoundError(f"{name}: the image is for {found}, not for {wanted}")


def _checked(image: SourceImage, wanted: Wanted) -> SourceImage:
    check_platform(image.platform, wanted, image.name)
    return image
