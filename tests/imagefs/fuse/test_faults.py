"""Origins that hang or die, and disks that are full: who waits, who gets EIO, and who must not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs import syscalls
from imagefs.fuse import layers
from tests.imagefs.fuse import stack
from tests.imagefs.fuse.stack import Reader, eventually

pytestmark = pytest.mark.root

_BLOCK = 65536


@pytest.fixture
def other() -> Iterator[stack.BlobServer]:
    """A second origin."""
    server = stack.BlobServer()
    yield server
    server.close()


def test_one_hung_image_does_not_hold_up_another(
    tmp_path: Path, blobs: stack.BlobServer, other: stack.BlobServer
) -> None:
    """More reads hang than the kernel allows in flight by default, and than the fetcher has threads."""
    hung = stack.make_layer(stack.random_image(8 << 20, 1), _BLOCK)
    sound = stack.make_layer(stack.random_image(8 << 20, 2), _BLOCK)
    blobs.open.clear()
    with stack.running(stack.settings(tmp_path)) as client:
        (hung_device,) = client.attach("hung", [blobs.add(hung)], stack.OPTIONS)
        (device,) = client.attach("sound", [other.add(sound)], stack.OPTIONS)
        waiting = [Reader(hung_device, start << 18, 4096) for start in range(32)]
        assert blobs.arrived.acquire(timeout=30)
        reader = Reader(device)
        assert reader.outcome() == stack.digest(sound.image)
        assert all(one.running() for one in waiting)
        # Letting go of the hung image frees its readers, at once and not at the deadline.
        client.detach("hung")
        assert {one.outcome() for one in waiting} == {"EIO"}
        assert not blobs.open.is_set()


def test_one_repository_that_hangs_has_its_share_only(tmp_path: Path, blobs: stack.BlobServer) -> None:
    """The same for one blob that hangs beside another on the same registry."""
    layer = stack.make_layer(stack.random_image(4 << 20, 3), _BLOCK)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("a", [blobs.add(layer)], stack.OPTIONS)
        blobs.open.clear()
        reader = Reader(device)
        assert blobs.arrived.acquire(timeout=30)
        # What is in the cache already needs no origin: here zeros, served without one.
        zeros = stack.make_layer(bytes(4 << 20), _BLOCK)
        (device,) = client.attach("b", [blobs.add(zeros)], stack.OPTIONS)
        assert Reader(device).outcome() == stack.digest(zeros.image)
        assert reader.running()
        blobs.open.set()
        assert reader.outcome() == stack.digest(layer.image)


def test_a_dead_origin_is_a_pause_then_an_error_then_forgotten(
    tmp_path: Path, blobs: stack.BlobServer
) -> None:
    layer = stack.make_layer(stack.random_image(2 << 20, 4), _BLOCK)
    values = stack.settings(tmp_path, read_deadline_seconds=1.0)
    with stack.running(values) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        half = 1 << 20
        assert Reader(device, 0, 4096).outcome() == stack.digest(layer.image[:4096])
        blobs.dead = True
        assert Reader(device, half, 4096).outcome() == "EIO"
        # What was read before is still there, and the processes live.
        assert Reader(device, 0, 4096).outcome() == stack.digest(layer.image[:4096])
        assert client.status()["processes"]["workers_replaced"] == 0
        blobs.dead = False
        time.sleep(layers.SAME_READ_SECONDS)
        assert Reader(device).outcome() == stack.digest(layer.image)
        log = (values.state_dir / "server.log").read_text()
        # Once: the kernel asks again for what failed, page by page, and that must not be another deadline.
        assert log.count("block 16 did not come within 1 s") == 1


def test_who_is_killed_does_not_wait_for_a_dead_origin(tmp_path: Path, blobs: stack.BlobServer) -> None:
    """The kernel waits for EROFS's reads of its own metadata (here the superblock) until they are answered:
    nothing but our answer lets a killed process go. A signal that does not kill changes nothing."""
    layer = stack.make_layer(stack.random_image(2 << 20, 8), _BLOCK)
    (tmp_path / "target").mkdir()
    mount = (
        "import signal, sys; from imagefs import syscalls; signal.signal(signal.SIGUSR1, lambda *_: None); "
    )
    mount += "syscalls.mount(sys.argv[1], sys.argv[2], 'erofs', 1)"
    with stack.running(stack.settings(tmp_path, read_deadline_seconds=300.0)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        blobs.open.clear()
        process = subprocess.Popen([sys.executable, "-c", mount, device, tmp_path / "target"])
        assert blobs.arrived.acquire(timeout=30)
        process.send_signal(signal.SIGUSR1)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
        blobs.open.set()
        assert Reader(device).outcome() == stack.digest(layer.image)


def test_wrong_bytes_are_never_served(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = stack.make_layer(stack.random_image(2 << 20, 5), _BLOCK)
    spec = blobs.add(layer)
    blob = bytearray(layer.blob)
    blob[layer.block_map.blocks[20].offset + 100] ^= 1
    blobs.blobs[spec.blob_digest] = bytes(blob)
    values = stack.settings(tmp_path, read_deadline_seconds=2.0)
    with stack.running(values) as client:
        (device,) = client.attach("owner", [spec], stack.OPTIONS)
        assert Reader(device, 20 * _BLOCK, _BLOCK).outcome() == "EIO"
        whole = layer.image[:_BLOCK]
        assert Reader(device, 0, _BLOCK).outcome() == stack.digest(whole)


def test_a_full_cache_disk_does_not_stop_reads(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = stack.make_layer(stack.random_image(24 << 20, 6), 1 << 20)
    values = stack.settings(tmp_path)
    values.cache_dir.mkdir()
    syscalls.mount("tmpfs", values.cache_dir, "tmpfs", 0, "size=3m")
    try:
        with stack.running(values) as client:
            (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
            assert Reader(device).outcome() == stack.digest(layer.image)
            stack.drop_cached_pages(device)
            assert Reader(device).outcome() == stack.digest(layer.image)
    finally:
        syscalls.umount(values.cache_dir, syscalls.MNT_DETACH)  # workers may be on their way out


def test_a_small_quota_evicts_under_a_reader(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = stack.make_layer(stack.random_image(24 << 20, 7), 1 << 20)
    with stack.running(stack.settings(tmp_path, cache_quota_bytes=4 << 20)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        for _ in range(2):
            assert Reader(device).outcome() == stack.digest(layer.image)
            stack.drop_cached_pages(device)


def test_a_worker_that_stops_answering_is_replaced_without_a_lost_read(
    tmp_path: Path, blobs: stack.BlobServer
) -> None:
    """A request that a stopped process took is not lost: when it is killed, a successor gets it."""
    layer = stack.make_layer(stack.random_image(2 << 20, 8), _BLOCK)
    with stack.running(stack.settings(tmp_path, workers=1)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        blobs.open.clear()
        reader = Reader(device)
        assert blobs.arrived.acquire(timeout=30)
        (worker,) = client.status()["processes"]["workers"]
        os.kill(worker, signal.SIGSTOP)
        blobs.open.set()
        os.kill(worker, signal.SIGKILL)
        assert reader.outcome() == stack.digest(layer.image)
        eventually(lambda: client.status()["processes"]["workers"] != [worker], "a successor")
