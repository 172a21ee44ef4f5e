"""Starts with a boot pack: what it has comes from it, once; what goes wrong with it is never a reader's."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagefs.erofs import ondisk
from imagefs.fuse import control
from tests.imagefs.fuse import packing, stack
from tests.imagefs.fuse.stack import Reader, eventually

pytestmark = pytest.mark.root

_BLOCK = 65536
_PAGES = 1024
"""Of the layer images here: 4 MiB."""
_SCATTERED = [(0, page, 2) for page in range(0, _PAGES, 16)]
"""Two pages of every block, so that blocks instead of frames are not to be overlooked."""


def _layer(seed: int = 1) -> stack.Layer:
    return stack.make_layer(stack.layer_image(_PAGES * 4096, seed), _BLOCK)


def _pack_status(client: stack.Client) -> dict[str, Any]:
    (status,) = client.status()["boot_packs"]
    return dict(status)


def _fetch(client: stack.Client) -> dict[str, Any]:
    return dict(client.status()["fetch"])


def _streamed(client: stack.Client) -> bool:
    status = _pack_status(client)
    return bool(status["present_frames"] == status["frames"])


def _read_scattered(device: Path) -> bytes:
    """The pages of _SCATTERED, and no others: without the kernel's read-ahead."""
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        return b"".join(_read_direct(fd, page, pages) for _, page, pages in _SCATTERED)
    finally:
        os.close(fd)


def _read_direct(fd: int, page: int, pages: int) -> bytes:
    import mmap

    with mmap.mmap(-1, pages * 4096) as buffer:
        assert os.preadv(fd, [buffer], page * 4096) == len(buffer)
        return bytes(buffer)


def _scattered(layer: stack.Layer) -> bytes:
    return b"".join(layer.image[page * 4096 : (page + pages) * 4096] for _, page, pages in _SCATTERED)


def test_what_the_pack_has_comes_from_it_alone(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = _layer()
    pack = packing.make([layer], _SCATTERED)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS, packing.add(blobs, pack))
        eventually(lambda: _streamed(client), "the whole pack is here, though nobody reads")
        assert _read_scattered(device) == _scattered(layer)
        stats = _fetch(client)
        assert stats["demand_misses"] == 0
        assert stats["fetched_bytes"] == stats["boot_bytes"] == len(pack.data)
        # What it lacks comes by blocks, also where one read needs both.
        assert device.read_bytes() == layer.image


def test_a_reader_of_an_expected_page_waits_for_it(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = _layer()
    pack = packing.make([layer], _SCATTERED)
    with stack.running(stack.settings(tmp_path)) as client:
        specs = [blobs.add(layer)]
        blobs.open.clear()
        (device,) = client.attach("owner", specs, stack.OPTIONS, packing.add(blobs, pack))
        assert blobs.arrived.acquire(timeout=30)
        reader = Reader(device, 0, 4096)
        blobs.open.set()
        assert reader.outcome() == stack.digest(layer.image[:4096])
        eventually(lambda: _streamed(client), "the rest")
        # The kernel reads ahead; the block of the page itself was not asked for twice.
        assert _fetch(client)["boot_bytes"] == len(pack.data)


def test_frames_of_cached_blocks_are_not_fetched(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = _layer()
    pack = packing.make([layer], _SCATTERED)
    with stack.running(stack.settings(tmp_path)) as client:
        spec = blobs.add(layer)
        (device,) = client.attach("first", [spec], stack.OPTIONS)
        assert device.read_bytes() == layer.image
        requests = blobs.requests
        (device,) = client.attach("second", [spec], stack.OPTIONS, packing.add(blobs, pack))
        assert _read_scattered(device) == _scattered(layer)
        assert blobs.requests == requests


def test_a_pack_that_can_be_read_at_the_second_try_counts_for_open_devices(
    tmp_path: Path, blobs: stack.BlobServer
) -> None:
    """Workers that know the device are told."""
    layer = _layer()
    pack = packing.make([layer], _SCATTERED)
    with stack.running(stack.settings(tmp_path)) as client:
        spec = blobs.add(layer)
        unread = pack.spec(blobs.ref(), with_table=False)
        (device,) = client.attach("first", [spec], stack.OPTIONS, unread)
        with open(device, "rb", buffering=0) as file:
            os.pread(file.fileno(), 4096, 0)
            assert client.status()["boot_packs"] == []
            assert client.attach("second", [spec], stack.OPTIONS, packing.add(blobs, pack)) == [device]
            eventually(lambda: _streamed(client), "the pack")
            misses = _fetch(client)["demand_misses"]
            assert _read_scattered(device) == _scattered(layer)
            assert _fetch(client)["demand_misses"] == misses
            client.detach("second")
            assert client.status()["boot_packs"] == []
            assert device.read_bytes() == layer.image


@pytest.mark.parametrize("forger", ["first", "second"])
@pytest.mark.parametrize("victims_pack", ["none", "honest"])
def test_what_a_pack_makes_of_a_layer_nobody_sees_who_did_not_bring_it(
    tmp_path: Path, blobs: stack.BlobServer, forger: str, victims_pack: str
) -> None:
    """Only `glowplug check` compares a pack's pages with the blocks."""
    layer = _layer()
    forged = packing.make([dataclasses.replace(layer, image=bytes(len(layer.image)))], _SCATTERED)
    honest = packing.make([layer], _SCATTERED)
    packs = {
        "forger": packing.add(blobs, forged),
        "victim": packing.add(blobs, honest) if victims_pack == "honest" else None,
    }
    owners = ["forger", "victim"] if forger == "first" else ["victim", "forger"]
    with stack.running(stack.settings(tmp_path)) as client:
        spec = blobs.add(layer)
        device = {}
        for owner in owners:
            (device[owner],) = client.attach(owner, [spec], stack.OPTIONS, packs[owner])
        assert device["forger"].read_bytes() != layer.image, "else this would test nothing"
        assert device["victim"].read_bytes() == layer.image
        dying = client.status()["processes"]
        for pid in (dying["server"], *dying["workers"]):
            os.kill(pid, signal.SIGKILL)
        stack.drop_cached_pages(device["victim"])
        assert device["victim"].read_bytes() == layer.image
        client.detach("forger")
        stack.drop_cached_pages(device["victim"])
        assert device["victim"].read_bytes() == layer.image


def _with_features(layer: stack.Layer, features: int, frame_bytes: int = _BLOCK) -> stack.Layer:
    """A layer whose superblock says that it has them, with the right checksum."""
    image = bytearray(layer.image)
    struct.pack_into("<I", image, ondisk.SUPERBLOCK_OFFSET + 80, features)
    superblock = memoryview(image)[ondisk.SUPERBLOCK_OFFSET : ondisk.BLOCK_BYTES]
    struct.pack_into("<I", superblock, 4, 0)
    struct.pack_into("<I", superblock, 4, ondisk.crc32c(bytes(superblock)))
    return stack.make_layer(bytes(image), _BLOCK, frame_bytes)


def test_a_superblock_that_the_kernel_must_not_parse_is_not_shown_by_a_pack(
    tmp_path: Path, blobs: stack.BlobServer
) -> None:
    """It is the frame that is wrong: the layer's own page comes instead, whatever was cached."""
    layer = _layer()
    forged = packing.make([dataclasses.replace(layer, image=_with_features(layer, 1).image)], _SCATTERED)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS, packing.add(blobs, forged))
        eventually(lambda: _streamed(client), "the whole pack is here")
        for _ in range(2):
            assert _read_scattered(device) == _scattered(layer)
            os.kill(client.status()["processes"]["server"], signal.SIGKILL)
        assert "incompatible features 0x1" in (tmp_path / "state/server.log").read_text()


@pytest.mark.parametrize("frame_bytes", [_BLOCK, _BLOCK // 4])
def test_a_superblock_that_the_kernel_must_not_parse_is_not_shown_beside_a_pack(
    tmp_path: Path, blobs: stack.BlobServer, frame_bytes: int
) -> None:
    """The check before the mount saw the pack's page; the mount may come when that cannot be had."""
    honest = _layer()
    layer = _with_features(honest, 1, frame_bytes)
    pack = packing.make([dataclasses.replace(layer, image=honest.image)], _SCATTERED)
    spec, pack_spec = blobs.add(layer), packing.add(blobs, pack)
    with stack.running(stack.settings(tmp_path / "with")) as client:
        (device,) = client.attach("owner", [spec], stack.OPTIONS, pack_spec)
        assert Reader(device, 0, 4096, direct=True).outcome() == stack.digest(honest.image[:4096])
    del blobs.blobs[pack.table.data_digest]
    with stack.running(stack.settings(tmp_path / "without")) as client:
        (device,) = client.attach("owner", [spec], stack.OPTIONS, pack_spec)
        assert Reader(device, 0, 4096, direct=True).outcome() == "EIO"
        assert Reader(device, _BLOCK, _BLOCK).outcome() == stack.digest(layer.image[_BLOCK : 2 * _BLOCK])
        assert "incompatible features 0x1" in client.status()["devices"][0]["last_error"]["message"]


def _table_missing(blobs: stack.BlobServer, pack: packing.Pack) -> control.PackSpec:
    spec = pack.spec(blobs.ref(), with_table=False)
    return dataclasses.replace(spec, table_digest=stack.digest(b"nobody has this"))


def _table_of_other_layers(blobs: stack.BlobServer, pack: packing.Pack) -> control.PackSpec:
    other = _layer(9)
    return packing.add(blobs, packing.make([other], _SCATTERED))


def _data_missing(blobs: stack.BlobServer, pack: packing.Pack) -> control.PackSpec:
    return pack.spec(blobs.ref())


def _data_corrupt(blobs: stack.BlobServer, pack: packing.Pack) -> control.PackSpec:
    spec = packing.add(blobs, pack)
    blobs.blobs[pack.table.data_digest] = bytes(byte ^ 1 for byte in pack.data)
    return spec


def _frame_corrupt(blobs: stack.BlobServer, pack: packing.Pack) -> control.PackSpec:
    """One frame is another one of the same size: a whole frame, of wrong bytes."""
    spec = packing.add(blobs, pack)
    first, second = pack.table.frames[1:3]
    assert first.compressed_bytes == second.compressed_bytes
    data = bytearray(pack.data)
    data[first.offset : first.offset + first.compressed_bytes] = data[
        second.offset : second.offset + second.compressed_bytes
    ]
    blobs.blobs[pack.table.data_digest] = bytes(data)
    return spec


@pytest.mark.parametrize(
    "spoil", [_table_missing, _table_of_other_layers, _data_missing, _data_corrupt, _frame_corrupt]
)
def test_a_bad_pack_costs_no_reader_an_error(
    tmp_path: Path,
    blobs: stack.BlobServer,
    spoil: Callable[[stack.BlobServer, packing.Pack], control.PackSpec],
) -> None:
    layer = _layer()
    pack = packing.make([layer], _SCATTERED)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS, spoil(blobs, pack))
        assert _read_scattered(device) == _scattered(layer)
        assert device.read_bytes() == layer.image


def test_an_origin_that_dies_in_the_middle(tmp_path: Path, blobs: stack.BlobServer) -> None:
    """What came of the pack is read with the origin dead; the rest once it lives again."""
    layer = _layer()
    pack = packing.make([layer], [(0, 0, 512)])
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS, packing.add(blobs, pack))
        eventually(lambda: _streamed(client), "the pack")
        blobs.dead = True
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
        assert _read_direct(fd, 100, 200) == layer.image[100 * 4096 : 300 * 4096]
        os.close(fd)
        tried = blobs.requests
        reader = Reader(device)
        eventually(lambda: blobs.requests > tried, "a block is tried in vain")
        blobs.dead = False
        assert reader.outcome() == stack.digest(layer.image)


def test_an_origin_that_dies_in_the_middle_of_the_frames(tmp_path: Path, blobs: stack.BlobServer) -> None:
    """Frames that came are read with the origin dead; the readers of the others get their blocks once it
    lives again, and no frame is asked for a second time."""
    layer = _layer()
    pack = packing.make([layer], [(0, 0, 512)])
    frame_pages = pack.table.frames[0].uncompressed_bytes // 4096
    values = stack.settings(tmp_path, read_deadline_seconds=8.0)
    with stack.running(values) as client:
        blobs.cut_after_bytes = pack.table.frames[3].offset + 1
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS, packing.add(blobs, pack))
        frames = len(pack.table.frames)
        eventually(lambda: _pack_status(client)["failed_frames"] == frames - 3, "frames fail")
        assert _pack_status(client)["present_frames"] == 3
        blobs.dead = True
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
        assert _read_direct(fd, 0, 3 * frame_pages) == layer.image[: 3 * frame_pages * 4096]
        os.close(fd)
        reader = Reader(device)
        tried = blobs.requests
        eventually(lambda: blobs.requests > tried, "a block is tried in vain")
        blobs.dead, blobs.cut_after_bytes = False, None
        assert reader.outcome() == stack.digest(layer.image)
        assert _pack_status(client)["failed_frames"] > 0
        assert _pack_status(client)["error"] is None


def test_an_origin_that_is_dead_at_the_start(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = _layer()
    pack = packing.make([layer], _SCATTERED)
    """A reader of an expected page gives the frame a part of its deadline, and its block all of it."""
    with stack.running(stack.settings(tmp_path, read_deadline_seconds=4.0)) as client:
        blobs.dead = True
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS, packing.add(blobs, pack))
        reader = Reader(device)
        eventually(lambda: _pack_status(client)["failed_frames"] > 0, "a frame is given up")
        blobs.dead = False
        assert reader.outcome() == stack.digest(layer.image)


@pytest.mark.parametrize("victims", ["keeper", "workers", "server", "both"])
def test_killed_in_mid_stream(tmp_path: Path, blobs: stack.BlobServer, victims: str) -> None:
    """Readers go on; a successor fetches what the cache lacks of the pack, and no more."""
    layer = _layer()
    pack = packing.make([layer], [(0, page, 64) for page in range(0, _PAGES, 64)])
    with stack.running(stack.settings(tmp_path)) as client:
        specs = [blobs.add(layer)]
        blobs.open.clear()
        (device,) = client.attach("owner", specs, stack.OPTIONS, packing.add(blobs, pack))
        reader = Reader(device)
        assert blobs.arrived.acquire(timeout=30)
        before = client.status()["processes"]
        dying = [stack.keeper_pid(tmp_path / "state")] if victims == "keeper" else []
        dying += before["workers"] if victims in ("workers", "both") else []
        dying += [before["server"]] if victims in ("server", "both") else []
        for pid in dying:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        replaced = "keepers_replaced" if victims == "keeper" else "workers"
        eventually(lambda: client.status()["processes"][replaced] != before[replaced], "successors")
        blobs.open.set()
        assert reader.outcome() == stack.digest(layer.image)
        eventually(lambda: _streamed(client), "the successor goes on")
        assert _fetch(client)["demand_misses"] == 0


def test_two_packs_of_one_layer(tmp_path: Path, blobs: stack.BlobServer) -> None:
    """Are two devices, each without a miss, on one copy of its blocks."""
    layer = _layer()
    first, second = packing.make([layer], [(0, 0, 100)]), packing.make([layer], [(0, 90, 100)])
    with stack.running(stack.settings(tmp_path)) as client:
        spec = blobs.add(layer)
        (one,) = client.attach("one", [spec], stack.OPTIONS, packing.add(blobs, first))
        (two,) = client.attach("two", [spec], stack.OPTIONS, packing.add(blobs, second))
        assert one != two
        assert client.attach("third", [spec], stack.OPTIONS, packing.add(blobs, second)) == [two]
        eventually(
            lambda: all(s["present_frames"] == s["frames"] for s in client.status()["boot_packs"]), "both"
        )
        for device, page in ((one, 0), (two, 90)):
            fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
            assert _read_direct(fd, page, 100) == layer.image[page * 4096 :][: 100 * 4096]
            os.close(fd)
        assert _fetch(client)["demand_misses"] == 0
        assert one.read_bytes() == layer.image
        fetched_bytes = _fetch(client)["fetched_bytes"]
        client.detach("one")
        client.detach("two")
        assert two.read_bytes() == layer.image, "the third has it; and its blocks are those of the first"
        assert _fetch(client)["fetched_bytes"] == fetched_bytes
        assert os.listdir(two.parent) == [two.name]
        assert client.coverage("third")[layer.map_digest].complete


def test_without_room_the_pack_is_served_from_memory_or_by_blocks(
    tmp_path: Path, blobs: stack.BlobServer
) -> None:
    layer = _layer()
    pack = packing.make([layer], _SCATTERED)
    values = stack.settings(tmp_path, free_floor_bytes=1 << 60)
    with stack.running(values) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS, packing.add(blobs, pack))
        assert _read_scattered(device) == _scattered(layer)
        assert device.read_bytes() == layer.image
