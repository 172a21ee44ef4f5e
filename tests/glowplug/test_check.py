"""`glowplug check`, the real command: what is right passes, each kind of damage is found and named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from imagefs import artifact, blockmap, reference
from imagefs.origin import BytesSource, connect
from tests.fixtures import block_images, images, tars
from tests.fixtures.block_images import Command

LAYERS = [
    images.tar_of([("etc", None), ("etc/motd", b"base\n"), ("data", bytes(range(256)) * 2000)]),
    images.tar_of([("etc", None), ("etc/.wh.motd", b""), ("zeros", bytes(300_000))]),
]


def block_image(ref: str) -> tuple[artifact.Manifest, artifact.BlockImage]:
    """The block image beside a source in a layout."""
    origin = connect.connect(reference.parse(ref), connect.Options())
    source = origin.read_manifest(connect.selector(reference.parse(ref)))
    chosen = artifact.choose(origin.referrers(source.digest))
    assert chosen is not None
    manifest = origin.read_manifest(chosen.digest)
    return manifest, artifact.decode(manifest.data)


def blob_path(folder: Path, digest: str) -> Path:
    return folder / "blobs" / "sha256" / digest.removeprefix("sha256:")


def test_all_is_right(glowplug: Command, tmp_path: Path) -> None:
    ref = block_images.make(tmp_path / "layout", LAYERS)
    manifest, _ = block_image(ref)
    assert "2 layers" in glowplug("check", ref).stdout
    own = f"oci:{tmp_path / 'layout'}@{manifest.digest}"
    document = json.loads(glowplug("check", own, "--json").stdout)
    assert document["block_image_digest"] == manifest.digest
    assert document["difference"] is None
    assert sum(layer["zero_blocks"] for layer in document["layers"]) >= 4


@pytest.mark.root
def test_every_file_equals_the_sources(glowplug: Command, tmp_path: Path) -> None:
    ref = block_images.make(tmp_path / "layout", tars.torture_layers())
    assert "every file equals" in glowplug("check", "--against-source", ref).stdout
    assert glowplug.left() == []


@pytest.mark.root
def test_a_docker_archive_and_its_block_image_elsewhere(glowplug: Command, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    images.write_archive(archive, LAYERS)
    block_images.convert(f"docker-archive:{archive}", f"oci:{tmp_path / 'blocks'}")
    result = glowplug(
        "check",
        "--against-source",
        f"docker-archive:{archive}",
        "--block-repository",
        f"oci:{tmp_path / 'blocks'}",
    )
    assert "every file equals" in result.stdout


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_changed_byte_of_a_blob(glowplug: Command, tmp_path: Path, where: str) -> None:
    ref = block_images.make(tmp_path / "layout", LAYERS)
    _, image = block_image(ref)
    path = blob_path(tmp_path / "layout", image.layers[0].blob.digest)
    data = bytearray(path.read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": len(data) - 1}[where]] ^= 1
    path.write_bytes(data)
    message = glowplug("check", ref, code=6).stderr
    assert image.layers[0].block_map.digest in message or image.layers[0].blob.digest in message


def test_a_truncated_blob(glowplug: Command, tmp_path: Path) -> None:
    ref = block_images.make(tmp_path / "layout", LAYERS)
    _, image = block_image(ref)
    path = blob_path(tmp_path / "layout", image.layers[1].blob.digest)
    path.write_bytes(path.read_bytes()[:-1])
    assert image.layers[1].blob.digest in glowplug("check", ref, code=6).stderr


def test_a_changed_block_map(glowplug: Command, tmp_path: Path) -> None:
    ref = block_images.make(tmp_path / "layout", LAYERS)
    _, image = block_image(ref)
    path = blob_path(tmp_path / "layout", image.layers[0].block_map.digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert image.layers[0].block_map.digest in glowplug("check", ref, code=6).stderr


def forge(folder: Path, ref: str, change: blockmap.BlockMap, blob: artifact.Descriptor, number: int) -> str:
    """Push a block image of `ref` whose layer `number` is another one; every digest in it is right."""
    origin = connect.connect(reference.parse(f"oci:{folder}"), connect.Options())
    _, image = block_image(ref)
    data = blockmap.encode(change)
    descriptor = artifact.Descriptor(artifact.MAP_MEDIA_TYPE, artifact.digest_of(data), len(data))
    origin.put_blob(descriptor.digest, descriptor.size, BytesSource(data))
    layers = list(image.layers)
    layers[number] = dataclasses.replace(layers[number], block_map=descriptor, blob=blob)
    forged = artifact.encode(dataclasses.replace(image, layers=tuple(layers)))
    return f"oci:{folder}@{origin.put_manifest(forged, artifact.OCI_MANIFEST)}"


@pytest.mark.root
def test_files_that_are_not_the_sources(glowplug: Command, tmp_path: Path) -> None:
    """A block image that is right in itself, and claims a source that it was not made from."""
    folder = tmp_path / "layout"
    ref = block_images.make(folder, LAYERS)
    other = images.tar_of([("etc", None), ("etc/motd", b"base\n"), ("data", b"something else")])
    block_images.make(tmp_path / "other", [other])
    _, image = block_image(ref)
    _, stranger = block_image(f"oci:{tmp_path / 'other'}:latest")
    for each in (stranger.layers[0].blob, stranger.layers[0].block_map):
        blob_path(folder, each.digest).write_bytes(blob_path(tmp_path / "other", each.digest).read_bytes())
    value = blockmap.decode(blob_path(folder, stranger.layers[0].block_map.digest).read_bytes())
    claimed = dataclasses.replace(
        value, diff_id=bytes.fromhex(image.layers[0].diff_id.removeprefix("sha256:"))
    )
    forged = forge(folder, ref, claimed, stranger.layers[0].blob, 0)
    assert "verified" in glowplug("check", forged).stdout
    result = glowplug("check", "--against-source", forged, code=1)
    assert "differs from its source at" in result.stdout
    assert "data" in result.stdout
    assert glowplug.left() == []


def test_a_block_flagged_zero_that_is_not(glowplug: Command, tmp_path: Path) -> None:
    folder = tmp_path / "layout"
    ref = block_images.make(folder, LAYERS)
    _, image = block_image(ref)
    value = blockmap.decode(blob_path(folder, image.layers[0].block_map.digest).read_bytes())
    blocks = list(value.blocks)
    blocks[1] = dataclasses.replace(blocks[1], zero=True)
    forged = forge(folder, ref, dataclasses.replace(value, blocks=tuple(blocks)), image.layers[0].blob, 0)
    assert "block 1: flagged zero" in glowplug("check", forged, code=3).stderr


def test_a_wrong_digest_of_a_frame(glowplug: Command, tmp_path: Path) -> None:
    folder = tmp_path / "layout"
    ref = block_images.layout(folder, images.make(LAYERS))
    glowplug("convert", ref, "--block-size", "64K", "--frame-size", "16K")
    glowplug("check", ref)
    _, image = block_image(ref)
    value = blockmap.decode(blob_path(folder, image.layers[0].block_map.digest).read_bytes())
    blocks = list(value.blocks)
    frames = list(blocks[1].frames)
    frames[2] = dataclasses.replace(frames[2], digest=bytes(32))
    blocks[1] = dataclasses.replace(blocks[1], frames=tuple(frames))
    forged = forge(folder, ref, dataclasses.replace(value, blocks=tuple(blocks)), image.layers[0].blob, 0)
    assert "block 1, frame 2" in glowplug("check", forged, code=6).stderr


def test_no_block_image(glowplug: Command, tmp_path: Path) -> None:
    ref = block_images.layout(tmp_path / "layout", images.make(LAYERS))
    assert f"glowplug convert {ref}" in glowplug("check", ref, code=4).stderr
