"""Source images in a docker-archive: the tar that `docker save` and `skopeo copy docker-archive:` write.

The outer tar is read by random access (tarfile for the directory of it, pread for the bytes), layers in
parallel. Layers inside may be gzip; the synthesized manifest speaks of the uncompressed tars, so that it does
not depend on who wrote the archive. Called by source.open_images.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converter import errors, inflate
from converter.limits import Limits
from converter.source import MAX_CONFIG_BYTES, SourceImage, SourceLayer, media, parse_config
from imagefs import artifact, readonce
from imagefs import errors as imagefs_errors

_MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_PIECE_BYTES = 1 << 20
_MAX_MEMBERS = 100_000
_GZIP_MAGIC = b"\x1f\x8b"


def open_image(path: Path, wanted_name: str | None, name: str, limits: Limits) -> SourceImage:
    """The image called `wanted_name` (NAME:TAG) in the archive, or its only one. `name` is for messages."""
    members = _Members(path, name)
    entry = _choose(members.json("manifest.json", _MAX_MANIFEST_BYTES), wanted_name, name)
    config_name, layer_names = _names(entry, name)
    config = members.read(config_name, MAX_CONFIG_BYTES)
    platform, diff_ids, chain_ids = parse_config(config, len(layer_names), name)
    layers = []
    for number, (layer_name, diff_id) in enumerate(zip(layer_names, diff_ids, strict=True)):
        start, size = members.place(layer_name)
        gzip = members.pread(start, 2) == _GZIP_MAGIC
        opener = functools.partial(_open_layer, path, start, size, gzip)
        if gzip:
            size = _check_uncompressed(opener, number, diff_id, name, limits)
        descriptor = artifact.Descriptor(media.PLAIN_LAYER, diff_id, size)
        layers.append(SourceLayer(number, descriptor, diff_id, chain_ids[number], opener))
    config_descriptor = artifact.Descriptor(artifact.OCI_CONFIG, artifact.digest_of(config), len(config))
    manifest = _synthesize(config_descriptor, [layer.descriptor for layer in layers])
    return SourceImage(name, manifest, config, config_descriptor, platform, tuple(layers), None)


def _synthesize(config: artifact.Descriptor, layers: list[artifact.Descriptor]) -> artifact.Manifest:
    data = artifact.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": artifact.OCI_MANIFEST,
            "config": artifact.encode_descriptor(config),
            "layers": [artifact.encode_descriptor(layer) for layer in layers],
        }
    )
    return artifact.Manifest(artifact.OCI_MANIFEST, artifact.digest_of(data), data)


def _choose(document: object, wanted_name: str | None, name: str) -> dict[str, Any]:
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise errors.InvalidLayerError(f"{name}: manifest.json is not a list of images")
    entries: list[dict[str, Any]] = document
    tags = [tag for entry in entries for tag in _tags(entry)]
    if wanted_name is None:
        if len(entries) != 1:
            raise imagefs_errors.NotFoundError(
                f"{name}: the archive holds {len(entries)} images, name one "
                f"(docker-archive:FILE:NAME:TAG): {', '.join(tags)}"
            )
        return entries[0]
    for entry in entries:
        if any(_full_name(tag) == _full_name(wanted_name) for tag in _tags(entry)):
            return entry
    raise imagefs_errors.NotFoundError(
        f"{name}: the archive holds no image {wanted_name!r}; there are: {', '.join(tags) or 'none'}"
    )


def _tags(entry: dict[str, Any]) -> list[str]:
    tags = entry.get("RepoTags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _full_name(name: str) -> str:
    """Docker's long form of a short name, so that `app` finds `docker.io/library/app:latest`."""
    if ":" not in name.rpartition("/")[2]:
        name += ":latest"
    first = name.partition("/")[0]
    if "/" not in name:
        return f"docker.io/library/{name}"
    if "." not in first and ":" not in first and first != "localhost":
        return f"docker.io/{name}"
    return name


def _names(entry: dict[str, Any], name: str) -> tuple[str, list[str]]:
    config, layers = entry.get("Config"), entry.get("Layers")
    if isinstance(config, str) and isinstance(layers, list) and all(isinstance(v, str) for v in layers):
        return config, layers
    raise errors.InvalidLayerError(f"{name}: manifest.json: Config or Layers missing")


@contextlib.contextmanager
def _open_layer(path: Path, start: int, size: int, gzip: bool) -> Iterator[Iterator[bytes]]:
    with open(path, "rb", buffering=0) as file:
        pieces = _slice(file.fileno(), start, size)
        yield inflate.inflate(pieces, media.Encoding.GZIP) if gzip else pieces


def _slice(fd: int, start: int, size: int) -> Iterator[bytes]:
    end = start + size
    while start < end:
        piece = readonce.pread(fd, min(_PIECE_BYTES, end - start), start)
        if not piece:
            return
        start += len(piece)
        yield piece


def _check_uncompressed(
    opener: functools.partial[contextlib._GeneratorContextManager[Iterator[bytes]]],
    number: int,
    diff_id: str,
    name: str,
    limits: Limits,
) -> int:
    """The uncompressed size of a gzip layer, which only reading it tells."""
    size = 0
    hasher = hashlib.sha256()
    with opener() as pieces:
        for piece in pieces:
            size += len(piece)
            if size > limits.max_layer_bytes:
                raise errors.LimitError(
                    f"{name}: layer {number}: more than {limits.max_layer_bytes} bytes uncompressed "
                    "(--max-layer-bytes)"
                )
            hasher.update(piece)
    if f"sha256:{hasher.hexdigest()}" != diff_id:
        raise errors.LayerDigestError(
            f"{name}: layer {number}: uncompressed digest sha256:{hasher.hexdigest()} differs from the "
            f"config's diff_id {diff_id}"
        )
    return size


class _Members:
    """The outer tar's directory: where each member's bytes lie. Links between members are followed."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        try:
            with tarfile.open(path, "r:") as tar:
                self._members = {os.path.normpath(member.name): member for member in self._few(tar)}
        except FileNotFoundError as exc:
            raise imagefs_errors.NotFoundError(f"{name}: no such file") from exc
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as exc:
            raise errors.InvalidLayerError(
                f"{name}: not a docker archive: {exc}; decompress it first if it is compressed"
            ) from exc
        except OSError as exc:
            raise imagefs_errors.ConfigurationError(f"{name}: {exc.strerror}") from exc

    def _few(self, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        """The members, in memory from here on. tarfile can be led in a circle: then they come for ever."""
        for count, member in enumerate(tar, 1):
            if count > _MAX_MEMBERS:
                raise errors.LimitError(f"{self._name}: more than {_MAX_MEMBERS} files in a docker archive")
            yield member

    def place(self, member_name: str) -> tuple[int, int]:
        """Byte offset and size of a member in the archive."""
        current = os.path.normpath(member_name)
        for _ in range(8):
            member = self._members.get(current)
            if member is None:
                break
            if member.isreg():
                return member.offset_data, member.size
            if member.issym():
                current = os.path.normpath(os.path.join(os.path.dirname(current), member.linkname))
            else:
                current = os.path.normpath(member.linkname)
        raise errors.InvalidLayerError(f"{self._name}: the archive has no file {member_name!r}")

    def pread(self, start: int, size: int) -> bytes:
        with open(self._path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, start)

    def read(self, member_name: str, max_bytes: int) -> bytes:
        start, size = self.place(member_name)
        if size > max_bytes:
            raise errors.LimitError(f"{self._name}: {member_name} has {size} bytes, at most {max_bytes}")
        data = self.pread(start, size)
        if len(data) != size:
            raise errors.InvalidLayerError(f"{self._name}: {member_name}: the archive ends early")
        return data

    def json(self, member_name: str, max_bytes: int) -> object:
        # parse_json_object wants an object; this document is a list.
        wrapped = b'{"document":' + self.read(member_name, max_bytes) + b"}"
        return artifact.parse_json_object(wrapped, f"{self._name}: {member_name}")["document"]
