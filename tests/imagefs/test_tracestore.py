"""Traces beside block images: in a layout folder, and in a real registry without referrers API."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagefs import artifact, image, reference, trace, tracestore
from imagefs.image import LazyImage
from imagefs.origin import BytesSource, connect
from imagefs.trace import Read, Trace
from tests.fixtures import block_images, images, servers

_TARS = [images.tar_of([("a", b"a" * 300_000)]), images.tar_of([("b", b"b" * 300_000)])]


def _open(ref: str) -> LazyImage:
    return image.open_image(reference.parse(ref))


def _trace(opened: LazyImage, offset: int) -> Trace:
    digests = tuple(layer.map_digest for layer in opened.layers)
    reads = (Read(0, offset, 4096, 1),)
    return Trace(opened.source_digest, opened.manifest.digest, digests, ("run",), reads, 32)


@pytest.fixture(params=["oci", "docker"])
def ref(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "oci":
        return block_images.make(tmp_path / "image", _TARS)
    registry: servers.RegistryServer = request.getfixturevalue("registry")
    direct = f"docker://{registry.host}/{servers.unique_name('traces')}:v1"
    origin = connect.connect(reference.parse(direct), connect.Options())
    images.make(_TARS).push(origin, "v1")
    origin.close()
    block_images.convert(direct)
    return direct


def test_what_is_published_is_found(ref: str) -> None:
    opened = _open(ref)
    assert tracestore.read_all(opened) == []
    traces = [_trace(opened, 4096 * number) for number in range(3)]
    digests = [tracestore.publish(opened.origin, each) for each in traces]
    assert len(set(digests)) == 3
    found = tracestore.read_all(_open(ref))
    assert {each.reads for each in found} == {each.reads for each in traces}
    assert _open(ref).manifest.digest == opened.manifest.digest  # a trace is no block image


def test_there_is_an_end_to_it(ref: str) -> None:
    opened = _open(ref)
    for number in range(tracestore.MAX_TRACES):
        assert tracestore.publish(opened.origin, _trace(opened, 4096 * number)) is not None
    assert tracestore.publish(opened.origin, _trace(opened, 4096 * 99)) is None
    assert len(tracestore.read_all(_open(ref))) == tracestore.MAX_TRACES


def test_traces_of_other_layers_and_damaged_ones_are_passed_over(ref: str) -> None:
    opened = _open(ref)
    other = _trace(opened, 0)
    tracestore.publish(
        opened.origin,
        Trace(other.source_digest, other.block_image_digest, other.map_digests[:1], (), other.reads, 32),
    )
    bad = b"not a trace"
    blob = artifact.Descriptor(tracestore.ARTIFACT_TYPE, artifact.digest_of(bad), len(bad))
    opened.origin.put_blob(blob.digest, blob.size, BytesSource(bad))
    manifest = opened.manifest
    subject = artifact.Descriptor(manifest.media_type, manifest.digest, len(manifest.data))
    opened.origin.put_manifest(tracestore.encode_manifest(blob, subject), artifact.OCI_MANIFEST)
    tracestore.publish(opened.origin, _trace(opened, 8192))
    assert [each.reads for each in tracestore.read_all(_open(ref))] == [(Read(0, 8192, 4096, 1),)]


def test_the_manifest_is_an_oci_artifact(ref: str) -> None:
    opened = _open(ref)
    digest = tracestore.publish(opened.origin, _trace(opened, 0))
    assert digest is not None
    document = artifact.parse_json_object(opened.origin.read_manifest(digest).data, "manifest")
    assert document["artifactType"] == tracestore.ARTIFACT_TYPE
    assert document["subject"]["digest"] == opened.manifest.digest
    blob = artifact.decode_descriptor(document["layers"][0], "layers[0]")
    assert trace.decode(opened.origin.read_blob(blob.digest, blob.size)) == _trace(opened, 0)
