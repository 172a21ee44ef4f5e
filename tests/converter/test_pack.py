"""Boot packs: their pages against the layer blobs as the zstd command sees them, in every kind of place; what
makes them the same, what makes them count, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest

from converter import copying, pack, packchoice
from imagefs import artifact, bootpack, errors, reference
from imagefs.bootpack import Record
from imagefs.origin import BytesSource, connect
from tests.fixtures import block_images, images, servers
from tests.fixtures.boot_packs import (
    PARAMETERS,
    expected_pages,
    open_image,
    some_trace,
    trace_of,
    unpacked,
)
from tests.fixtures.conversion import convert, origin_of

BLOCK = block_images.BLOCK_BYTES
TARS = [
    images.tar_of([("a", os.urandom(400_000)), ("text", b"some words " * 30_000)]),
    images.tar_of([("b", bytes(range(256)) * 2000), ("zeros", bytes(400_000)), ("c", os.urandom(90_000))]),
]


def has_zero_blocks(ref: str) -> bool:
    return any(block.zero for layer in open_image(ref).layers for block in layer.block_map.blocks)


@pytest.mark.parametrize("place", ["docker", "oci", "s3"])
def test_the_pages_of_a_trace_in_its_order(
    tmp_path: Path, registry: servers.RegistryServer, s3_server: servers.S3Server, place: str
) -> None:
    ref = {
        "docker": f"docker://{registry.host}/{servers.unique_name()}:v1",
        "oci": f"oci:{tmp_path}/layout:v1",
        "s3": f"s3://{s3_server.bucket}/{servers.unique_name()}:v1",
    }[place]
    options = connect.Options(s3_endpoint_url=s3_server.endpoint_url)
    origin = connect.connect(reference.parse(ref), options)
    images.make(TARS).push(origin, "v1")
    convert(ref, options=options)
    before = open_image(ref, options)
    traces = [some_trace(before, seed=1), some_trace(before, seed=2)]
    packed = pack.pack(before, traces, PARAMETERS)

    after = open_image(ref, options)
    assert after.manifest.digest == packed.block_image_digest != before.manifest.digest
    assert after.source_digest == before.source_digest
    assert (after.block_image.layers, after.map_bytes) == (before.block_image.layers, before.map_bytes)
    stored = after.block_image.boot_pack
    assert stored is not None
    assert after.boot_pack is not None
    assert (stored.generation, stored.table.digest) == (1, packed.table_digest)
    pages = unpacked(origin, stored.data)
    assert pages == expected_pages(before, *traces)
    assert len(pages) == packed.page_bytes
    assert after.boot_pack.records == pack.wanted(before, traces).records
    for seed in (3, 4):
        later = pack.pack(open_image(ref, options), [some_trace(before, seed=seed)], PARAMETERS)
        assert (later.changed, later.generation) == (True, seed - 1)
        assert open_image(ref, options).manifest.digest == later.block_image_digest


def test_zero_blocks_are_left_out(tmp_path: Path) -> None:
    ref = block_images.make(tmp_path, TARS)
    opened = open_image(ref)
    assert has_zero_blocks(ref)
    whole = trace_of(opened, *((n, 0, layer.block_map.image_bytes) for n, layer in enumerate(opened.layers)))
    packed = pack.pack(opened, [whole], PARAMETERS)
    kept = [
        layer.block_map.block_length(index)
        for layer in opened.layers
        for index, block in enumerate(layer.block_map.blocks)
        if not block.zero
    ]
    assert (packed.page_bytes, packed.blocks_read) == (sum(kept), len(kept))
    zero = next(i for i, block in enumerate(opened.layers[1].block_map.blocks) if block.zero)
    with pytest.raises(errors.InvalidInputError, match="nothing but zero blocks"):
        pack.pack(opened, [trace_of(opened, (1, zero * BLOCK, 4096))], PARAMETERS)


def test_more_than_a_pack_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_image(block_images.make(tmp_path, TARS))
    monkeypatch.setattr(bootpack, "MAX_PAGES", 1)
    with pytest.raises(errors.InvalidInputError, match=r"8192 bytes.*at most 4096: trace less of the start"):
        pack.pack(opened, [trace_of(opened, (1, 0, 8192))], PARAMETERS)


def test_what_is_read_from_end_to_end_stays_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = block_images.make(tmp_path, TARS)
    opened = open_image(ref)
    block_map = opened.layers[1].block_map
    monkeypatch.setattr(packchoice, "MIN_THROUGH_BYTES", 2 * BLOCK)
    first = next(i for i in range(len(block_map.blocks)) if i not in block_map.metadata_blocks())
    assert not any(block.zero for block in block_map.blocks[first : first + 2])
    through = (1, first * BLOCK, 2 * BLOCK)
    packed = pack.pack(opened, [trace_of(opened, (0, 0, 4096), through)], PARAMETERS)
    assert (packed.page_bytes, packed.through_bytes, packed.blocks_read) == (4096, 2 * BLOCK, 1)


def test_the_same_layer_twice(tmp_path: Path) -> None:
    ref = block_images.make(tmp_path, [TARS[0], TARS[1], TARS[0]])
    opened = open_image(ref)
    assert len({layer.map_digest for layer in opened.layers}) == 2
    found = trace_of(opened, (2, 0, 4096), (1, 8192, 4096), (0, 0, 8192))
    pack.pack(opened, [found], PARAMETERS)
    again = open_image(ref)
    assert again.boot_pack is not None
    assert again.boot_pack.records == (Record(0, 0, 1), Record(1, 2, 1), Record(0, 1, 1))
    assert again.block_image.boot_pack is not None
    assert unpacked(again.origin, again.block_image.boot_pack.data) == expected_pages(again, found)


def test_frames_smaller_than_blocks(tmp_path: Path) -> None:
    ref = block_images.layout(tmp_path, images.make(TARS))
    from converter import layer, limits

    convert(ref, parameters=layer.Parameters(4 * BLOCK, BLOCK // 4, 1, limits.Limits()))
    opened = open_image(ref)
    assert opened.layers[0].block_map.blocks[0].frames
    found = some_trace(opened)
    pack.pack(opened, [found], PARAMETERS)
    stored = open_image(ref).block_image.boot_pack
    assert stored is not None
    assert unpacked(opened.origin, stored.data) == expected_pages(opened, found)


def test_the_same_input_gives_the_same_pack(tmp_path: Path) -> None:
    results = []
    for number, jobs in enumerate((1, 4)):
        ref = block_images.make(tmp_path / str(number), TARS)
        opened = open_image(ref)
        packed = pack.pack(opened, [some_trace(opened)], dataclasses.replace(PARAMETERS, jobs=jobs))
        again = pack.pack(open_image(ref), [some_trace(opened)], PARAMETERS)
        assert (packed.changed, again.changed) == (True, False)
        assert again.block_image_digest == packed.block_image_digest
        results.append(dataclasses.replace(packed, seconds=0))
    assert results[0] == results[1]


def test_a_later_pack_counts(tmp_path: Path) -> None:
    ref = block_images.make(tmp_path, TARS)
    digests = []
    for generation, seed in enumerate((3, 4, 3, 5), start=1):
        opened = open_image(ref)
        packed = pack.pack(opened, [some_trace(opened, seed=seed)], PARAMETERS)
        assert packed.generation == generation
        digests.append(packed.block_image_digest)
        assert open_image(ref).manifest.digest == packed.block_image_digest
    assert len(set(digests)) == 4
    # Whoever converts again finds everything there, and the pack goes on counting.
    assert block_images.convert(ref) not in digests
    assert open_image(ref).manifest.digest == digests[-1]


def test_a_trace_of_other_layers_is_refused(tmp_path: Path) -> None:
    old = open_image(block_images.make(tmp_path / "old", TARS))
    ref = block_images.make(tmp_path / "new", [TARS[0], images.tar_of([("b", b"new")])])
    new = open_image(ref)
    stale = some_trace(old)
    with pytest.raises(
        errors.InvalidInputError, match=f"on block image {old.manifest.digest}.*trace it again"
    ):
        pack.pack(new, [some_trace(new), stale], PARAMETERS)
    assert [each.digest for each in new.origin.referrers(new.source_digest)] == [new.manifest.digest]


def test_a_read_outside_its_layer_is_refused(tmp_path: Path) -> None:
    opened = open_image(block_images.make(tmp_path, TARS))
    size = opened.layers[0].block_map.image_bytes
    with pytest.raises(errors.InvalidInputError, match="layer image 0 lie outside"):
        pack.pack(opened, [trace_of(opened, (0, size - 4096, 4097))], PARAMETERS)


def test_a_damaged_block_makes_no_pack(tmp_path: Path) -> None:
    ref = block_images.make(tmp_path, TARS)
    opened = open_image(ref)
    path = tmp_path / "blobs" / "sha256" / opened.layers[0].blob_digest.removeprefix("sha256:")
    data = bytearray(path.read_bytes())
    data[opened.layers[0].block_map.blocks[3].offset + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.IntegrityError, match="block 3"):
        pack.pack(opened, [trace_of(opened, (0, 3 * BLOCK, 4096))], PARAMETERS)
    assert len(opened.origin.referrers(opened.source_digest)) == 1


@pytest.mark.parametrize("damage", ["missing", "changed", "of other layers"])
def test_an_image_opens_without_a_pack_that_is_wrong(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    ref = block_images.make(tmp_path / "layout", TARS)
    opened = open_image(ref)
    packed = pack.pack(opened, [some_trace(opened)], PARAMETERS)
    path = tmp_path / "layout" / "blobs" / "sha256" / packed.table_digest.removeprefix("sha256:")
    if damage == "missing":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        stored = open_image(ref).block_image.boot_pack
        ref = block_images.make(tmp_path / "other", TARS[:1])
        other = open_image(ref)
        other.origin.put_blob(packed.table_digest, packed.table_bytes, BytesSource(path.read_bytes()))
        forged = dataclasses.replace(other.block_image, boot_pack=stored)
        other.origin.put_manifest(artifact.encode(forged), artifact.OCI_MANIFEST)
    with caplog.at_level(logging.WARNING):
        again = open_image(ref)
    assert again.boot_pack is None
    assert again.block_image.boot_pack is not None
    assert "without its boot pack" in caplog.text


def test_copy_carries_the_pack(tmp_path: Path, registry: servers.RegistryServer) -> None:
    ref = block_images.make(tmp_path, TARS)
    opened = open_image(ref)
    packed = pack.pack(opened, [some_trace(opened)], PARAMETERS)
    there = f"docker://{registry.host}/{servers.unique_name()}:v1"
    copying.copy(reference.parse(ref), reference.parse(there), connect.Options())
    copied = open_image(there)
    assert copied.manifest.digest == packed.block_image_digest
    assert copied.boot_pack == open_image(ref).boot_pack
    stored = copied.block_image.boot_pack
    assert stored is not None
    assert unpacked(copied.origin, stored.data) == expected_pages(opened, some_trace(opened))


def test_a_tag_of_the_block_image_follows(tmp_path: Path, registry: servers.RegistryServer) -> None:
    source = block_images.layout(tmp_path / "source", images.make(TARS))
    place = f"docker://{registry.host}/{servers.unique_name()}"
    convert(source, f"{place}:blocks")
    opened = open_image(f"{place}:blocks")
    pinned = f"{place}@{opened.manifest.digest}"
    packed = pack.pack(opened, [some_trace(opened)], PARAMETERS)
    assert packed.retagged
    assert open_image(f"{place}:blocks").manifest.digest == packed.block_image_digest
    assert open_image(pinned).boot_pack is None
    other = pack.pack(open_image(pinned), [some_trace(opened, seed=2)], PARAMETERS)
    assert not other.retagged
    assert open_image(f"{place}:blocks").manifest.digest == packed.block_image_digest


def test_an_index_of_block_images_follows(tmp_path: Path) -> None:
    made = {"linux/amd64": images.make(TARS), "linux/arm64": images.make(TARS[:1], architecture="arm64")}
    source = block_images.layout(tmp_path / "source", images.make_index(made))
    place = f"oci:{tmp_path}/out:all"
    result = convert(source, place, wanted="all")
    opened = open_image(place)
    packed = pack.pack(opened, [some_trace(opened)], PARAMETERS)
    assert packed.retagged
    assert open_image(place).manifest.digest == packed.block_image_digest
    entries = json.loads(origin_of(place).read_manifest("all").data)["manifests"]
    assert [entry["platform"]["architecture"] for entry in entries] == ["amd64", "arm64"]
    assert entries[1]["digest"] == result.images[1].block_image


def test_a_layout_of_block_images_alone(tmp_path: Path) -> None:
    source = block_images.layout(tmp_path / "source", images.make(TARS))
    convert(source, f"oci:{tmp_path}/out")
    opened = open_image(f"oci:{tmp_path}/out")
    packed = pack.pack(opened, [some_trace(opened)], PARAMETERS)
    assert open_image(f"oci:{tmp_path}/out").manifest.digest == packed.block_image_digest
