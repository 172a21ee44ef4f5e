"""Copying an image with its block image: whole, unchanged, twice, and between kinds of places."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from converter import copying
from imagefs import artifact, image, reference
from imagefs import errors as imagefs_errors
from imagefs.origin import BytesSource, connect
from tests.fixtures import block_images, images, servers
from tests.fixtures.conversion import block_image, convert, origin_of

TARS = [images.tar_of([("a", os.urandom(100_000))]), images.tar_of([("b", b"two" * 1000)])]


def copy(source: str, destination: str, **more: object) -> copying.Copied:
    options = more.pop("options", connect.Options())
    return copying.copy(reference.parse(source), reference.parse(destination), options, **more)  # type: ignore[arg-type]


def assert_whole(
    ref: str, digest: str, block_images: tuple[str, ...], options: connect.Options | None = None
) -> None:
    """Manifest, every blob and every block image are there, and found."""
    origin = connect.connect(reference.parse(ref), options or connect.Options())
    manifest = origin.read_manifest(digest)
    document = artifact.parse_json_object(manifest.data, "manifest")
    for entry in [document["config"], *document["layers"]]:
        assert len(origin.read_blob(entry["digest"], 1 << 24)) == entry["size"]
    assert tuple(c.digest for c in origin.referrers(digest)) == block_images
    for found in block_images:
        for layer in artifact.decode(origin.read_manifest(found).data).layers:
            assert len(origin.read_blob(layer.blob.digest, 1 << 24)) == layer.blob.size
            assert len(origin.read_blob(layer.block_map.digest, 1 << 24)) == layer.block_map.size


@pytest.mark.parametrize("target", ["docker", "oci", "s3"])
def test_an_image_and_its_block_image(
    tmp_path: Path, registry: servers.RegistryServer, s3_server: servers.S3Server, target: str
) -> None:
    made = images.make(TARS)
    source = f"oci:{made.write_layout(tmp_path / 'source')}:latest"
    result = convert(source)
    place = {
        "docker": f"docker://{registry.host}/{servers.unique_name()}",
        "oci": f"oci:{tmp_path}/out",
        "s3": f"s3://{s3_server.bucket}/{servers.unique_name()}",
    }[target]
    options = connect.Options(s3_endpoint_url=s3_server.endpoint_url)
    first = copy(source, f"{place}:v1", options=options)
    expected = (result.images[0].block_image,)
    assert (first.digest, first.block_images) == (made.top, expected)
    assert first.blobs_present == 0
    assert_whole(place, made.top, expected, options)
    assert connect.connect(reference.parse(place), options).read_manifest("v1").digest == made.top
    again = copy(source, f"{place}:v1", options=options)
    assert (again.blobs_present, again.bytes_copied) == (again.blobs, 0)


def test_blobs_are_mounted_inside_one_registry(registry: servers.RegistryServer) -> None:
    one, two = (f"docker://{registry.host}/{servers.unique_name()}" for _ in range(2))
    made = images.make(TARS)
    made.push(origin_of(one), "v1")
    result = convert(f"{one}:v1")
    copied = copy(f"{one}:v1", two)
    assert copied.blobs_mounted == copied.blobs
    assert copied.bytes_copied == 0
    assert_whole(two, made.top, (result.images[0].block_image,))
    assert origin_of(two).read_manifest("v1").digest == made.top


def test_a_whole_index_or_one_platform_of_it(tmp_path: Path) -> None:
    amd, arm = images.make(TARS), images.make(TARS[:1], architecture="arm64")
    index = images.make_index({"linux/amd64": amd, "linux/arm64": arm}, attestations=True)
    source = f"oci:{index.write_layout(tmp_path / 'source')}:latest"
    result = convert(source, wanted="all")
    copied = copy(source, f"oci:{tmp_path}/all:v1")
    assert copied.digest == index.top
    assert set(copied.block_images) == {image.block_image for image in result.images}
    assert_whole(f"oci:{tmp_path}/all", amd.top, (result.images[0].block_image,))
    assert_whole(f"oci:{tmp_path}/all", arm.top, (result.images[1].block_image,))
    from imagefs import platforms

    one = copy(source, f"oci:{tmp_path}/one:v1", platform=platforms.parse("linux/arm64"))
    assert (one.digest, one.block_images) == (arm.top, (result.images[1].block_image,))


def test_block_images_that_are_kept_elsewhere(tmp_path: Path) -> None:
    made = images.make(TARS)
    source = f"oci:{made.write_layout(tmp_path / 'mirror')}:latest"
    kept = f"oci:{tmp_path}/kept"
    result = convert(source, kept)
    assert copy(source, f"oci:{tmp_path}/without:v1").block_images == ()
    copied = copy(source, f"oci:{tmp_path}/with:v1", block_repository=reference.parse(kept))
    assert copied.block_images == (result.images[0].block_image,)
    assert_image_alone(f"oci:{tmp_path}/with", made.top)
    opened = image.open_image(
        reference.parse(f"oci:{tmp_path}/with:v1"), block_repository=reference.parse(kept)
    )
    assert opened.manifest.digest == copied.block_images[0]


def test_block_images_go_from_beside_the_source_to_the_block_repository(
    tmp_path: Path, registry: servers.RegistryServer
) -> None:
    """And `inspect` of the copy, told where they are, opens."""
    source, mirror, kept = (f"docker://{registry.host}/{servers.unique_name()}" for _ in range(3))
    made = images.make(TARS)
    made.push(origin_of(source), "v1")
    result = convert(f"{source}:v1")
    for _ in range(2):
        copied = copy(f"{source}:v1", f"{mirror}:v1", block_repository=reference.parse(kept))
        assert copied.block_images == (result.images[0].block_image,)
    assert_image_alone(mirror, made.top)
    command = [block_images.GLOWPLUG, "inspect", f"{mirror}:v1", "--json"]
    found = subprocess.run([*command, "--block-repository", kept], check=True, capture_output=True, text=True)
    assert copied.block_images[0] in found.stdout
    alone = subprocess.run(command, capture_output=True, text=True)
    assert alone.returncode != 0
    assert "no block image" in alone.stderr


def assert_image_alone(ref: str, digest: str) -> None:
    """The source image is there, whole, with no block image beside it."""
    assert_whole(ref, digest, ())
    origin = origin_of(ref)
    assert origin.referrers(digest) == []


@pytest.mark.parametrize("place", ["docker", "oci"])
def test_a_source_is_opened_at_any_byte(tmp_path: Path, registry: servers.RegistryServer, place: str) -> None:
    data = os.urandom(3_000_000)
    name = f"docker://{registry.host}/{servers.unique_name()}" if place == "docker" else f"oci:{tmp_path}"
    origin = origin_of(name)
    digest = artifact.digest_of(data)
    origin.put_blob(digest, len(data), BytesSource(data))
    source = copying.OriginSource(origin, digest, len(data))
    for offset in (0, 1, 1_048_576, len(data) - 1, len(data)):
        assert b"".join(source.open(offset)) == data[offset:]


def test_a_blob_that_differs_stops_the_copy_before_the_tag(
    tmp_path: Path, registry: servers.RegistryServer
) -> None:
    place = f"docker://{registry.host}/{servers.unique_name()}"
    made = images.make(TARS)
    source = f"oci:{made.write_layout(tmp_path / 'source')}:latest"
    result = convert(source)
    blob = block_image(result).layers[0].blob
    path = tmp_path / "source/blobs/sha256" / blob.digest.removeprefix("sha256:")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(imagefs_errors.IntegrityError, match=blob.digest):
        copy(source, f"{place}:v1")
    with pytest.raises(imagefs_errors.NotFoundError):
        origin_of(place).read_manifest("v1")


def test_what_cannot_be_copied(tmp_path: Path) -> None:
    made = images.make(TARS)
    source = f"oci:{made.write_layout(tmp_path / 'source')}:latest"
    with pytest.raises(imagefs_errors.InvalidInputError, match="docker-archive:"):
        copy("docker-archive:/x", f"oci:{tmp_path}/out")
    with pytest.raises(imagefs_errors.IntegrityError, match=made.top):
        copy(source, f"oci:{tmp_path}/out@sha256:{'0' * 64}")


def test_an_index_that_lists_itself_many_times_is_walked_once(tmp_path: Path) -> None:
    """Three levels of indexes, each listing the next 200 times: 8 million paths, four manifests."""
    image_ = images.make(TARS)
    layout = image_.write_layout(tmp_path / "from")
    origin = connect.connect(reference.parse(f"oci:{layout}"), connect.Options())
    media_type, digest, size = artifact.OCI_MANIFEST, image_.top, len(image_.manifests[image_.top][1])
    for level in range(3):
        entry = {"mediaType": media_type, "digest": digest, "size": size}
        entry["platform"] = {"os": "linux", "architecture": "amd64"}
        document = {"schemaVersion": 2, "mediaType": artifact.OCI_INDEX, "manifests": [entry] * 200}
        data = artifact.canonical_json(document)
        tag = "deep" if level == 2 else None
        media_type, size = artifact.OCI_INDEX, len(data)
        digest = origin.put_manifest(data, artifact.OCI_INDEX, tag)
    copied = copy(f"oci:{layout}:deep", f"oci:{tmp_path / 'to'}:deep")
    assert copied.digest == digest
    assert_whole(f"oci:{tmp_path / 'to'}", image_.top, ())
