"""The contract of imagefs/origin/__init__.py, the same cases on every origin, each on its real server."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagefs import artifact, errors, reference
from imagefs.artifact import Descriptor
from imagefs.origin import BytesSource, FileSource, Origin, connect
from tests.fixtures import servers

ABSENT = "sha256:" + "0" * 64
MakeOrigin = Callable[[], Origin]


@pytest.fixture(params=["registry", "s3", "folder"])
def make_origin(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeOrigin]:
    """Makes empty origins of one kind, on one server."""
    made: list[Origin] = []

    def make() -> Origin:
        options = connect.Options()
        if request.param == "registry":
            server = request.getfixturevalue("registry")
            text = f"docker://{server.host}/{servers.unique_name('conformance')}"
        elif request.param == "s3":
            server = request.getfixturevalue("s3_server")
            text = f"s3://{server.bucket}/{servers.unique_name('conformance')}"
            options = connect.Options(s3_endpoint_url=server.endpoint_url)
        else:
            text = f"oci:{tmp_path}/layout-{len(made)}"
        made.append(connect.connect(reference.parse(text), options))
        return made[-1]

    yield make
    for origin in made:
        origin.close()


@pytest.fixture
def origin(make_origin: MakeOrigin) -> Origin:
    return make_origin()


def put(origin: Origin, data: bytes) -> str:
    digest = artifact.digest_of(data)
    origin.put_blob(digest, len(data), BytesSource(data))
    return digest


def image(origin: Origin, config: bytes = b"{}", **fields: object) -> bytes:
    """An OCI image manifest whose blobs are in `origin`."""
    descriptor = Descriptor(artifact.OCI_CONFIG, put(origin, config), len(config))
    document = {
        "schemaVersion": 2,
        "mediaType": artifact.OCI_MANIFEST,
        "config": artifact.encode_descriptor(descriptor),
        "layers": [],
        **fields,
    }
    return artifact.canonical_json(document)


def subject_of(data: bytes) -> dict[str, object]:
    descriptor = Descriptor(artifact.OCI_MANIFEST, artifact.digest_of(data), len(data))
    return artifact.encode_descriptor(descriptor)


def read_range(origin: Origin, digest: str, offset: int, length: int) -> bytes:
    pieces = list(origin.stream_range(digest, offset, length))
    assert all(0 < len(piece) <= 1 << 20 for piece in pieces)
    return b"".join(pieces)


class TestBlobs:
    @pytest.mark.parametrize("size", [0, 1, 4096, (1 << 20) + 1])
    def test_written_blobs_read_back(self, origin: Origin, size: int) -> None:
        data = random.Random(size).randbytes(size)
        assert not origin.has_blob(artifact.digest_of(data))
        digest = put(origin, data)
        assert origin.has_blob(digest)
        assert origin.read_blob(digest, size) == data
        assert b"".join(origin.stream_blob(digest, size)) == data

    def test_large_blob_from_a_file(self, origin: Origin, tmp_path: Path) -> None:
        data = random.Random(1).randbytes(40 * 1024 * 1024)
        path = tmp_path / "spool"
        path.write_bytes(data + b"after")
        digest = artifact.digest_of(data)
        origin.put_blob(digest, len(data), FileSource(path, len(data)))
        hasher = hashlib.sha256()
        for piece in origin.stream_blob(digest, len(data)):
            assert len(piece) <= 1 << 20
            hasher.update(piece)
        assert "sha256:" + hasher.hexdigest() == digest

    def test_a_file_is_linked_or_nothing_is_stored(self, origin: Origin, tmp_path: Path) -> None:
        data = os.urandom(3 << 20)
        path = tmp_path / "finished"
        path.write_bytes(data)
        path.chmod(0o600)
        digest = artifact.digest_of(data)
        promised = origin.links(tmp_path)
        linked = [origin.link_blob(digest, len(data), path) for _ in range(2)]
        assert linked == [origin.has_blob(digest)] * 2 == [promised] * 2
        path.unlink()
        if origin.has_blob(digest):
            assert b"".join(origin.stream_blob(digest, len(data))) == data

    def test_ranges(self, origin: Origin) -> None:
        data = random.Random(2).randbytes(3 << 20)
        digest = put(origin, data)
        for offset, length in ((0, 1), (0, len(data)), (len(data) - 1, 1), (12345, 1 << 20), (7, 0)):
            assert read_range(origin, digest, offset, length) == data[offset : offset + length]

    def test_range_with_a_deadline(self, origin: Origin) -> None:
        digest = put(origin, b"abcdef")
        assert b"".join(origin.stream_range(digest, 2, 3, time.monotonic() + 60)) == b"cde"

    def test_a_range_comes_in_pieces_and_may_be_left_in_the_middle(self, origin: Origin) -> None:
        data = random.Random(3).randbytes(3 << 20)
        digest = put(origin, data)
        for _ in range(3):
            stream = origin.stream_range(digest, 1000, 2 << 20)
            first = next(stream)
            assert first == data[1000 : 1000 + len(first)]
            stream.close()
            assert read_range(origin, digest, 1000, 2 << 20) == data[1000 : 1000 + (2 << 20)]

    @pytest.mark.parametrize(("offset", "length"), [(0, 101), (50, 51), (100, 1), (5000, 10)])
    def test_range_past_the_end(self, origin: Origin, offset: int, length: int) -> None:
        digest = put(origin, bytes(range(100)))
        with pytest.raises(errors.IntegrityError, match=digest):
            read_range(origin, digest, offset, length)

    def test_putting_again_reads_nothing(self, origin: Origin) -> None:
        digest = put(origin, b"once")

        class Unreadable:
            def open(self, offset: int) -> Iterator[bytes]:
                raise AssertionError("moved data that is there")

        origin.put_blob(digest, 4, Unreadable())

    @pytest.mark.parametrize("size", [10, 20 * 1024 * 1024])
    @pytest.mark.parametrize("change", ["other", "short", "long"])
    def test_wrong_source_is_refused_and_leaves_nothing(self, origin: Origin, size: int, change: str) -> None:
        data = random.Random(size).randbytes(size)
        digest = artifact.digest_of(data + change.encode())  # a name of its own for each case
        sent = {"other": data + b"x" * len(change), "short": data, "long": data + b"longer"}[change]
        with pytest.raises(errors.IntegrityError, match=digest):
            origin.put_blob(digest, size + len(change), BytesSource(sent))
        assert not origin.has_blob(digest)
        with pytest.raises(errors.NotFoundError):
            origin.read_blob(digest, size * 2)

    def test_absent_blob(self, origin: Origin) -> None:
        assert not origin.has_blob(ABSENT)
        put(origin, b"something, so that the repository is there")
        assert not origin.has_blob(ABSENT)
        for read in (
            lambda: origin.read_blob(ABSENT, 10),
            lambda: read_range(origin, ABSENT, 0, 1),
            lambda: list(origin.stream_blob(ABSENT, 10)),
        ):
            with pytest.raises(errors.NotFoundError, match=ABSENT):
                read()

    def test_read_blob_is_bounded(self, origin: Origin) -> None:
        digest = put(origin, bytes(1000))
        with pytest.raises(errors.InvalidInputError, match="999"):
            origin.read_blob(digest, 999)

    @pytest.mark.parametrize("wrong", [999, 1001, 0])
    def test_stream_of_another_size(self, origin: Origin, wrong: int) -> None:
        digest = put(origin, bytes(1000))
        with pytest.raises(errors.IntegrityError, match=digest):
            list(origin.stream_blob(digest, wrong))

    @pytest.mark.parametrize(
        "digest", ["sha256:../../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 32, "", "../x", "a/b"]
    )
    def test_names_that_are_no_digests(self, origin: Origin, digest: str) -> None:
        with pytest.raises(errors.InvalidInputError):
            origin.has_blob(digest)
        with pytest.raises(errors.InvalidInputError):
            origin.read_blob(digest, 10)
        with pytest.raises(errors.InvalidInputError):
            origin.put_blob(digest, 0, BytesSource(b""))
        with pytest.raises(errors.InvalidInputError):
            origin.referrers(digest)

    def test_a_stream_that_is_left_early_harms_nothing(self, origin: Origin) -> None:
        data = bytes(4 << 20)
        digest = put(origin, data)
        for _ in range(20):
            stream = origin.stream_blob(digest, len(data))
            next(stream)
            stream.close()  # type: ignore[attr-defined]
        assert read_range(origin, digest, 5, 10) == bytes(10)

    def test_mount_from_another(self, make_origin: MakeOrigin) -> None:
        first, second = make_origin(), make_origin()
        data = os.urandom(100_000)
        digest = put(first, data)
        assert second.mount_blob(digest, first)
        assert second.read_blob(digest, len(data)) == data
        assert second.mount_blob(digest, first)
        assert not second.mount_blob(ABSENT, first)
        assert not second.has_blob(ABSENT)

    def test_mount_from_another_kind(self, origin: Origin, tmp_path: Path) -> None:
        class Other:
            name = "other"

        assert not origin.mount_blob(ABSENT, Other())  # type: ignore[arg-type]


class TestManifests:
    def test_by_tag_and_by_digest(self, origin: Origin) -> None:
        data = image(origin)
        digest = origin.put_manifest(data, artifact.OCI_MANIFEST, "v1")
        assert digest == artifact.digest_of(data)
        for name in ("v1", digest):
            manifest = origin.read_manifest(name)
            assert (manifest.media_type, manifest.digest, manifest.data) == (
                artifact.OCI_MANIFEST,
                digest,
                data,
            )

    def test_untagged(self, origin: Origin) -> None:
        data = image(origin)
        digest = origin.put_manifest(data, artifact.OCI_MANIFEST)
        assert origin.read_manifest(digest).data == data

    def test_a_tag_moves(self, origin: Origin) -> None:
        first, second = image(origin, b"1"), image(origin, b"2")
        origin.put_manifest(first, artifact.OCI_MANIFEST, "v1")
        origin.put_manifest(first, artifact.OCI_MANIFEST, "keep")
        origin.put_manifest(second, artifact.OCI_MANIFEST, "v1")
        origin.put_manifest(second, artifact.OCI_MANIFEST, "v1")
        assert origin.read_manifest("v1").data == second
        assert origin.read_manifest("keep").data == first
        assert origin.read_manifest(artifact.digest_of(first)).data == first

    def test_an_index_and_docker_types(self, origin: Origin) -> None:
        inner = image(origin)
        origin.put_manifest(inner, artifact.OCI_MANIFEST)
        index = {
            "schemaVersion": 2,
            "mediaType": artifact.OCI_INDEX,
            "manifests": [subject_of(inner)],
        }
        data = artifact.canonical_json(index)
        origin.put_manifest(data, artifact.OCI_INDEX, "multi")
        assert origin.read_manifest("multi").media_type == artifact.OCI_INDEX
        config = Descriptor(artifact.DOCKER_CONFIG, put(origin, b"{}"), 2)
        docker = {
            "schemaVersion": 2,
            "mediaType": artifact.DOCKER_MANIFEST,
            "config": artifact.encode_descriptor(config),
            "layers": [],
        }
        origin.put_manifest(artifact.canonical_json(docker), artifact.DOCKER_MANIFEST, "docker")
        assert origin.read_manifest("docker").media_type == artifact.DOCKER_MANIFEST

    @pytest.mark.parametrize("name", ["absent", ABSENT])
    def test_absent(self, origin: Origin, name: str) -> None:
        with pytest.raises(errors.NotFoundError, match=name):
            origin.read_manifest(name)
        origin.put_manifest(image(origin), artifact.OCI_MANIFEST, "v1")
        with pytest.raises(errors.NotFoundError, match=name):
            origin.read_manifest(name)


class TestReferrers:
    def test_none(self, origin: Origin) -> None:
        assert origin.referrers(ABSENT) == []
        digest = origin.put_manifest(image(origin), artifact.OCI_MANIFEST, "v1")
        assert origin.referrers(digest) == []

    def test_found_with_type_and_annotations(self, origin: Origin) -> None:
        source = image(origin)
        origin.put_manifest(source, artifact.OCI_MANIFEST, "v1")
        block_image = image(
            origin,
            subject=subject_of(source),
            artifactType=artifact.ARTIFACT_TYPE,
            annotations={"org.example": "ü"},
        )
        plain = image(origin, b"2", subject=subject_of(source))
        unrelated = image(origin, b"3", subject=subject_of(plain))
        for data, tag in ((block_image, None), (plain, "tagged"), (unrelated, None)):
            origin.put_manifest(data, artifact.OCI_MANIFEST, tag)
            origin.put_manifest(data, artifact.OCI_MANIFEST, tag)
        found = {d.digest: d for d in origin.referrers(artifact.digest_of(source))}
        assert set(found) == {artifact.digest_of(block_image), artifact.digest_of(plain)}
        descriptor = found[artifact.digest_of(block_image)]
        assert descriptor.artifact_type == artifact.ARTIFACT_TYPE
        assert descriptor.size == len(block_image)
        assert descriptor.media_type == artifact.OCI_MANIFEST
        assert descriptor.annotations == {"org.example": "ü"}
        assert found[artifact.digest_of(plain)].artifact_type == artifact.OCI_CONFIG
        assert origin.read_manifest("tagged").data == plain
        assert artifact.choose(found.values()) == descriptor

    def test_a_subject_that_is_not_there_yet(self, origin: Origin) -> None:
        subject = {"mediaType": artifact.OCI_MANIFEST, "digest": ABSENT, "size": 7}
        digest = origin.put_manifest(image(origin, subject=subject), artifact.OCI_MANIFEST)
        assert [d.digest for d in origin.referrers(ABSENT)] == [digest]

    def test_concurrent_writers_lose_nothing(self, origin: Origin) -> None:
        source = image(origin)
        origin.put_manifest(source, artifact.OCI_MANIFEST, "v1")
        manifests = [
            image(origin, subject=subject_of(source), annotations={"number": str(number)})
            for number in range(12)
        ]
        with concurrent.futures.ThreadPoolExecutor(len(manifests)) as pool:
            digests = list(pool.map(lambda data: origin.put_manifest(data, artifact.OCI_MANIFEST), manifests))
        assert {d.digest for d in origin.referrers(artifact.digest_of(source))} == set(digests)


def test_any_thread_at_once(origin: Origin) -> None:
    blobs = [random.Random(number).randbytes(300_000) for number in range(8)]

    def work(data: bytes) -> bool:
        digest = put(origin, data)
        read = read_range(origin, digest, 1000, 200_000) == data[1000:201_000]
        return read and origin.read_blob(digest, len(data)) == data

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, blobs * 2))


def test_name_opens_the_same_origin(origin: Origin, request: pytest.FixtureRequest) -> None:
    digest = put(origin, b"here")
    options = connect.Options()
    if origin.name.startswith("s3:"):
        options = connect.Options(s3_endpoint_url=request.getfixturevalue("s3_server").endpoint_url)
    again = connect.connect(reference.parse(origin.name), options)
    assert again.name == origin.name
    assert again.read_blob(digest, 10) == b"here"
    again.close()
