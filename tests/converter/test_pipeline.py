"""Whole conversions: what is stored, that it is deterministic, and what happens to bad input."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from converter import blob, erofs_writer, errors, limits, lower
from converter.source import Wanted
from imagefs import artifact, blockmap, erofs
from imagefs import errors as imagefs_errors
from imagefs.origin import Origin, connect
from tests.fixtures import images, servers, tars
from tests.fixtures.conversion import BLOCK, SMALL, block_image, convert, origin_of

GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def layout(directory: Path, image: images.Image) -> str:
    return f"oci:{image.write_layout(directory)}:latest"


def layer_image(origin: Origin, found: artifact.Layer) -> bytes:
    """A layer image by way of `zstd -d`, which knows nothing of block maps."""
    data = origin.read_blob(found.blob.digest, found.blob.size)
    return subprocess.run(["zstd", "-dcq"], input=data, stdout=subprocess.PIPE, check=True).stdout


def reader_of(image: bytes) -> erofs.Reader:
    return erofs.Reader(lambda offset, length: image[offset : offset + length])


def find(reader: erofs.Reader, path: str) -> erofs.Inode:
    inode: erofs.Inode | None = reader.root()
    for name in path.split("/"):
        assert inode is not None
        inode = reader.lookup(inode, name.encode())
    assert inode is not None, path
    return inode


def two_layers() -> list[bytes]:
    big = os.urandom(3 * BLOCK) + bytes(4 * BLOCK)
    return [
        images.tar_of([("d", None), ("d/small", b"hello"), ("d/big", big)]),
        images.tar_of([("e", None), ("e/other", b"x" * 5000)]),
    ]


TWO = two_layers()


# -- what is stored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "plain"])
@pytest.mark.parametrize("family", ["oci", "docker"])
def test_a_block_image_is_stored_beside_the_source(tmp_path: Path, encoding: str, family: str) -> None:
    made = images.make(TWO, encoding=encoding, family=family)
    result = convert(layout(tmp_path, made))
    origin = origin_of(f"oci:{tmp_path}")
    [candidate] = origin.referrers(made.top)
    assert candidate.digest == result.images[0].block_image
    image = block_image(result)
    assert image.subject.digest == made.top
    assert origin.read_manifest("latest").digest == made.top
    assert image.config.digest == made.document["config"]["digest"]
    for found, tar, source in zip(image.layers, TWO, made.document["layers"], strict=True):
        block_map = blockmap.decode(origin.read_blob(found.block_map.digest, found.block_map.size))
        assert f"sha256:{block_map.diff_id.hex()}" == images.digest(tar) == found.diff_id
        assert f"sha256:{block_map.source_digest.hex()}" == source["digest"]
        assert block_map.chain_id is None
        assert (block_map.compression_level, block_map.libzstd_version) == (3, blob.LIBZSTD_VERSION)
    reader = reader_of(layer_image(origin, image.layers[0]))
    assert reader.read(find(reader, "d/small"), 0, 100) == b"hello"


def test_the_layer_image_passes_fsck_and_the_report_counts(tmp_path: Path) -> None:
    result = convert(layout(tmp_path / "source", images.make(TWO)))
    origin = origin_of(f"oci:{tmp_path}/source")
    for found, line in zip(block_image(result).layers, result.images[0].layers, strict=True):
        (tmp_path / "image").write_bytes(layer_image(origin, found))
        subprocess.run(["fsck.erofs", tmp_path / "image"], check=True, capture_output=True)
        block_map = blockmap.decode(origin.read_blob(found.block_map.digest, found.block_map.size))
        assert line.blocks == len(block_map.blocks)
        assert line.holes == sum(block.zero for block in block_map.blocks)
        assert line.tar_bytes == len(TWO[line.number])
        assert line.blob_bytes == found.blob.size
    first, second = result.images[0].layers
    assert (first.entries, first.holes, second.entries) == (3, 4, 2)
    assert result.images[0].totals.tar_bytes == sum(map(len, TWO))


def test_the_same_input_gives_the_same_digests_whatever_the_threads(tmp_path: Path) -> None:
    # Layers 1 and 2 depend on what lies below: they wait for it in whatever order the threads come.
    stack = [*TWO, images.tar_of([("d/new", b"n")], root=False), bytes(link_layer())]
    source = layout(tmp_path / "source", images.make(stack, encoding=["gzip", "plain", "zstd", "gzip"]))
    seen = {
        convert(source, f"oci:{tmp_path}/{jobs}-{turn}", jobs=jobs).images[0].block_image
        for jobs in (1, 2, 8)
        for turn in (0, 1)
    }
    assert len(seen) == 1


def test_who_feeds_the_compressors_goes_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    pack = blob._pack

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def noted(*arguments: Any) -> Any:
        if threading.current_thread().name.startswith("compress"):
            seen.add(niceness())
        return pack(*arguments)

    monkeypatch.setattr(blob, "_pack", noted)
    convert(layout(tmp_path / "source", images.make(TWO)), f"oci:{tmp_path}/made")
    assert seen == {min(19, niceness() + 5)}


def link_layer() -> bytes:
    builder = tars.Builder()
    builder.raw(tars.header(b"linked", b"1", linkname=b"d/small"))
    return bytes(builder)


def test_a_layer_that_depends_on_those_below_says_so_and_is_complete(tmp_path: Path) -> None:
    made = images.make([*TWO, images.tar_of([("d/new", b"n")], root=False), link_layer()])
    result = convert(layout(tmp_path, made))
    origin = origin_of(f"oci:{tmp_path}")
    implied, linked = block_image(result).layers[2:]
    for found, line in zip((implied, linked), result.images[0].layers[2:], strict=True):
        assert line.depends_on_lower
        assert "chain=sha256:" in found.reuse_key
        assert blockmap.decode(origin.read_blob(found.block_map.digest, 1 << 20)).chain_id is not None
    reader = reader_of(layer_image(origin, linked))
    assert reader.read(find(reader, "linked"), 0, 100) == b"hello"
    reader = reader_of(layer_image(origin, implied))
    assert find(reader, "d").mtime_ns == 1_700_000_000 * 10**9


def test_everything_a_layer_may_hold_is_converted(tmp_path: Path) -> None:
    layers = tars.torture_layers()
    result = convert(layout(tmp_path / "source", images.make(layers)))
    origin = origin_of(f"oci:{tmp_path}/source")
    for found in block_image(result).layers:
        (tmp_path / "image").write_bytes(layer_image(origin, found))
        subprocess.run(["fsck.erofs", tmp_path / "image"], check=True, capture_output=True)


def test_an_image_without_layers(tmp_path: Path) -> None:
    result = convert(layout(tmp_path, images.make([])))
    assert block_image(result).layers == ()


def test_frames_smaller_than_blocks(tmp_path: Path) -> None:
    parameters = dataclasses.replace(SMALL, frame_bytes=4096)
    result = convert(layout(tmp_path, images.make(TWO)), parameters=parameters)
    origin = origin_of(f"oci:{tmp_path}")
    found = block_image(result).layers[0]
    block_map = blockmap.decode(origin.read_blob(found.block_map.digest, found.block_map.size))
    assert len(block_map.blocks[1].frames) == BLOCK // 4096
    assert find(reader_of(layer_image(origin, found)), "d/big").size == 7 * BLOCK


# -- platforms, tags, destinations -----------------------------------------------------------------------


def multi(directory: Path) -> str:
    index = {
        "linux/amd64": images.make(TWO),
        "linux/arm64/v8": images.make(TWO[:1], architecture="arm64"),
    }
    return layout(directory, images.make_index(index, attestations=True))


def test_all_platforms_and_an_index_under_the_tag(tmp_path: Path) -> None:
    result = convert(multi(tmp_path / "source"), f"oci:{tmp_path}/out:v1", wanted="all")
    assert [image.platform for image in result.images] == ["linux/amd64", "linux/arm64"]
    index = origin_of(f"oci:{tmp_path}/out").read_manifest("v1")
    assert index.digest == result.index
    entries = artifact.parse_json_object(index.data, "index")["manifests"]
    assert [entry["digest"] for entry in entries] == [image.block_image for image in result.images]
    assert {entry["artifactType"] for entry in entries} == {artifact.ARTIFACT_TYPE}


@pytest.mark.parametrize("wanted", [None, "all"])
def test_the_tag_of_the_destination_comes_last(tmp_path: Path, wanted: Wanted) -> None:
    source = multi(tmp_path / "source")
    made = convert(source, f"oci:{tmp_path}/out:v1", wanted=wanted)
    tagged = origin_of(f"oci:{tmp_path}/out").read_manifest("v1").digest
    assert tagged == (made.index if wanted else made.images[0].block_image)


def test_destinations_that_make_no_sense(tmp_path: Path) -> None:
    source = layout(tmp_path, images.make(TWO))
    archive = images.write_archive(tmp_path / "a.tar", TWO)
    for bad_source, bad_destination, message in (
        (source, source, "source image's own"),
        (source, "docker-archive:/x", "not a destination"),
        (source, f"oci:{tmp_path}@sha256:{'0' * 64}", "not a destination"),
        (f"docker-archive:{archive}", None, "--to"),
    ):
        with pytest.raises(imagefs_errors.InvalidInputError, match=message):
            convert(bad_source, bad_destination)
    assert origin_of(source).read_manifest("latest").digest == images.make(TWO).top


def test_an_archive_and_its_layers_in_another_place(tmp_path: Path) -> None:
    archive = images.write_archive(tmp_path / "a.tar", TWO)
    result = convert(f"docker-archive:{archive}", f"oci:{tmp_path}/out:v1")
    image = block_image(result)
    assert image.subject.digest == result.images[0].source_digest
    assert origin_of(f"oci:{tmp_path}/out").has_blob(image.config.digest)


def test_a_block_image_is_not_a_source(tmp_path: Path) -> None:
    result = convert(layout(tmp_path / "source", images.make(TWO)), f"oci:{tmp_path}/out:v1")
    with pytest.raises(errors.InvalidLayerError, match="block image already"):
        convert(result.images[0].ref)


# -- bad input -------------------------------------------------------------------------------------------


def bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: images.Image, match: str, **changes: Any
) -> Exception:
    """Convert `image` into a fresh destination; it must fail, tag nothing and leave no file."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    before = threading.active_count()
    with pytest.raises((errors.ConverterError, imagefs_errors.ImagefsError), match=match) as caught:
        convert(layout(tmp_path / "source", image), f"oci:{tmp_path}/out:v1", **changes)
    assert list(work.iterdir()) == []
    assert threading.active_count() <= before
    with pytest.raises(imagefs_errors.NotFoundError):
        origin_of(f"oci:{tmp_path}/out").read_manifest("v1")
    return caught.value


NAMED = r"oci:.*: layer 1 \(sha256:[0-9a-f]{64}\): "


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "plain"])
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_stored_bytes_that_differ_from_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, how: str
) -> None:
    def damage(number: int, data: bytes) -> bytes:
        if number == 0:
            return data
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :]
        return {"truncated": data[:middle], "flipped": flipped}[how]

    image = images.make(TWO, encoding=encoding, damage=damage)
    error = bad(tmp_path, monkeypatch, image, NAMED)
    assert isinstance(error, errors.LayerDigestError | imagefs_errors.IntegrityError), error


def test_what_is_stored_beyond_a_blob_is_not_read(tmp_path: Path) -> None:
    found = []
    for number, more in enumerate((b"", b"x" * 1000)):
        image = images.make(TWO, encoding="gzip", damage=lambda _, data, more=more: data + more)
        source = f"oci:{image.write_layout(tmp_path / str(number))}:latest"
        found.append(convert(source, f"oci:{tmp_path}/out-{number}").images[0].block_image)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("encoding", "cut", "match"),
    [
        ("gzip", lambda data: data[: len(data) // 2], r"gzip: the blob ends early, at byte \d+"),
        ("gzip", lambda data: data[:40] + b"\xff" * 20 + data[60:], r"gzip: damaged near byte \d+"),
        ("zstd", lambda data: data[: len(data) // 2], r"diff_id|tar byte"),
        ("zstd", lambda data: data[:4] + b"\xff" * 20 + data[24:], r"zstd: damaged near byte \d+"),
    ],
)
def test_a_layer_that_was_damaged_before_its_digest_was_taken(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoding: str,
    cut: Callable[[bytes], bytes],
    match: str,
) -> None:
    packed = cut(images.compress(TWO[1], encoding))
    types = [GZIP_LAYER, GZIP_LAYER.replace("gzip", encoding)]
    image = images.make(
        [images.compress(TWO[0], "gzip"), packed],
        encoding="plain",
        diff_ids=[images.digest(tar) for tar in TWO],
        layer_types=types,
    )
    bad(tmp_path, monkeypatch, image, NAMED + ".*" + f"({match})")


def test_a_diff_id_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = images.make(TWO, diff_ids=[images.digest(TWO[0]), images.digest(b"else")])
    error = bad(tmp_path, monkeypatch, image, NAMED + r".*diff_id is sha256:")
    assert isinstance(error, errors.LayerDigestError)


def test_a_broken_tar_is_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = TWO[1][:600] + b"\xff" * 100 + TWO[1][700:]
    error = bad(tmp_path, monkeypatch, images.make([TWO[0], broken]), NAMED + r".*byte")
    assert isinstance(error, errors.InvalidLayerError)


def test_a_hard_link_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = images.make([images.tar_of([("a", b"")]), link_layer()])
    bad(tmp_path, monkeypatch, image, NAMED + r".*d/small.*in no layer")


@pytest.mark.parametrize(
    ("change", "tar", "match"),
    [
        ({"max_entries": 2}, TWO[0], "--max-entries"),
        ({"max_layer_bytes": 100_000}, TWO[0], "--max-layer-bytes"),
        ({"max_image_bytes": 100_000}, TWO[0], "--max-image-bytes"),
        ({"max_ratio": 100}, images.tar_of([("zero", bytes(80 << 20))]), "--max-ratio"),
        ({"max_path_bytes": 50}, images.tar_of([("x" * 60, b"")]), "--max-path"),
    ],
)
def test_bombs_meet_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int], tar: bytes, match: str
) -> None:
    bounds = dataclasses.replace(limits.Limits(), **change)
    parameters = dataclasses.replace(SMALL, limits=bounds)
    image = images.make([images.tar_of([]), tar])
    error = bad(tmp_path, monkeypatch, image, NAMED + f".*{match}", parameters=parameters)
    assert isinstance(error, errors.LimitError)


def test_copies_of_lower_files_meet_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard link into a lower layer has no data in its own tar: what is copied counts all the same."""
    one, two = (images.tar_of([(name, b"x" * 90_000)]) for name in ("big", "other"))
    links = bytes(tars.Builder().hard_link(b"first", b"big").hard_link(b"second", b"other"))
    bounds = dataclasses.replace(limits.Limits(), max_image_bytes=100_000)
    parameters = dataclasses.replace(SMALL, limits=bounds)
    image = images.make([one, two, links])
    error = bad(tmp_path, monkeypatch, image, r".*layer 2.*--max-image-bytes", parameters=parameters)
    assert isinstance(error, errors.LimitError)


def test_a_file_that_claims_more_than_the_tar_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lying = tars.header(b"big", size=8 << 30) + b"x" * 1000
    bad(tmp_path, monkeypatch, images.make([TWO[0], lying]), NAMED + ".*big")


def test_a_zstd_bomb_of_many_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = zstandard.compress(bytes(1 << 20))
    types = [GZIP_LAYER, GZIP_LAYER.replace("gzip", "zstd")]
    image = images.make(
        [images.compress(TWO[0], "gzip"), frame * 200],
        encoding="plain",
        diff_ids=[images.digest(TWO[0]), images.digest(b"")],
        layer_types=types,
    )
    bad(tmp_path, monkeypatch, image, NAMED + ".*--max-ratio")


def test_the_first_error_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The layers around the broken one are endless to a converter that goes on: 200 MiB each.
    large = images.tar_of([("zero", bytes(200 << 20))])
    bounds = limits.Limits(max_ratio=1 << 30)
    image = images.make([large, TWO[1][:700], large], encoding=["zstd", "plain", "zstd"])
    bad(tmp_path, monkeypatch, image, NAMED, parameters=dataclasses.replace(SMALL, limits=bounds), jobs=3)


# -- registries ------------------------------------------------------------------------------------------


def test_registry_to_registry_and_to_s3(
    tmp_path: Path, registry: servers.RegistryServer, s3_server: servers.S3Server
) -> None:
    made = images.make(TWO)
    repository = f"docker://{registry.host}/{servers.unique_name()}"
    made.push(origin_of(repository), "v1")
    beside = convert(f"{repository}:v1")
    assert [c.digest for c in origin_of(repository).referrers(made.top)] == [beside.images[0].block_image]
    options = connect.Options(s3_endpoint_url=s3_server.endpoint_url)
    bucket = f"s3://{s3_server.bucket}/{servers.unique_name()}"
    there = convert(f"{repository}:v1", f"{bucket}:v1", options=options)
    assert there.images[0].block_image == beside.images[0].block_image
    back = convert(f"{repository}:v1", f"oci:{tmp_path}/out", options=options)
    assert back.images[0].block_image == beside.images[0].block_image


def test_skopeo_pushed_zstd_is_converted_from_a_registry(
    tmp_path: Path, registry: servers.RegistryServer
) -> None:
    images.make(TWO).write_layout(tmp_path / "source")
    repository = f"{registry.host}/{servers.unique_name()}"
    subprocess.run(
        f"skopeo copy -q --insecure-policy --dest-tls-verify=false --dest-compress-format zstd "
        f"oci:{tmp_path}/source:latest docker://{repository}:v1".split(),
        check=True,
    )
    result = convert(f"docker://{repository}:v1")
    again = convert(layout(tmp_path / "again", images.make(TWO)))
    blobs = [[line.blob_digest for line in r.images[0].layers] for r in (result, again)]
    assert blobs[0] == blobs[1]
    assert result.images[0].layers[0].compressed_bytes != again.images[0].layers[0].compressed_bytes


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_source_that_is_refused(
    registry: servers.RegistryServer, fault_server: servers.FaultProxy, status: int
) -> None:
    fault_server.upstream = registry.host
    name = servers.unique_name()
    made = images.make(TWO)
    made.push(origin_of(f"docker://{registry.host}/{name}"), "v1")
    digest = made.document["layers"][1]["digest"]
    fault_server.add(servers.Fault(path=f"blobs/{digest}", method="GET", times=None, status=status))
    expected = imagefs_errors.NotFoundError if status == 404 else imagefs_errors.DeniedError
    with pytest.raises(expected, match=rf"layer 1 \({digest}\)"):
        convert(f"docker://{fault_server.host}/{name}:v1")
    with pytest.raises(imagefs_errors.NotFoundError):
        origin_of(f"docker://{registry.host}/{name}").read_manifest("v2")
    assert origin_of(f"docker://{registry.host}/{name}").referrers(made.top) == []


def test_a_source_that_breaks_off_is_resumed(
    registry: servers.RegistryServer, fault_server: servers.FaultProxy
) -> None:
    fault_server.upstream = registry.host
    name = servers.unique_name()
    made = images.make(TWO)
    made.push(origin_of(f"docker://{registry.host}/{name}"), "v1")
    fault_server.add(servers.Fault(path="blobs/", method="GET", times=2, close_after_bytes=1000))
    result = convert(f"docker://{fault_server.host}/{name}:v1")
    assert len(result.images[0].layers) == 2


def test_a_destination_that_fails_in_the_middle_is_taken_up_again(
    tmp_path: Path, registry: servers.RegistryServer, fault_server: servers.FaultProxy
) -> None:
    fault_server.upstream = registry.host
    name = servers.unique_name()
    source = layout(tmp_path / "source", images.make(TWO))
    refuse = fault_server.add(
        servers.Fault(path=r"manifests/(sha256|v1)", method="PUT", times=None, status=403)
    )
    with pytest.raises(imagefs_errors.DeniedError):
        convert(source, f"docker://{fault_server.host}/{name}:v1")
    with pytest.raises(imagefs_errors.NotFoundError):
        origin_of(f"docker://{registry.host}/{name}").read_manifest("v1")
    refuse.times = 0
    result = convert(source, f"docker://{fault_server.host}/{name}:v1")
    assert [line.reused for line in result.images[0].layers] == ["destination", "destination"]
    tagged = origin_of(f"docker://{registry.host}/{name}").read_manifest("v1")
    assert tagged.digest == result.images[0].block_image


def test_a_layer_that_would_be_written_otherwise_has_another_reuse_key(tmp_path: Path) -> None:
    # If this digest changes, layers that were converted before must not be reused: raise LAYOUT_VERSION.
    made = images.make(tars.torture_layers())
    result = convert(layout(tmp_path, made))
    origin = origin_of(f"oci:{tmp_path}")
    hasher = hashlib.sha256()
    for found in block_image(result).layers:
        assert found.reuse_key.startswith(f"v{erofs_writer.LAYOUT_VERSION}/")
        hasher.update(hashlib.sha256(layer_image(origin, found)).digest())
    assert (erofs_writer.LAYOUT_VERSION, hasher.hexdigest()) == (
        1,
        "e678f0553e60beb1f178713dfd2e281433af5e8e469c3e66debb4a1ae2e67d8b",
    )


def test_a_hard_link_to_a_sparse_file_below_does_not_read_its_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tar of 1 KB can ask for a terabyte of them.
    size = 2000 * BLOCK + 100
    ends = [(0, b"begin"), (1000 * BLOCK + 7, b"middle"), (size - 3, b"end")]
    builder = tars.Builder()
    builder.directory(b"d/").old_sparse(b"d/small", size, ends)
    read_bytes = []
    read = lower._Entry.read

    def counting(entry: lower._Entry, offset: int, length: int) -> bytes:
        read_bytes.append(length)
        return read(entry, offset, length)

    monkeypatch.setattr(lower._Entry, "read", counting)
    result = convert(layout(tmp_path, images.make([bytes(builder), link_layer()])))
    below, linked = block_image(result).layers
    origin = origin_of(f"oci:{tmp_path}")
    images_of = [reader_of(layer_image(origin, each)) for each in (below, linked)]
    contents = [
        reader.read(find(reader, path), 0, size)
        for reader, path in zip(images_of, ("d/small", "linked"), strict=True)
    ]
    assert contents[0] == contents[1]
    assert [contents[1][at : at + len(piece)] for at, piece in ends] == [piece for _, piece in ends]
    assert sum(read_bytes) <= 4 * BLOCK
    assert result.images[0].layers[1].holes == result.images[0].layers[0].holes > 1900
