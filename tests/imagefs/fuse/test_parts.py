"""Frames of blocks through the kernel: a read is answered while the rest of its block is still on its way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs import blockmap, syscalls
from tests.imagefs.fuse import stack
from tests.imagefs.fuse.stack import Reader, eventually

pytestmark = pytest.mark.root

_BLOCK, _FRAME = 1 << 20, 64 << 10
_PAGE = 4096
LAYER = stack.make_layer(stack.random_image(3 << 20, 11), _BLOCK, _FRAME)


def place(block: int, frame: int) -> int:
    """Where in the blob a frame begins."""
    entry = LAYER.block_map.blocks[block]
    return entry.offset + sum(each.compressed_bytes for each in entry.frames[:frame])


def page(block: int, frame: int) -> str:
    """The outcome of reading a frame's first page."""
    start = block * _BLOCK + frame * _FRAME
    return stack.digest(LAYER.image[start : start + _PAGE])


class Held:
    """An origin whose answers stop where the test says, until it lets go."""

    def __init__(self, blobs: stack.BlobServer) -> None:
        self.stop = 0
        blobs.sent_until = lambda end: min(end, self.stop)

    def until(self, stop: int) -> None:
        self.stop = stop

    def let_go(self) -> None:
        self.stop = 1 << 60


@pytest.fixture
def held(blobs: stack.BlobServer) -> Iterator[Held]:
    """Before anything is read."""
    made = Held(blobs)
    yield made
    made.let_go()


def read(device: Path, block: int, frame: int) -> Reader:
    """A reader of one page, without the kernel's read-ahead."""
    return Reader(device, block * _BLOCK + frame * _FRAME, _PAGE, direct=True)


def test_a_read_is_answered_before_the_rest_of_its_block_was_sent(
    tmp_path: Path, blobs: stack.BlobServer, held: Held
) -> None:
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(LAYER)], stack.OPTIONS)
        held.until(place(1, 6))
        assert read(device, 1, 5).outcome() == page(1, 5)
        later, earlier = read(device, 1, 9), read(device, 1, 2)
        held.until(place(1, 10))
        assert later.outcome() == page(1, 9)
        assert earlier.running(), "what lies before the first frame comes last"
        assert client.status()["fetch"]["fetched_blocks"] == 0
        held.let_go()
        assert earlier.outcome() == page(1, 2)
        eventually(lambda: _fetch(client)["fetched_blocks"] == 1, "the block fills")
        name = LAYER.block_map.blocks[1].digest.hex()
        eventually((tmp_path / "cache/blocks" / name[:2] / name).exists, "it has its name in the cache")
        assert Reader(device).outcome() == stack.digest(LAYER.image)


def _fetch(client: stack.Client) -> dict[str, int]:
    found: dict[str, int] = client.status()["fetch"]
    return found


@pytest.mark.parametrize("who", ["worker", "server", "both"])
def test_a_kill_in_the_middle_of_a_block(
    tmp_path: Path, blobs: stack.BlobServer, held: Held, who: str
) -> None:
    with stack.running(stack.settings(tmp_path, workers=1)) as client:
        (device,) = client.attach("owner", [blobs.add(LAYER)], stack.OPTIONS)
        held.until(place(0, 3))
        assert read(device, 0, 2).outcome() == page(0, 2)
        waiting = read(device, 0, 8)
        eventually(waiting.waits_for_server, "it waits in the kernel")
        processes = client.status()["processes"]
        for name, pids in (("worker", processes["workers"]), ("server", [processes["server"]])):
            if who in (name, "both"):
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
        again = read(device, 0, 2)
        held.let_go()
        assert waiting.outcome() == page(0, 8)
        assert again.outcome() == page(0, 2)
        assert Reader(device).outcome() == stack.digest(LAYER.image)


def test_hand_over_in_the_middle_of_a_block(tmp_path: Path, blobs: stack.BlobServer, held: Held) -> None:
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(LAYER)], stack.OPTIONS)
        held.until(place(0, 3))
        assert read(device, 0, 2).outcome() == page(0, 2)
        waiting = read(device, 0, 8)
        eventually(waiting.waits_for_server, "it waits in the kernel")
        client.hand_over()
        held.let_go()
        assert waiting.outcome() == page(0, 8)
        assert Reader(device).outcome() == stack.digest(LAYER.image)


def test_a_detached_image_and_a_killed_reader_do_not_wait_for_the_rest(
    tmp_path: Path, blobs: stack.BlobServer, held: Held
) -> None:
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(LAYER)], stack.OPTIONS)
        held.until(place(0, 3))
        assert read(device, 0, 2).outcome() == page(0, 2)
        killed, waiting = read(device, 0, 8), read(device, 0, 9)
        eventually(
            lambda: killed.waits_for_server() and waiting.waits_for_server(), "they wait in the kernel"
        )
        killed.kill()
        client.detach("owner")
        assert waiting.outcome() == "EIO"


@pytest.mark.parametrize("wrong", ["block", "frame"])
def test_a_map_whose_digests_disagree(
    tmp_path: Path, blobs: stack.BlobServer, held: Held, wrong: str
) -> None:
    """Frames are served by their own digests, but no block gets a name in the cache that is not its own."""
    forged = _forged(wrong)
    with stack.running(stack.settings(tmp_path, read_deadline_seconds=5.0)) as client:
        (device,) = client.attach("owner", [blobs.add(forged)], stack.OPTIONS)
        held.let_go()
        assert read(device, 0, 2).outcome() == page(0, 2)
        assert read(device, 1, 0).outcome() == page(1, 0)
        if wrong == "frame":
            eventually(lambda: _fetch(client)["fetched_blocks"] >= 2, "the rest agrees")
        else:
            eventually(lambda: _fetch(client)["corrupt_blocks"] > 0, "the block is refused")
            names = {path.name for path in (tmp_path / "cache/blocks").rglob("*") if path.is_file()}
            assert LAYER.block_map.blocks[0].digest.hex() not in names
            assert bytes(32).hex() not in names


def _forged(wrong: str) -> stack.Layer:
    """As LAYER, with another digest of block 0, or of its frame 9."""
    first, *others = LAYER.block_map.blocks
    if wrong == "block":
        forged = blockmap.Block(bytes(32), first.offset, first.compressed_bytes, frames=first.frames)
    else:
        frames = list(first.frames)
        frames[9] = blockmap.Frame(bytes(32), frames[9].compressed_bytes)
        forged = blockmap.Block(first.digest, first.offset, first.compressed_bytes, frames=tuple(frames))
    return stack.with_blocks(LAYER, (forged, *others))


def test_a_full_disk_makes_readers_wait_for_the_whole_block(
    tmp_path: Path, blobs: stack.BlobServer, held: Held
) -> None:
    values = stack.settings(tmp_path)
    values.cache_dir.mkdir()
    syscalls.mount("tmpfs", values.cache_dir, "tmpfs", 0, "size=512k")
    try:
        with stack.running(values) as client:
            (device,) = client.attach("owner", [blobs.add(LAYER)], stack.OPTIONS)
            held.until(place(0, 3))
            waiting = read(device, 0, 2)
            eventually(waiting.waits_for_server, "it waits in the kernel")
            held.let_go()
            assert waiting.outcome() == page(0, 2)
            assert Reader(device).outcome() == stack.digest(LAYER.image)
    finally:
        syscalls.umount(values.cache_dir, syscalls.MNT_DETACH)  # workers may be on their way out


def test_a_stream_that_breaks_leaves_readers_what_they_had(
    tmp_path: Path, blobs: stack.BlobServer, held: Held
) -> None:
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(LAYER)], stack.OPTIONS)
        held.until(place(0, 3))
        assert read(device, 0, 2).outcome() == page(0, 2)
        requests = blobs.requests
        blobs.cut_all()
        eventually(lambda: blobs.requests > requests, "the server goes on from there")
        assert read(device, 0, 2).outcome() == page(0, 2), "the worker holds that frame"
        held.let_go()
        assert read(device, 0, 8).outcome() == page(0, 8)
        assert Reader(device).outcome() == stack.digest(LAYER.image)
