"""Traces beside their block image in an origin: artifacts that refer to it, one trace each.

Written by the agent, of real starts; read by `glowplug pack --trace-from-registry`. On the caller's thread.
A trace is a hint of anyone with push rights: what it can do is make a pack larger or useless, never wrong.
Therefore all is bounded, and one that does not parse is passed over. docs/format.md has the form.
"""

from __future__ import annotations

import logging

from imagefs import artifact, errors, trace
from imagefs.artifact import Descriptor
from imagefs.image import LazyImage
from imagefs.origin import BytesSource, Origin
from imagefs.trace import Trace

ARTIFACT_TYPE = "application/vnd.glowplug.trace.v1"
MAX_TRACES = 16
"""Of one block image: that many are merged, and no more are published."""
MAX_BLOCK_IMAGES = 16
"""Of one source: so many are asked for their traces."""
_EMPTY = b"{}"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"

_log = logging.getLogger(__name__)


def encode_manifest(blob: Descriptor, subject: Descriptor) -> bytes:
    """The artifact's manifest: the trace as its one layer, the block image as its subject."""
    empty = Descriptor(_EMPTY_TYPE, artifact.digest_of(_EMPTY), len(_EMPTY))
    return artifact.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": artifact.OCI_MANIFEST,
            "artifactType": ARTIFACT_TYPE,
            "config": artifact.encode_descriptor(empty),
            "layers": [artifact.encode_descriptor(blob)],
            "subject": artifact.encode_descriptor(subject),
        }
    )


def publish(origin: Origin, found: Trace) -> str | None:
    """Put a trace beside its block image. Its manifest's digest; None if that has enough of them."""
    if len(_listed(origin, found.block_image_digest)) >= MAX_TRACES:
        return None
    image = origin.read_manifest(found.block_image_digest)
    data = trace.encode(found)
    blob = Descriptor(ARTIFACT_TYPE, artifact.digest_of(data), len(data))
    origin.put_blob(artifact.digest_of(_EMPTY), len(_EMPTY), BytesSource(_EMPTY))
    origin.put_blob(blob.digest, blob.size, BytesSource(data))
    subject = Descriptor(image.media_type, image.digest, len(image.data))
    return origin.put_manifest(encode_manifest(blob, subject), artifact.OCI_MANIFEST)


def read_all(image: LazyImage) -> list[Trace]:
    """The traces of a block image, and of the others of its source with the same layers: a pack makes a new
    block image, and what was traced on the one before holds for it."""
    wanted = tuple(layer.map_digest for layer in image.layers)
    siblings = [d.digest for d in image.origin.referrers(image.source_digest) if _is_block_image(d)]
    digests = dict.fromkeys([image.manifest.digest, *sorted(siblings)[:MAX_BLOCK_IMAGES]])
    listed = [each for digest in digests for each in _listed(image.origin, digest)]
    out = []
    for descriptor in listed[:MAX_TRACES]:
        try:
            found = _read(image.origin, descriptor)
        except (errors.InvalidInputError, errors.NotFoundError) as exc:
            _log.warning("trace %s is passed over: %s", descriptor.digest, exc)
            continue
        if found.map_digests == wanted:
            out.append(found)
    return out


def _is_block_image(descriptor: Descriptor) -> bool:
    return descriptor.artifact_type == artifact.ARTIFACT_TYPE


def _listed(origin: Origin, block_image_digest: str) -> list[Descriptor]:
    found = [each for each in origin.referrers(block_image_digest) if each.artifact_type == ARTIFACT_TYPE]
    return sorted(found, key=lambda each: each.digest)


def _read(origin: Origin, descriptor: Descriptor) -> Trace:
    what = f"manifest {descriptor.digest}"
    document = artifact.parse_json_object(origin.read_manifest(descriptor.digest).data, what)
    layers = document.get("layers")
    if not isinstance(layers, list) or len(layers) != 1:
        raise errors.InvalidInputError(f"{what}: layers is not a list of one trace")
    blob = artifact.decode_descriptor(layers[0], f"{what}: layers[0]")
    return trace.decode(origin.read_blob(blob.digest, min(blob.size, trace.MAX_TRACE_BYTES)))
