"""Copying between origins: blobs one by one, and a source image together with its block images.

Bytes are streamed through, mounted where the registry can do that, and never stored here. Every manifest is
read by digest (verified by the origin), every blob verified by the destination as it arrives. Manifests
follow their blobs, indexes their manifests, block images their subject; the tag comes last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from converter import errors, tasks
from imagefs import artifact, image, platforms, reference
from imagefs import errors as imagefs_errors
from imagefs.artifact import Descriptor, Manifest
from imagefs.origin import Origin, connect

_PARALLEL_BLOBS = 4
_MAX_MANIFESTS = 4096
"""Manifests and indexes that one copy moves."""


@dataclasses.dataclass(frozen=True, slots=True)
class OriginSource:
    """A blob of another origin, to be uploaded."""

    origin: Origin
    digest: str
    size: int

    def open(self, offset: int) -> Iterator[bytes]:
        # Not verified here: the destination compares the digest of what it gets.
        return self.origin.stream_range(self.digest, offset, self.size - offset)


def bring_blob(descriptor: Descriptor, source: Origin, destination: Origin) -> str:
    """Make a blob of `source` appear in `destination`. Returns "present", "mounted" or "copied"."""
    if destination.has_blob(descriptor.digest):
        return "present"
    if destination.mount_blob(descriptor.digest, source):
        return "mounted"
    body = OriginSource(source, descriptor.digest, descriptor.size)
    destination.put_blob(descriptor.digest, descriptor.size, body)
    return "copied"


@dataclasses.dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did. `bytes_copied` counts what went through this machine."""

    source: str
    destination: str
    digest: str
    block_images: tuple[str, ...]
    blobs: int
    blobs_mounted: int
    blobs_present: int
    bytes_copied: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Item:
    """A manifest to copy with what it names: where it comes from, and where it goes."""

    manifest: Manifest
    origin: Origin
    place: Origin


def copy(
    source: reference.Reference,
    destination: reference.Reference,
    options: connect.Options,
    platform: platforms.Platform | None = None,
    block_repository: reference.Reference | None = None,
) -> Copied:
    """Copy the image (all of an index, or one platform of it) and its block images.

    `block_repository` is for destinations that drop referrers: block images are kept there instead of beside
    the destination, and looked for there if the source has none beside it."""
    for ref in (source, destination):
        if ref.transport not in ("docker", "oci", "s3"):
            raise imagefs_errors.InvalidInputError(
                f"{ref}: copy works between docker://, oci: and s3://; bring it there with skopeo first"
            )
    origins = [connect.connect(ref, options) for ref in (source, destination)]
    if block_repository is not None:
        origins.append(connect.connect(block_repository, options))
    try:
        return _copy(source, destination, origins, platform)
    finally:
        for origin in origins:
            origin.close()


def _copy(
    source: reference.Reference,
    destination: reference.Reference,
    origins: list[Origin],
    platform: platforms.Platform | None,
) -> Copied:
    here, there, *elsewhere = origins
    kept = elsewhere[0] if elsewhere else there
    top = here.read_manifest(connect.selector(source))
    if platform is not None and top.media_type in artifact.INDEX_TYPES:
        entries = image.index_entries(top, str(source))
        top = here.read_manifest(platforms.choose(entries, platform, str(source)).digest)
    if destination.digest not in (None, top.digest):
        raise imagefs_errors.IntegrityError(f"{destination}: the source's digest is {top.digest}")
    images = list(_walk(here, there, top, image.MAX_INDEX_DEPTH + 1, set()))
    block_images = [
        item for each in images for item in _block_images(each.manifest.digest, [here, *elsewhere], kept)
    ]
    outcomes = _bring_blobs([*images, *block_images])
    for item in [*images, *block_images]:
        item.place.put_manifest(item.manifest.data, item.manifest.media_type)
    if destination.digest is None:
        there.put_manifest(top.data, top.media_type, destination.tag or source.tag or "latest")
    return Copied(
        source=str(source),
        destination=str(destination),
        digest=top.digest,
        block_images=tuple(sorted({item.manifest.digest for item in block_images})),
        blobs=len(outcomes),
        blobs_mounted=sum(how == "mounted" for how, _ in outcomes),
        blobs_present=sum(how == "present" for how, _ in outcomes),
        bytes_copied=sum(size for how, size in outcomes if how == "copied"),
    )


def _block_images(digest: str, origins: list[Origin], place: Origin) -> list[_Item]:
    """The block images of a manifest in the first of `origins` that has any, to go to `place`."""
    for origin in origins:
        found = [
            _Item(origin.read_manifest(candidate.digest), origin, place)
            for candidate in origin.referrers(digest)
            if candidate.artifact_type == artifact.ARTIFACT_TYPE
        ]
        for item in found:
            artifact.decode(item.manifest.data)
        if found:
            return found
    return []


def _walk(origin: Origin, place: Origin, manifest: Manifest, depth: int, seen: set[str]) -> Iterator[_Item]:
    """The manifest and everything that it lists, children first, each once: `seen` has their digests."""
    seen.add(manifest.digest)
    if len(seen) > _MAX_MANIFESTS:
        raise errors.LimitError(f"{origin.name}: more than {_MAX_MANIFESTS} manifests in one index")
    if manifest.media_type in artifact.INDEX_TYPES:
        if depth == 0:
            raise imagefs_errors.InvalidInputError(
                f"{origin.name}: more than {image.MAX_INDEX_DEPTH} indexes inside one another"
            )
        for entry in image.index_entries(manifest, f"index {manifest.digest}"):
            if entry.digest not in seen:
                yield from _walk(origin, place, origin.read_manifest(entry.digest), depth - 1, seen)
    yield _Item(manifest, origin, place)


def _blobs_of(item: _Item) -> Iterator[Descriptor]:
    if item.manifest.media_type in artifact.INDEX_TYPES:
        return
    where = f"manifest {item.manifest.digest}"
    document = artifact.parse_json_object(item.manifest.data, where)
    yield artifact.decode_descriptor(document.get("config"), f"{where}: config")
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise imagefs_errors.InvalidInputError(f"{where}: layers is not a list")
    for number, layer in enumerate(layers):
        yield artifact.decode_descriptor(layer, f"{where}: layers[{number}]")


def _bring_blobs(items: list[_Item]) -> list[tuple[str, int]]:
    """Bring every blob once to each place; returns what was done for each, and its size."""
    wanted: dict[tuple[str, str], tuple[Descriptor, _Item]] = {}
    for item in items:
        for descriptor in _blobs_of(item):
            wanted.setdefault((item.place.name, descriptor.digest), (descriptor, item))
    outcomes: list[tuple[str, int]] = []
    group = tasks.Group()
    queue: tasks.Pipe[tuple[Descriptor, _Item]] = tasks.Pipe(group, len(wanted) + 1)
    for entry in wanted.values():
        queue.put(entry)
    queue.close()

    def work() -> None:
        for descriptor, item in queue:
            outcomes.append((bring_blob(descriptor, item.origin, item.place), descriptor.size))

    for number in range(min(_PARALLEL_BLOBS, len(wanted))):
        group.start(f"copy-{number}", work)
    group.wait()
    return outcomes
