"""Full copies in the device server: complete, kept, resumed, bounded, and never in anybody's way."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import cache, errors, fetcher, plan, readahead, syscalls
from imagefs.fuse import fill
from imagefs.lazylayer import LazyLayer
from tests.imagefs import scripted
from tests.imagefs.fuse import stack
from tests.imagefs.fuse.stack import Reader

BLOCK = scripted.BLOCK_BYTES
_POLICY = plan.Policy(retry_seconds=0.005, retry_max_seconds=0.01, read_ahead=readahead.ReadAheadPolicy(0, 0))


class Bench:
    """A filler over a real cache and fetcher, with an origin that does as it is told."""

    def __init__(self, path: Path, quota: int) -> None:
        self.path = path
        self.origin = scripted.ScriptedOrigin()
        self.layers: dict[str, list[LazyLayer]] = {}
        self.cache = cache.BlockCache(path / "cache", quota, 0, self.in_use)
        assert self.cache.index.ready.wait(30)
        self.fetcher = fetcher.Fetcher(self.cache, fetcher.FetchSettings(policy=_POLICY))
        self.filler = self._filler()

    def in_use(self) -> set[bytes]:
        everything = [layer for layers in self.layers.values() for layer in layers]
        return {block.digest for layer in everything for block in layer.block_map.blocks}

    def _filler(self) -> fill.Filler:
        return fill.Filler(self.cache, self.fetcher, self.layers_of, self.path)

    def layers_of(self, owner: str) -> Sequence[LazyLayer]:
        return self.layers.get(owner, ())

    def attach(self, owner: str, blocks: int, seed: int) -> bytes:
        data = scripted.image(blocks, seed)
        layer = scripted.layer(data, self.origin)
        self.fetcher.attach(layer)
        self.layers[owner] = [layer]
        return data

    def detach(self, owner: str) -> None:
        for layer in self.layers.pop(owner):
            self.fetcher.detach(layer.map_digest)
        self.filler.stop(owner)

    def restart(self) -> None:
        self.filler.close()
        self.filler = self._filler()

    def state(self, owner: str) -> str | None:
        copies = self.filler.status()["copies"]
        return next((copy["state"] for copy in copies if copy["owner"] == owner), None)

    def present(self, owner: str) -> int:
        blocks = [block for layer in self.layers[owner] for block in layer.block_map.blocks]
        return sum(self.cache.present(block.digest) for block in blocks)

    def read(self, owner: str) -> bytes:
        (layer,) = self.layers[owner]
        return self.fetcher.read(layer.map_digest, 0, layer.block_map.image_bytes)

    def close(self) -> None:
        self.filler.close()
        self.fetcher.close()
        self.cache.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(quota: int = 1 << 30) -> Bench:
        made.append(Bench(tmp_path, quota))
        return made[-1]

    with contextlib.ExitStack() as closing:
        closing.callback(lambda: [each.close() for each in made])
        yield make


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 3000)), min_size=1),
)
def test_the_cap_holds_over_every_stretch(rate: int, steps: list[tuple[float, int]]) -> None:
    """Never more than one second's worth above the rate, but for the one request that went into debt."""
    bucket = fill.TokenBucket(rate, 0.0)
    now = taken = 0.0
    for pause, count in steps:
        now += pause
        now += bucket.take(count, now)
        taken += count
        assert taken <= rate * (now + 1) * (1 + 1e-9) + 1e-6


def test_no_cap_never_waits() -> None:
    assert fill.TokenBucket(0, 0.0).take(1 << 40, 0.0) == 0.0


def test_a_complete_copy_needs_no_origin(bench: Callable[..., Bench]) -> None:
    made = bench()
    data = made.attach("image", 40, seed=1)
    made.filler.start("image", 0)
    scripted.eventually(lambda: made.state("image") == "complete")
    made.origin.blobs.clear()
    assert made.read("image") == data
    # Neighbours came together, not each by itself.
    assert len(made.origin.calls) < 40


def test_the_cap_holds_back_a_copy_and_no_reader(bench: Callable[..., Bench]) -> None:
    made = bench()
    data = made.attach("image", 20, seed=20)
    half = made.layers["image"][0].block_map.blocks[0].compressed_bytes // 2
    made.filler.start("image", half)  # a block every two seconds
    scripted.eventually(lambda: made.present("image") == 1)
    assert made.read("image") == data
    made.detach("image")
    assert len(made.origin.calls) >= 19, "the reader fetched them"


def test_a_copy_skips_what_is_there(bench: Callable[..., Bench]) -> None:
    made = bench()
    data = made.attach("image", 10, seed=2)
    assert made.read("image") == data
    made.origin.blobs.clear()
    made.filler.start("image", 0)
    scripted.eventually(lambda: made.state("image") == "complete")


def test_a_copy_outlives_what_another_image_reads(bench: Callable[..., Bench]) -> None:
    """The other image is larger than the whole cache: what it reads pushes itself out, never the copy."""
    made = bench(40 * BLOCK)
    data = made.attach("copied", 20, seed=3)
    made.filler.start("copied", 0)
    scripted.eventually(lambda: made.state("copied") == "complete")
    other = made.attach("other", 100, seed=4)
    assert made.read("other") == other
    made.cache.collect()
    assert made.cache.stats().evicted_blocks > 0
    blob = made.layers["copied"][0].blob_digest
    del made.origin.blobs[blob]
    assert made.read("copied") == data


def test_a_copy_pushes_out_what_nobody_uses_and_nothing_else(bench: Callable[..., Bench]) -> None:
    made = bench(40 * BLOCK)
    made.attach("in use", 15, seed=5)
    made.read("in use")
    made.attach("removed", 20, seed=6)
    made.read("removed")
    made.detach("removed")
    made.attach("copied", 15, seed=7)
    made.filler.start("copied", 0)
    scripted.eventually(lambda: made.state("copied") == "complete")
    made.cache.collect()
    assert made.present("in use") == 15


def test_a_copy_that_does_not_fit_waits_for_room_and_then_goes_on(bench: Callable[..., Bench]) -> None:
    made = bench(30 * BLOCK)
    made.attach("first", 20, seed=8)
    made.filler.start("first", 0)
    scripted.eventually(lambda: made.state("first") == "complete")
    made.attach("second", 20, seed=9)
    made.filler.start("second", 0)
    scripted.eventually(lambda: made.state("second") == "no room")
    assert 0 < made.present("second") <= 7
    assert made.present("first") == 20
    assert made.cache.stats().evicted_blocks == 0
    made.detach("first")
    scripted.eventually(lambda: made.state("second") == "complete")


def test_a_quota_smaller_than_one_image(bench: Callable[..., Bench]) -> None:
    made = bench(10 * BLOCK)
    data = made.attach("image", 40, seed=10)
    made.filler.start("image", 0)
    scripted.eventually(lambda: made.state("image") == "no room")
    assert made.present("image") <= 9
    assert made.read("image") == data


def test_a_copy_ends_with_its_image(bench: Callable[..., Bench]) -> None:
    made = bench()
    arrived, go_on = threading.Event(), threading.Event()

    def before(call: scripted.Call) -> None:
        arrived.set()
        assert go_on.wait(30)

    made.origin.before = before
    made.attach("image", 300, seed=11)
    made.filler.start("image", 0)
    assert arrived.wait(30)
    made.detach("image")
    go_on.set()
    made.attach("next", 3, seed=12)
    made.filler.start("next", 0)
    scripted.eventually(lambda: made.state("next") == "complete")
    assert len(made.origin.calls) <= 5, "what had been asked for, and no more"
    assert made.state("image") is None
    assert [owner for owner, _ in made.cache.pins()] == [f"copy:{made.path}:next"]
    made.detach("next")
    assert list(made.cache.pins()) == []


def test_a_successor_goes_on_and_drops_what_nobody_holds(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.attach("kept", 5, seed=13)
    made.attach("gone", 5, seed=14)
    made.origin.before = lambda call: (_ for _ in ()).throw(errors.UnavailableError("down"))
    made.filler.start("kept", 1 << 40)
    made.cache.pin(f"copy:{made.path}:gone", [])
    scripted.eventually(lambda: made.state("kept") == "origin fails")
    del made.layers["gone"]
    made.origin.before = lambda call: None
    made.restart()
    scripted.eventually(lambda: made.state("kept") == "complete")
    assert made.filler.status()["bandwidth_bytes_per_second"] == 1 << 40
    assert [owner for owner, _ in made.cache.pins()] == [f"copy:{made.path}:kept"]


def test_a_damaged_list_is_said_and_begun_anew(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    made = bench()
    (made.path / "fills.json").write_text("{")
    made.restart()
    assert "copies are not resumed" in caplog.text
    made.attach("image", 3, seed=15)
    made.filler.start("image", 0)
    scripted.eventually(lambda: made.state("image") == "complete")


def test_an_origin_that_fails_is_left_alone_and_others_are_copied(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench()
    made.attach("dead", 200, seed=16)
    dead_blob = made.layers["dead"][0].blob_digest
    made.attach("sound", 20, seed=17)

    def before(call: scripted.Call) -> None:
        if call.digest == dead_blob:
            raise errors.UnavailableError("down")

    made.origin.before = before
    made.filler.start("dead", 0)
    made.filler.start("sound", 0)
    scripted.eventually(lambda: made.state("sound") == "complete" and made.state("dead") == "origin fails")
    (copy,) = [copy for copy in made.filler.status()["copies"] if copy["owner"] == "dead"]
    assert "down" in copy["error"]
    asked = sum(call.digest == dead_blob for call in made.origin.calls)
    assert asked <= 20, "one walk, ended by its first error, and no second one right after"


def test_one_block_that_is_wrong_at_the_origin_does_not_stop_the_rest(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.attach("image", 30, seed=18)
    wrong = made.layers["image"][0].block_map.blocks[7]

    def spoil(call: scripted.Call, buffer: memoryview) -> None:
        if call.offset <= wrong.offset < call.offset + call.length:
            buffer[wrong.offset - call.offset + 20] ^= 1

    made.origin.spoil = spoil
    made.filler.start("image", 0)
    scripted.eventually(lambda: made.state("image") == "origin fails")
    assert made.present("image") >= 22, "all but the block and what came in its request after it"


# -- through the kernel --------------------------------------------------------------------------------


@pytest.mark.root
def test_a_running_reader_outlives_the_registry(tmp_path: Path, blobs: stack.BlobServer) -> None:
    """Filled, pressed by another image, the server killed, the registry stopped: every byte is right."""
    layers = [stack.make_layer(stack.random_image(3 << 20, seed)) for seed in (1, 2)]
    other = stack.make_layer(stack.random_image(24 << 20, 3), 1 << 20)
    values = stack.settings(tmp_path, cache_quota_bytes=12 << 20, read_deadline_seconds=2.0)
    with stack.running(values) as client:
        devices = client.attach("image", [blobs.add(layer) for layer in layers], stack.OPTIONS)
        client.fill("image")
        stack.eventually(lambda: _states(client) == {"image": "complete"}, "a full copy")
        assert all(each.complete for each in client.coverage("image").values())
        (pressing,) = client.attach("other", [blobs.add(other)], stack.OPTIONS)
        assert Reader(pressing).outcome() == stack.digest(other.image)
        client.detach("other")
        os.kill(client.status()["processes"]["server"], signal.SIGKILL)
        stack.eventually(lambda: _states(client) == {"image": "complete"}, "a successor that knows")
        blobs.dead = True
        for device, layer in zip(devices, layers, strict=True):
            stack.drop_cached_pages(device)
            assert Reader(device).outcome() == stack.digest(layer.image)


@pytest.mark.root
def test_coverage_and_pins_by_owner(tmp_path: Path, blobs: stack.BlobServer) -> None:
    image = stack.random_image(1 << 20, 4, zero_blocks=(2,), block_bytes=65536)
    layer, other = stack.make_layer(image), stack.make_layer(stack.random_image(65536, 5))
    values = stack.settings(tmp_path)
    with stack.running(values) as client:
        (device,) = client.attach("a", [blobs.add(layer)], stack.OPTIONS)
        client.attach("b", [blobs.add(other)], stack.OPTIONS)
        assert Reader(device, 0, 4096).outcome() == stack.digest(image[:4096])

        def present() -> int:
            return client.coverage("a")[layer.map_digest].present_blocks

        stack.eventually(lambda: present() > 0, "a block in the index")
        assert Reader(device).outcome() == stack.digest(image)
        stack.eventually(lambda: present() == 15, "all that are not zero")
        everything = client.coverage()
        assert set(everything) == {layer.map_digest, other.map_digest}
        assert everything[layer.map_digest].total_bytes == 15 * 65536
        assert not everything[other.map_digest].complete
        with pytest.raises(errors.NotFoundError):
            client.coverage("nobody")
        with pytest.raises(errors.NotFoundError):
            client.fill("nobody")
        client.pin("a")
        client.detach("a")
        assert client.collect()["removed_blocks"] == 0
    with contextlib.closing(cache.BlockCache(values.cache_dir, 65536, 0)) as small:
        assert small.collect().kept, "the pin outlives the server"
        assert len(small.index) == 15


@pytest.mark.root
def test_pins_that_leave_no_room_are_refused(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = stack.make_layer(stack.random_image(2 << 20, 6))
    with stack.running(stack.settings(tmp_path, cache_quota_bytes=2 << 20)) as client:
        client.attach("image", [blobs.add(layer)], stack.OPTIONS)
        with pytest.raises(errors.ConfigurationError, match="raise the cache's quota"):
            client.pin("image")


@pytest.mark.root
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_nothing_holds_up_no_reader(
    tmp_path: Path, blobs: stack.BlobServer, fault: str
) -> None:
    """A copy under way on a disk that fills up, or goes read-only: it waits, readers go on, it completes."""
    layer = stack.make_layer(stack.random_image(6 << 20, 7))
    values = stack.settings(tmp_path)
    values.cache_dir.mkdir()
    syscalls.mount("tmpfs", values.cache_dir, "tmpfs", 0, "size=3m" if fault == "full" else "size=300m")
    try:
        with stack.running(values) as client:
            (device,) = client.attach("image", [blobs.add(layer)], stack.OPTIONS)
            if fault == "read-only":
                client.status()  # it has made its folders
                syscalls.mount(
                    "tmpfs", values.cache_dir, "tmpfs", syscalls.MS_REMOUNT | syscalls.MS_RDONLY, ""
                )
            client.fill("image")
            stack.eventually(lambda: _states(client)["image"] == "no room", "waiting")
            assert Reader(device).outcome() == stack.digest(layer.image)
            syscalls.mount("tmpfs", values.cache_dir, "tmpfs", syscalls.MS_REMOUNT, "size=300m")
            stack.drop_cached_pages(device)
            assert Reader(device).outcome() == stack.digest(layer.image)
    finally:
        syscalls.umount(values.cache_dir, syscalls.MNT_DETACH)  # workers may be on their way out


@pytest.mark.root
def test_without_descriptors_left_readers_go_on(tmp_path: Path, blobs: stack.BlobServer) -> None:
    """A server that may open hardly anything more while a copy runs: what fails is tried again, the reader
    gets every byte, and the copy is completed once there are descriptors again."""
    layer = stack.make_layer(stack.random_image(8 << 20, 8))
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("image", [blobs.add(layer)], stack.OPTIONS)
        server = client.status()["processes"]["server"]
        used = len(os.listdir(f"/proc/{server}/fd"))
        _, hard = resource.prlimit(server, resource.RLIMIT_NOFILE)
        resource.prlimit(server, resource.RLIMIT_NOFILE, (used + 12, hard))
        client.fill("image")
        assert Reader(device).outcome() == stack.digest(layer.image)
        resource.prlimit(server, resource.RLIMIT_NOFILE, (hard, hard))
        stack.eventually(lambda: all(each.complete for each in client.coverage().values()), "all on disk")
        blobs.dead = True
        stack.drop_cached_pages(device)
        assert Reader(device).outcome() == stack.digest(layer.image)
        assert client.status()["processes"]["server"] == server


def _states(client: stack.Client) -> dict[str, str]:
    return {copy["owner"]: copy["state"] for copy in client.status()["fill"]["copies"]}
