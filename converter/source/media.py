"""Layer media types: which are read, how each is compressed, and what to say of the others. Pure."""

from __future__ import annotations

import enum

from converter import errors
from imagefs import artifact

PLAIN_LAYER = "application/vnd.oci.image.layer.v1.tar"


class Encoding(enum.Enum):
    """How a layer's tar is compressed."""

    PLAIN = "plain"
    GZIP = "gzip"
    ZSTD = "zstd"


_ENCODINGS = {
    PLAIN_LAYER: Encoding.PLAIN,
    f"{PLAIN_LAYER}+gzip": Encoding.GZIP,
    f"{PLAIN_LAYER}+zstd": Encoding.ZSTD,
    "application/vnd.docker.image.rootfs.diff.tar": Encoding.PLAIN,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": Encoding.GZIP,
    "application/vnd.docker.image.rootfs.diff.tar.zstd": Encoding.ZSTD,
}


def check_layer(number: int, layer: artifact.Descriptor, name: str) -> None:
    """Raise InvalidLayerError unless a layer of this type can be converted."""
    media_type = layer.media_type
    if media_type in _ENCODINGS:
        return
    where = f"{name}: layer {number} ({layer.digest}): media type {media_type!r}"
    if (
        media_type.startswith("application/vnd.oci.image.layer.nondistributable.")
        or ".foreign." in media_type
    ):
        raise errors.InvalidLayerError(
            f"{where} is a non-distributable (foreign) layer: its bytes are not in the registry; "
            "publish the image with ordinary layers first"
        )
    if media_type.endswith("+encrypted"):
        raise errors.InvalidLayerError(f"{where} is encrypted: decrypt the image first (skopeo copy)")
    raise errors.InvalidLayerError(f"{where} is unknown; accepted: tar, tar+gzip, tar+zstd (OCI and Docker)")


def encoding(layer: artifact.Descriptor) -> Encoding:
    """How a layer that passed `check_layer` is compressed."""
    return _ENCODINGS[layer.media_type]
