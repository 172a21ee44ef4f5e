"""What is stored is found again: reuse in the destination, in the layer cache, and what is not trusted."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from converter import errors, reuse
from imagefs import artifact, blockmap
from imagefs.origin import BytesSource, Origin
from tests.fixtures import images, servers
from tests.fixtures.conversion import SMALL, block_image, convert, origin_of

TARS = [
    images.tar_of([("d", None), ("d/small", b"hello"), ("d/big", os.urandom(200_000))]),
    images.tar_of([("d/new", b"n")], root=False),
]


def layout(directory: Path, tars: Sequence[bytes] = TARS, encoding: str = "gzip") -> str:
    return f"oci:{images.make(tars, encoding=encoding).write_layout(directory)}:latest"


def reused(result: object) -> list[str]:
    return [line.reused for line in result.images[0].layers]  # type: ignore[attr-defined]


def index_tags(folder: Path) -> list[str]:
    document = artifact.parse_json_object((folder / "index.json").read_bytes(), "index")
    names = [
        entry.get("annotations", {}).get("org.opencontainers.image.ref.name", "")
        for entry in document["manifests"]
    ]
    return [name for name in names if name.startswith("glowplug-layer-")]


def tree_of(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    source = layout(tmp_path)
    first = convert(source)
    before = tree_of(tmp_path)
    again = convert(source)
    assert reused(first) == ["", ""]
    assert reused(again) == ["destination", "destination"]
    assert [i.block_image for i in again.images] == [i.block_image for i in first.images]
    assert tree_of(tmp_path) == before


def test_what_no_reader_would_take_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = layout(tmp_path)
    monkeypatch.setattr(blockmap, "MAX_MAP_BYTES", 300)
    with pytest.raises(errors.LimitError, match=r"readers take 300.*--block-size"):
        convert(source)
    assert artifact.ARTIFACT_TYPE.encode() not in (tmp_path / "index.json").read_bytes()


def test_a_folder_with_one_image_needs_no_tag_before_or_after(tmp_path: Path) -> None:
    layout(tmp_path)
    first = convert(f"oci:{tmp_path}")
    assert convert(f"oci:{tmp_path}").images[0].block_image == first.images[0].block_image


def test_a_layer_is_found_under_another_image_of_the_repository(tmp_path: Path) -> None:
    out = f"oci:{tmp_path}/out"
    convert(layout(tmp_path / "one"), out)
    more = [*TARS, images.tar_of([("top", b"t")])]
    assert reused(convert(layout(tmp_path / "two", more), out)) == ["destination", "destination", ""]
    # Layer 1 leaves its parent out: on another base, it is another layer.
    other_base = [images.tar_of([("d", None), ("x", b"")]), TARS[1]]
    assert reused(convert(layout(tmp_path / "three", other_base), out)) == ["", ""]


def test_reuse_and_conversion_give_the_same_digests(tmp_path: Path) -> None:
    zstd = layout(tmp_path / "zstd", encoding="zstd")
    fresh = convert(zstd, f"oci:{tmp_path}/fresh")
    convert(layout(tmp_path / "gzip"), f"oci:{tmp_path}/out")
    again = convert(zstd, f"oci:{tmp_path}/out")
    assert reused(again) == ["destination", "destination"]
    assert again.images[0].block_image == fresh.images[0].block_image


def test_other_parameters_are_other_layers(tmp_path: Path) -> None:
    source = layout(tmp_path)
    convert(source)
    for change in ({"block_bytes": 128 * 1024}, {"frame_bytes": 4096}, {"compression_level": 5}):
        parameters = dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]
        assert reused(convert(source, parameters=parameters)) == ["", ""]
        assert reused(convert(source, parameters=parameters)) == ["destination", "destination"]
    assert reused(convert(source, reuse=False)) == ["", ""]


def test_the_layer_cache_fills_an_empty_destination(tmp_path: Path) -> None:
    source, cache = layout(tmp_path / "source"), tmp_path / "cache"
    first = convert(source, f"oci:{tmp_path}/one", layer_cache=cache)
    assert len(index_tags(cache)) == 2
    second = convert(source, f"oci:{tmp_path}/two", layer_cache=cache)
    assert reused(second) == ["cache", "cache"]
    assert second.images[0].block_image == first.images[0].block_image
    for layer in block_image(second).layers:
        assert origin_of(f"oci:{tmp_path}/two").has_blob(layer.blob.digest)
    assert len(index_tags(tmp_path / "two")) == 2


def test_layers_above_reused_ones_still_read_them(tmp_path: Path, registry: servers.RegistryServer) -> None:
    out = f"docker://{registry.host}/{servers.unique_name()}"
    convert(layout(tmp_path / "base", TARS[:1]), out)
    both = layout(tmp_path / "both")
    result = convert(both, out)
    assert reused(result) == ["destination", ""]
    assert result.images[0].layers[1].depends_on_lower
    assert convert(both, f"oci:{tmp_path}/fresh").images[0].block_image == result.images[0].block_image


def damaged(origin: Origin, folder: Path, how: str) -> None:
    """Spoil what the folder's layer index says of the first layer."""
    key = reuse.Key(1, images.digest(TARS[0]), None, *SPOILED)
    found = reuse.LayerIndex(origin).find(key)
    assert found is not None
    blob = folder / "blobs/sha256" / found.blob.digest.removeprefix("sha256:")
    if how == "blob missing":
        blob.unlink()
        return
    other = dataclasses.replace(found.block_map, diff_id=bytes(32))
    data = b"no block map" if how == "map is none" else blockmap.encode(other)
    digest = artifact.digest_of(data)
    origin.put_blob(digest, len(data), BytesSource(data))
    spoiled = artifact.Descriptor(artifact.MAP_MEDIA_TYPE, digest, len(data))
    reuse.LayerIndex(origin).record(key, spoiled, found.blob)


SPOILED = (SMALL.block_bytes, SMALL.frame_bytes, SMALL.compression_level, 10507)


@pytest.mark.parametrize("how", ["blob missing", "map is none", "map of another layer"])
def test_what_does_not_hold_what_it_says_is_converted_again(tmp_path: Path, how: str) -> None:
    source, cache = layout(tmp_path / "source"), tmp_path / "cache"
    good = convert(source, f"oci:{tmp_path}/one", layer_cache=cache)
    damaged(origin_of(f"oci:{cache}"), cache, how)
    result = convert(source, f"oci:{tmp_path}/two", layer_cache=cache)
    assert reused(result) == ["", "cache"]
    assert result.images[0].block_image == good.images[0].block_image
    # Converting it put the right entry back.
    assert reused(convert(source, f"oci:{tmp_path}/three", layer_cache=cache)) == ["cache", "cache"]


def test_other_artifacts_about_the_source_do_not_disturb(tmp_path: Path) -> None:
    source = layout(tmp_path)
    origin = origin_of(source)
    top = origin.read_manifest("latest")
    origin.put_blob(
        "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", 2, BytesSource(b"{}")
    )
    for artifact_type in ("application/vnd.example.sbom", artifact.ARTIFACT_TYPE):
        config = {"mediaType": "application/vnd.oci.empty.v1+json", "size": 2}
        config["digest"] = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        document = {
            "schemaVersion": 2,
            "mediaType": artifact.OCI_MANIFEST,
            "artifactType": artifact_type,
            "config": config,
            "layers": [config],
            "subject": {"mediaType": top.media_type, "digest": top.digest, "size": len(top.data)},
        }
        origin.put_manifest(artifact.canonical_json(document), artifact.OCI_MANIFEST)
    assert reused(convert(source)) == ["", ""]


def test_converters_at_the_same_time_do_not_lose_each_other(
    tmp_path: Path, registry: servers.RegistryServer
) -> None:
    name = f"docker://{registry.host}/{servers.unique_name()}"
    made = images.make(TARS)
    made.push(origin_of(name), "v1")
    sizes = [64 * 1024 << shift for shift in range(4)]
    results: dict[int, str] = {}

    def run(size: int) -> None:
        parameters = dataclasses.replace(SMALL, block_bytes=size, frame_bytes=size)
        results[size] = convert(f"{name}:v1", parameters=parameters).images[0].block_image

    threads = [threading.Thread(target=run, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {found.digest for found in origin_of(name).referrers(made.top)} == set(results.values())
    assert len(set(results.values())) == len(sizes)
