"""When a layer gets a file of its own, who is told of it, and what it is good for when all else is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs import cache, cachedirectory, image, kernelreadahead, layerfiles, mount, reference
from imagefs.fuse import layerwriter
from imagefs.lazylayer import LazyLayer
from tests.fixtures import block_images, images
from tests.imagefs import scripted
from tests.imagefs.fuse import stack
from tests.imagefs.fuse.stack import Reader

BLOCK = scripted.BLOCK_BYTES
IMAGE_BYTES = 6 * BLOCK


class Bench:
    """A writer over a real cache, that looks at its layers all the time."""

    def __init__(self, path: Path, quota: int = 1 << 30, *, enabled: bool = True) -> None:
        self.path = path
        self.quiet_seconds = 60.0
        self.layers: list[LazyLayer] = []
        self.cache = cache.BlockCache(path, quota, 0, self.in_use)
        assert self.cache.index.ready.wait(30)
        self.writer = layerwriter.LayerWriter(
            self.cache, path, lambda: self.layers, lambda _: self.quiet_seconds, enabled=enabled
        )

    def in_use(self) -> set[bytes]:
        return {block.digest for layer in self.layers for block in layer.block_map.blocks}

    def attach(self, seed: int, blocks: int = 6, *, here: int = 6) -> LazyLayer:
        """A layer, of which `here` blocks are in the cache."""
        made = stack.make_layer(stack.layer_image(blocks * BLOCK, seed), BLOCK)
        for index in range(here):
            self.bring(made, index)
        layer = LazyLayer(made.map_digest, stack.digest(made.blob), made.block_map, scripted.ScriptedOrigin())
        self.layers.append(layer)
        return layer

    def bring(self, made: stack.Layer, index: int) -> None:
        data = made.image[index * BLOCK : (index + 1) * BLOCK]
        draft = self.cache.draft(len(data))
        draft.write(memoryview(data), 0)
        os.close(self.cache.put(made.block_map.blocks[index].digest, draft, data))

    def looked(self) -> None:
        """Wait until the writer has looked at all layers since now."""
        before = looks[0]
        scripted.eventually(lambda: looks[0] >= before + 2)

    def close(self) -> None:
        self.writer.close()
        self.cache.close()


looks = [0]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    real = layerwriter.LayerWriter._look

    def look(self: layerwriter.LayerWriter, layers: list[LazyLayer]) -> None:
        real(self, layers)
        looks[0] += 1

    monkeypatch.setattr(layerwriter, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(layerwriter, "_ROOM_SECONDS", 0.01)
    monkeypatch.setattr(layerwriter.LayerWriter, "_look", look)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "cache")
    yield made
    made.close()


def test_a_whole_layer_gets_a_file_and_an_incomplete_one_none(bench: Bench) -> None:
    whole, incomplete = bench.attach(1), bench.attach(2, here=5)
    scripted.eventually(lambda: len(bench.writer.mountable(bench.layers)) == 1)
    bench.looked()
    (found,) = bench.writer.mountable(bench.layers).items()
    assert found[0] == whole.map_digest
    assert found[1].read_bytes() == stack.layer_image(IMAGE_BYTES, 1)
    bench.bring(stack.make_layer(stack.layer_image(IMAGE_BYTES, 2), BLOCK), 5)
    scripted.eventually(lambda: incomplete.map_digest in bench.writer.mountable(bench.layers))


def test_a_layer_that_is_still_read_from_its_origin_waits(bench: Bench) -> None:
    bench.quiet_seconds = layerwriter._QUIET_SECONDS - 1
    bench.attach(3)
    bench.looked()
    assert not bench.writer.mountable(bench.layers)
    bench.quiet_seconds = layerwriter._QUIET_SECONDS
    scripted.eventually(lambda: bool(bench.writer.mountable(bench.layers)))


def test_a_start_is_not_disturbed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = layerfiles.LayerFiles._read
    reads = []

    def read(self: layerfiles.LayerFiles, digest: bytes, out: memoryview) -> None:
        reads.append(digest)
        if len(reads) == 3:
            bench.quiet_seconds = 0.0  # another image is started
        real(self, digest, out)

    monkeypatch.setattr(layerwriter, "_CALM_SECONDS", 0.05)
    monkeypatch.setattr(layerfiles.LayerFiles, "_read", read)
    layer = bench.attach(8)
    scripted.eventually(lambda: len(reads) == 3)
    time.sleep(0.3)
    assert len(reads) == 3
    assert bench.writer.digest(layer.map_digest) is None
    bench.quiet_seconds = 60.0
    scripted.eventually(lambda: bench.writer.digest(layer.map_digest) is not None)
    assert len(reads) == 6


def test_there_is_no_file_where_the_room_is_for_blocks(tmp_path: Path) -> None:
    """The blocks are 6 of 17, with the file it would be 12: more than half."""
    bench = Bench(tmp_path / "cache", quota=17 * BLOCK)
    try:
        bench.attach(4)
        scripted.eventually(lambda: not bench.cache.stats().unsynced_blocks)
        bench.looked()
        assert not bench.writer.mountable(bench.layers)
    finally:
        bench.close()


def test_nobody_gets_one_who_does_not_want_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "cache", enabled=False)
    try:
        layer = bench.attach(5)
        bench.writer._files.write(layer.map_digest, layer.block_map, lambda: True)
        assert not bench.writer.mountable(bench.layers)
        assert bench.writer.digest(layer.map_digest) is None
    finally:
        bench.close()


def test_a_file_that_was_removed_is_written_anew(bench: Bench) -> None:
    layer = bench.attach(6)
    scripted.eventually(lambda: bench.writer.digest(layer.map_digest) is not None)
    path = bench.writer.mountable([layer])[layer.map_digest]
    os.unlink(path.resolve())
    assert not bench.writer.mountable([layer])
    scripted.eventually(lambda: bool(bench.writer.mountable([layer])))


def test_a_disk_that_refuses_is_left_alone_for_a_while(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = cachedirectory.CacheDirectory.begin
    tries = []

    def refuse(self: cachedirectory.CacheDirectory, length: int) -> cachedirectory.WritingFile:
        if length != IMAGE_BYTES:
            return real(self, length)
        tries.append(length)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cachedirectory.CacheDirectory, "begin", refuse)
    layer = bench.attach(7)
    scripted.eventually(lambda: len(tries) == 1)
    bench.looked()
    assert len(tries) == 1
    assert bench.writer.digest(layer.map_digest) is None
    assert "gets no file of its own: [Errno 28]" in caplog.text


# -- a device server ------------------------------------------------------------------------------------


def test_a_server_names_the_files_of_an_owners_layers(tmp_path: Path, blobs: stack.BlobServer) -> None:
    values = stack.settings(tmp_path)
    layers = [stack.make_layer(stack.layer_image(IMAGE_BYTES, seed)) for seed in (20, 21)]
    with stack.running(values) as client:
        devices = client.attach("me", [blobs.add(layer) for layer in layers], stack.OPTIONS)
        assert Reader(devices[0]).outcome() == stack.digest(layers[0].image)
        assert client.layer_files("me") == {}
        stack.write_layer_file(values.cache_dir, layers[0].map_digest, layers[0].block_map)
        ((map_digest, path),) = client.layer_files("me").items()
        assert map_digest == layers[0].map_digest
        assert path.read_bytes() == layers[0].image
        assert client.layer_files() == {map_digest: path}
        assert client.layer_files("nobody") == {}


def test_blocks_that_went_come_from_the_file_and_not_from_the_origin(
    tmp_path: Path, blobs: stack.BlobServer
) -> None:
    values = stack.settings(tmp_path, workers=1)
    layer = stack.make_layer(stack.layer_image(IMAGE_BYTES, 22))
    with stack.running(values) as client:
        (device,) = client.attach("me", [blobs.add(layer)], stack.OPTIONS)
        assert Reader(device).outcome() == stack.digest(layer.image)
        stack.write_layer_file(values.cache_dir, layer.map_digest, layer.block_map)
        assert client.layer_files("me")
        files = cachedirectory.CacheDirectory(values.cache_dir)
        for block in layer.block_map.blocks:
            os.unlink(files.block_path(block.digest))
        (pid,) = client.status()["processes"]["workers"]
        os.kill(pid, signal.SIGKILL)  # it has the blocks open
        blobs.dead = True
        before = blobs.requests
        assert Reader(device, direct=True).outcome() == stack.digest(layer.image)
        assert blobs.requests == before
        (covered,) = client.coverage("me").values()
        assert covered.complete


def erofs_image(folder: Path) -> bytes:
    """A layer image of our converter's, by `zstd -d`."""
    tree = images.tar_of([("etc", None), ("etc/motd", b"of a file\n"), ("data", bytes(range(256)) * 1024)])
    opened = image.open_image(reference.parse(block_images.make(folder / "image", [tree])))
    blob = folder / "image/blobs/sha256" / opened.layers[0].blob_digest.removeprefix("sha256:")
    return subprocess.run(["zstd", "-dqc", blob], check=True, capture_output=True).stdout


@pytest.mark.root
def test_who_reads_a_mounted_file_needs_no_server(tmp_path: Path, blobs: stack.BlobServer) -> None:
    values = stack.settings(tmp_path)
    layer = stack.make_layer(erofs_image(tmp_path))
    target = tmp_path / "mounted"
    target.mkdir()
    with stack.running(values) as client:
        (device,) = client.attach("me", [blobs.add(layer)], stack.OPTIONS)
        assert Reader(device).outcome() == stack.digest(layer.image)
        stack.write_layer_file(values.cache_dir, layer.map_digest, layer.block_map)
        (path,) = client.layer_files("me").values()
        mount.mount_layer(None, "layer", path, target)
        assert kernelreadahead.get(kernelreadahead.backing_device(target)) == kernelreadahead.READ_AHEAD_KIB
        os.unlink(path.resolve())  # evicted: whoever has it keeps it
    try:
        assert (target / "etc/motd").read_text() == "of a file\n"
    finally:
        mount.unmount_all([target])
