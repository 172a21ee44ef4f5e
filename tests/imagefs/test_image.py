"""From a REF to a verified block image, on layout folders and with every link of the chain broken in turn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagefs import artifact, blockmap, errors, image, platforms, reference
from imagefs.image import LazyImage
from imagefs.origin import BytesSource, connect
from tests.fixtures import block_images, images

BASE = images.tar_of([("etc", None), ("etc/motd", b"base\n")])
TOP = images.tar_of([("etc", None), ("etc/motd", b"top\n")])
ARM = platforms.Platform("linux", "arm64")


def open_image(ref: str, **more: Any) -> LazyImage:
    return image.open_image(reference.parse(ref), **more)


def test_by_the_source_and_by_its_own_digest(tmp_path: Path) -> None:
    ref = block_images.make(tmp_path, [BASE, TOP])
    found = open_image(ref)
    assert [layer.block_map.diff_id.hex() for layer in found.layers] == [
        images.digest(tar)[7:] for tar in (BASE, TOP)
    ]
    digests = [layer.map_digest for layer in found.layers]
    assert [artifact.digest_of(data) for data in found.map_bytes] == digests
    assert found.config_document()["rootfs"]["diff_ids"] == [images.digest(BASE), images.digest(TOP)]
    own = open_image(f"oci:{tmp_path}@{found.manifest.digest}")
    assert own.manifest == found.manifest
    assert own.source_digest == found.source_digest


def test_a_platform_of_an_index(tmp_path: Path) -> None:
    made = {
        "linux/amd64": images.make([BASE]),
        "linux/arm64": images.make([TOP], architecture="arm64"),
    }
    ref = block_images.layout(tmp_path, images.make_index(made, attestations=True))
    block_images.convert(ref)
    assert open_image(ref, platform=ARM).source_digest == made["linux/arm64"].top
    assert open_image(ref, platform=platforms.parse("linux/amd64")).source_digest == made["linux/amd64"].top
    with pytest.raises(
        errors.NotFoundError, match="no image for linux/s390x; it has linux/amd64, linux/arm64"
    ):
        open_image(ref, platform=platforms.parse("linux/s390x"))


def test_an_index_of_block_images(tmp_path: Path) -> None:
    ref = block_images.make(tmp_path, [BASE])
    found = open_image(ref)
    entry = artifact.Descriptor(
        found.manifest.media_type,
        found.manifest.digest,
        len(found.manifest.data),
        artifact_type=artifact.ARTIFACT_TYPE,
        platform={"os": "linux", "architecture": "arm64"},
    )
    index = {
        "schemaVersion": 2,
        "mediaType": artifact.OCI_INDEX,
        "manifests": [artifact.encode_descriptor(entry)],
    }
    found.origin.put_manifest(artifact.canonical_json(index), artifact.OCI_INDEX, "blocks")
    assert open_image(f"oci:{tmp_path}:blocks", platform=ARM).manifest == found.manifest


def test_block_images_kept_elsewhere(tmp_path: Path) -> None:
    ref = block_images.layout(tmp_path / "source", images.make([BASE]))
    block_images.convert(ref, f"oci:{tmp_path / 'blocks'}")
    with pytest.raises(errors.NotFoundError, match="run `glowplug convert oci:"):
        open_image(ref)
    place = reference.parse(f"oci:{tmp_path / 'blocks'}")
    found = open_image(ref, block_repository=place)
    assert found.origin.name == str(place)
    archive = reference.parse("docker-archive:/nowhere.tar")
    by_digest = image.open_image(archive, block_repository=place, source_digest=found.source_digest)
    assert by_digest.manifest == found.manifest
    with pytest.raises(errors.ConfigurationError, match="--block-repository"):
        image.open_image(archive, source_digest=found.source_digest)


def test_no_block_image(tmp_path: Path) -> None:
    made = images.make([BASE])
    ref = block_images.layout(tmp_path, made)
    with pytest.raises(errors.NotFoundError, match=f"no block image for {ref} \\({made.top}\\)"):
        open_image(ref)


def republish(found: LazyImage, value: artifact.BlockImage) -> str:
    """Store a block image that says something else; its own REF."""
    digest = found.origin.put_manifest(artifact.encode(value), artifact.OCI_MANIFEST)
    return f"{found.origin.name}@{digest}"


def with_map(
    found: LazyImage, change: Callable[[blockmap.BlockMap], blockmap.BlockMap]
) -> artifact.BlockImage:
    """The block image with the map of layer 0 changed, its descriptor right."""
    data = blockmap.encode(change(found.layers[0].block_map))
    digest = artifact.digest_of(data)
    found.origin.put_blob(digest, len(data), BytesSource(data))
    first, *rest = found.block_image.layers
    descriptor = dataclasses.replace(first.block_map, digest=digest, size=len(data))
    return dataclasses.replace(
        found.block_image, layers=(dataclasses.replace(first, block_map=descriptor), *rest)
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: dataclasses.replace(m, blob_digest=bytes(32)), "blob digest"),
        (lambda m: dataclasses.replace(m, blob_bytes=m.blob_bytes + 1), "blob size"),
        (lambda m: dataclasses.replace(m, diff_id=bytes(32)), "diff_id"),
    ],
)
def test_a_map_that_says_something_else_than_the_manifest(
    tmp_path: Path, change: Callable[[blockmap.BlockMap], blockmap.BlockMap], field: str
) -> None:
    found = open_image(block_images.make(tmp_path, [BASE, TOP]))
    with pytest.raises(errors.IntegrityError, match=f"layer 0: {field} is"):
        open_image(republish(found, with_map(found, change)))


def test_layers_that_the_config_does_not_list(tmp_path: Path) -> None:
    found = open_image(block_images.make(tmp_path, [BASE, TOP]))
    fewer = dataclasses.replace(found.block_image, layers=found.block_image.layers[:1])
    with pytest.raises(errors.IntegrityError, match="config lists 2 layers, the block image has 1"):
        open_image(republish(found, fewer))
    swapped = dataclasses.replace(found.block_image, layers=found.block_image.layers[::-1])
    with pytest.raises(errors.IntegrityError, match="layer 0: the block image has diff_id"):
        open_image(republish(found, swapped))


def test_a_block_image_of_another_config(tmp_path: Path) -> None:
    """Anyone with push rights can name any subject: its config must be the source's."""
    ref = block_images.make(tmp_path, [BASE])
    found = open_image(ref)
    config = json.loads(found.config)
    config["config"]["Cmd"] = ["/bin/evil"]
    data = artifact.canonical_json(config)
    digest = artifact.digest_of(data)
    found.origin.put_blob(digest, len(data), BytesSource(data))
    evil = dataclasses.replace(
        found.block_image,
        config=dataclasses.replace(found.block_image.config, digest=digest, size=len(data)),
    )
    republish(found, evil)
    for entry in found.origin.referrers(found.source_digest):
        if entry.digest == artifact.digest_of(artifact.encode(evil)):
            break
    else:
        pytest.fail("the other block image is not listed")
    chosen = artifact.choose(found.origin.referrers(found.source_digest))
    assert chosen is not None
    if chosen.digest == found.manifest.digest:
        assert open_image(ref).config == found.config
    else:
        with pytest.raises(errors.IntegrityError, match="carries config"):
            open_image(ref)


def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path) -> None:
    found = open_image(block_images.make(tmp_path, [BASE, TOP]))
    large = dataclasses.replace(found.block_image.config, size=image.MAX_CONFIG_BYTES + 1)
    with pytest.raises(errors.InvalidInputError, match="config of"):
        open_image(republish(found, dataclasses.replace(found.block_image, config=large)))
    layers = tuple(
        dataclasses.replace(
            layer, block_map=dataclasses.replace(layer.block_map, size=blockmap.MAX_MAP_BYTES)
        )
        for layer in found.block_image.layers
    )
    with pytest.raises(errors.InvalidInputError, match="block maps of"):
        open_image(republish(found, dataclasses.replace(found.block_image, layers=layers)))


def test_a_damaged_map_is_refused(tmp_path: Path) -> None:
    ref = block_images.make(tmp_path, [BASE])
    found = open_image(ref)
    path = tmp_path / "blobs/sha256" / found.layers[0].map_digest[7:]
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.IntegrityError):
        open_image(ref)


def test_indexes_inside_indexes_end(tmp_path: Path) -> None:
    inner = images.make([BASE])
    for _ in range(image.MAX_INDEX_DEPTH + 1):
        inner = images.make_index({"linux/arm64": inner})
    ref = block_images.layout(tmp_path, inner)
    with pytest.raises(errors.InvalidInputError, match="indexes inside one another"):
        open_image(ref, platform=ARM, options=connect.Options())


@pytest.mark.parametrize("text", ["linux", "linux/", "/amd64", "a/b/c/d", ""])
def test_what_is_no_platform(text: str) -> None:
    with pytest.raises(errors.InvalidInputError, match="OS/ARCHITECTURE"):
        platforms.parse(text)


def test_variants_match_where_asked() -> None:
    def of(variant: str) -> artifact.Descriptor:
        platform = {"os": "linux", "architecture": "arm", "variant": variant}
        return artifact.Descriptor(artifact.OCI_MANIFEST, f"sha256:{variant * 32}", 1, platform=platform)

    entries = [of("v6"), of("v7")]
    assert platforms.choose(entries, platforms.parse("linux/arm/v7"), "x") is entries[1]
    assert platforms.choose(entries, platforms.parse("linux/arm"), "x") is entries[0]
    with pytest.raises(errors.NotFoundError):
        platforms.choose(entries, platforms.parse("linux/arm/v8"), "x")
