"""Source images from every transport: what a view says, which platform is chosen, and what is refused."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from converter import errors, limits, source
from converter.source import archive, repository
from imagefs import artifact, image, platforms, reference
from imagefs import errors as imagefs_errors
from imagefs.origin import connect
from tests.fixtures import images

OPTIONS = connect.Options()
TARS = [images.tar_of([("a", b"one")]), images.tar_of([("b", b"two" * 1000)])]
AMD64 = platforms.Platform("linux", "amd64")


def open_layout(directory: Path, wanted: source.Wanted = None) -> list[source.SourceImage]:
    return source.open_images(reference.parse(f"oci:{directory}"), OPTIONS, wanted, directory)


def content(layer: source.SourceLayer) -> bytes:
    with layer.open() as pieces:
        return b"".join(pieces)


def test_a_layout_gives_manifest_config_and_layers(tmp_path: Path) -> None:
    made = images.make(TARS)
    [image] = open_layout(made.write_layout(tmp_path))
    assert image.manifest.digest == made.top
    assert image.subject.size == len(made.manifests[made.top][1])
    assert [layer.diff_id for layer in image.layers] == [images.digest(tar) for tar in TARS]
    assert [content(layer) for layer in image.layers] == [images.compress(tar, "gzip") for tar in TARS]


def test_chain_ids_follow_the_specification() -> None:
    one, two = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    assert source.chain_ids([one, two]) == [one, images.digest(f"{one} {two}".encode())]


@pytest.mark.parametrize("family", ["oci", "docker"])
def test_the_platform_is_chosen_and_attestations_are_left_out(tmp_path: Path, family: str) -> None:
    arm = images.make(TARS[:1], architecture="arm64", family=family)
    amd = images.make(TARS, family=family)
    index = images.make_index({"linux/arm64/v8": arm, "linux/amd64": amd}, attestations=True, family=family)
    folder = index.write_layout(tmp_path)
    assert [i.manifest.digest for i in open_layout(folder, AMD64)] == [amd.top]
    assert [i.manifest.digest for i in open_layout(folder, platforms.parse("linux/arm64"))] == [arm.top]
    assert [i.manifest.digest for i in open_layout(folder, "all")] == [arm.top, amd.top]
    with pytest.raises(imagefs_errors.NotFoundError, match=r"s390x.*linux/arm64/v8, linux/amd64"):
        open_layout(folder, platforms.parse("linux/s390x"))


def test_an_image_without_index_is_refused_only_for_another_platform(tmp_path: Path) -> None:
    folder = images.make(TARS, architecture="riscv64").write_layout(tmp_path)
    assert str(open_layout(folder)[0].platform) == "linux/riscv64"
    with pytest.raises(imagefs_errors.NotFoundError, match="linux/riscv64, not for linux/amd64"):
        open_layout(folder, AMD64)


@pytest.mark.parametrize(
    ("media_type", "message"),
    [
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", r"layer 1 \(sha256:.*encrypted"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", r"layer 1 .*non-distributable"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", r"layer 1 .*non-distributable"),
        ("application/x-squashfs", r"layer 1 .*'application/x-squashfs' is unknown"),
    ],
)
def test_layers_that_cannot_be_read_are_named(tmp_path: Path, media_type: str, message: str) -> None:
    types = ["application/vnd.oci.image.layer.v1.tar+gzip", media_type]
    folder = images.make(TARS, layer_types=types).write_layout(tmp_path)
    with pytest.raises(errors.InvalidLayerError, match=message):
        open_layout(folder)


def test_config_and_manifest_must_agree(tmp_path: Path) -> None:
    folder = images.make(TARS, diff_ids=[images.digest(TARS[0])]).write_layout(tmp_path)
    with pytest.raises(errors.InvalidLayerError, match="2 layers, the image config 1 diff_ids"):
        open_layout(folder)


def test_a_manifest_without_layers_list_is_refused(tmp_path: Path) -> None:
    def patch(manifest: dict[str, Any]) -> None:
        manifest["layers"] = {}

    folder = images.make(TARS, patch=patch).write_layout(tmp_path)
    with pytest.raises(errors.InvalidLayerError, match="layers is not a list"):
        open_layout(folder)


def test_an_index_that_holds_itself_too_deep_is_refused(tmp_path: Path) -> None:
    nested = images.make(TARS)
    for _ in range(5):
        nested = images.make_index({"linux/amd64": nested})
    with pytest.raises(errors.InvalidLayerError, match="indexes inside one another"):
        open_layout(nested.write_layout(tmp_path), "all")


def test_an_index_lists_no_more_than_somebody_can_mean(tmp_path: Path) -> None:
    entry = {"mediaType": artifact.OCI_MANIFEST, "digest": "sha256:" + "1" * 64, "size": 1}
    many = {"schemaVersion": 2, "manifests": [entry] * (image.MAX_INDEX_ENTRIES + 1)}
    manifest = artifact.Manifest(artifact.OCI_INDEX, "sha256:" + "2" * 64, json.dumps(many).encode())
    with pytest.raises(imagefs_errors.InvalidInputError, match="1025 manifests"):
        image.index_entries(manifest, "index")


def test_indexes_that_list_many_indexes_are_refused_early(tmp_path: Path) -> None:
    reads = 0

    class Hydra:
        def read_manifest(self, digest: str) -> artifact.Manifest:
            nonlocal reads
            reads += 1
            return self.index(int(digest[7:], 16))

        def index(self, number: int) -> artifact.Manifest:
            heads = [
                {
                    "mediaType": artifact.OCI_INDEX,
                    "digest": f"sha256:{number * 1000 + head + 1:064x}",
                    "size": 1,
                }
                for head in range(500 if number <= 500 else 0)
            ]
            data = json.dumps({"manifests": heads}).encode()
            return artifact.Manifest(artifact.OCI_INDEX, f"sha256:{number:064x}", data)

    hydra = Hydra()
    with pytest.raises(errors.LimitError, match="indexes"):
        list(repository._image_entries(hydra, hydra.index(0), "name"))  # type: ignore[arg-type]
    assert reads < 100


def test_an_archive_of_very_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = images.write_archive(tmp_path / "a.tar", TARS)
    open_archive(path)
    monkeypatch.setattr(archive, "_MAX_MEMBERS", 3)
    with pytest.raises(errors.LimitError, match="more than 3 files"):
        open_archive(path)


def test_a_gzip_bomb_in_an_archive_is_met_by_its_limit(tmp_path: Path) -> None:
    path = images.write_archive(tmp_path / "a.tar", [bytes(3 << 20)], encoding="gzip")
    ref = reference.parse(f"docker-archive:{path}")
    with pytest.raises(errors.LimitError, match="--max-layer-bytes"):
        source.open_images(ref, OPTIONS, None, tmp_path, limits.Limits(max_layer_bytes=2 << 20))


def open_archive(path: Path, name: str = "") -> source.SourceImage:
    ref = reference.parse(f"docker-archive:{path}{name}")
    [image] = source.open_images(ref, OPTIONS, None, path.parent)
    return image


def test_an_archive_gives_the_same_manifest_however_its_layers_are_packed(tmp_path: Path) -> None:
    plain = open_archive(images.write_archive(tmp_path / "plain.tar", TARS))
    packed = open_archive(images.write_archive(tmp_path / "gzip.tar", TARS, encoding="gzip"))
    assert plain.manifest == packed.manifest
    assert [content(layer) for layer in packed.layers] == TARS
    assert [content(layer) for layer in plain.layers] == TARS
    assert [layer.descriptor.size for layer in packed.layers] == [len(tar) for tar in TARS]


def test_an_image_of_an_archive_is_found_by_its_name(tmp_path: Path) -> None:
    path = images.write_archive(tmp_path / "a.tar", TARS, tags=["example.com/team/app:v1", "app:latest"])
    digest = open_archive(path).manifest.digest
    for name in (":app:latest", ":docker.io/library/app:latest", ":app", ":example.com/team/app:v1"):
        assert open_archive(path, name).manifest.digest == digest
    with pytest.raises(imagefs_errors.NotFoundError, match=r"no image 'other:1'.*example.com/team/app:v1"):
        open_archive(path, ":other:1")


def test_what_is_no_archive_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + b"x" * 5000)
    with pytest.raises(errors.InvalidLayerError, match="decompress it first"):
        open_archive(tmp_path / "x.tar")
    with pytest.raises(imagefs_errors.NotFoundError, match="no such file"):
        open_archive(tmp_path / "y.tar")
    with tarfile.open(tmp_path / "z.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("hello"))
    with pytest.raises(errors.InvalidLayerError, match=r"no file 'manifest.json'"):
        open_archive(tmp_path / "z.tar")


def test_links_between_an_archives_layers_are_followed_and_loops_end(tmp_path: Path) -> None:
    config = images.config_of([images.digest(TARS[0])])
    manifest = [{"Config": "c.json", "RepoTags": None, "Layers": ["link/layer.tar"]}]
    for target, expected in (("../real/layer.tar", TARS[0]), ("../link/layer.tar", None)):
        path = tmp_path / f"{expected is None}.tar"
        with tarfile.open(path, "w") as tar:
            for name, data in (
                ("c.json", config),
                ("real/layer.tar", TARS[0]),
                ("manifest.json", json.dumps(manifest).encode()),
            ):
                images.add_file(tar, name, data)
            link = tarfile.TarInfo("link/layer.tar")
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        if expected is None:
            with pytest.raises(errors.InvalidLayerError, match=r"no file 'link/layer.tar'"):
                open_archive(path)
        else:
            assert content(open_archive(path).layers[0]) == expected


def test_skopeo_writes_archives_and_zstd_layouts_that_are_read(tmp_path: Path) -> None:
    folder = images.make(TARS).write_layout(tmp_path / "from")
    run = ["skopeo", "copy", "-q", "--insecure-policy"]
    subprocess.run([*run, f"oci:{folder}:latest", f"docker-archive:{tmp_path}/a.tar:app:v1"], check=True)
    image = open_archive(tmp_path / "a.tar", ":app:v1")
    assert [content(layer) for layer in image.layers] == TARS
    zstd = ["--dest-compress-format", "zstd", f"oci:{folder}:latest", f"oci:{tmp_path}/zstd:latest"]
    subprocess.run([*run, *zstd], check=True)
    [image] = open_layout(tmp_path / "zstd")
    assert image.layers[0].descriptor.media_type.endswith("+zstd")
    assert [layer.diff_id for layer in image.layers] == [images.digest(tar) for tar in TARS]
