"""Read-ahead after a start: real EROFS mounts, whose values the kernel is asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs import errors, kernelreadahead, mount
from imagefs.fuse.startreadahead import START_SECONDS, StartReadAhead
from imagefs.mount import Mode
from tests.fixtures import layer_image
from tests.imagefs.fuse import packing, stack
from tests.imagefs.fuse.stack import eventually

_START_KIB = 32


class Starts:
    """Two mounts, and the object under test, whose clock and packs are ours."""

    def __init__(self, folder: Path, points: list[Path]) -> None:
        self.folder = folder
        self.names = [kernelreadahead.backing_device(point) for point in points]
        self.now = 100.0
        self.quiet = {"packed": 0.0, "plain": float("inf")}
        self.open = self.renew()

    def renew(self, token: str = "mount 1", devices: Path | None = None) -> StartReadAhead:
        path = self.folder / "starts.json"
        return StartReadAhead(path, token, devices or self.folder, self.quiet.__getitem__, lambda: self.now)

    def found(self) -> list[int]:
        return [kernelreadahead.get(name) for name in self.names]


@pytest.fixture(params=[Mode.EROFS, Mode.LOOP])
def starts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Starts]:
    files = []
    for number in range(2):
        (tmp_path / f"tree-{number}").mkdir()
        (tmp_path / f"tree-{number}/file").write_bytes(bytes([number + 1]) * 9000)
        files.append(tmp_path / f"{number}.erofs")
        subprocess.run(
            ["mkfs.erofs", files[-1], tmp_path / f"tree-{number}"], check=True, capture_output=True
        )
    folder = tmp_path / "mounts"
    folder.mkdir()
    devices = [(file.name, file) for file in files]
    _, points = mount.mount_layers(request.param, devices, folder, _START_KIB)
    made = Starts(tmp_path, points)
    try:
        yield made
    finally:
        made.open.close()
        mount.unmount_all(points)


@pytest.mark.root
def test_the_kernel_says_which_mount_is_whose(starts: Starts) -> None:
    assert starts.found() == [_START_KIB, _START_KIB]
    kernelreadahead.set_kib(starts.names[1], 64)
    assert starts.found() == [_START_KIB, 64]
    assert len(set(starts.names)) == 2
    assert all(kernelreadahead.is_name(name) for name in starts.names)


@pytest.mark.root
def test_raised_when_the_start_is_over(starts: Starts) -> None:
    packed, plain = starts.names
    starts.open.started("packed", [packed])
    starts.open.started("plain", [plain])
    starts.now += START_SECONDS - 1
    starts.open.look()
    assert starts.found() == [_START_KIB, _START_KIB]
    assert starts.open.owners() == ["packed", "plain"]
    starts.now += 1
    starts.open.look()
    assert starts.found() == [_START_KIB, kernelreadahead.READ_AHEAD_KIB]
    starts.now += 1000
    starts.quiet["packed"] = START_SECONDS - 1
    starts.open.look()
    assert starts.open.owners() == ["packed"]
    starts.quiet["packed"] = START_SECONDS
    starts.open.look()
    assert starts.found() == [kernelreadahead.READ_AHEAD_KIB] * 2
    assert starts.open.owners() == []


@pytest.mark.root
def test_a_successor_goes_on_and_nobody_else(starts: Starts) -> None:
    starts.open.started("plain", starts.names)
    starts.open.close()
    assert starts.renew("mount 2").owners() == []
    successor = starts.renew()
    assert successor.owners() == ["plain"]
    starts.now += START_SECONDS
    successor.look()
    assert starts.found() == [kernelreadahead.READ_AHEAD_KIB] * 2
    successor.close()
    assert starts.renew().owners() == []


@pytest.mark.root
def test_what_is_gone_is_left_alone(starts: Starts) -> None:
    starts.open.started("plain", [*starts.names[:1], "erofs-99999999999", "999:99999"])
    starts.open.started("packed", starts.names[1:])
    starts.open.forget("packed")
    starts.now += START_SECONDS
    starts.open.look()
    assert starts.open.owners() == []
    assert starts.found() == [kernelreadahead.READ_AHEAD_KIB, _START_KIB]


@pytest.mark.root
@pytest.mark.parametrize("starts", [Mode.LOOP], indirect=True)
def test_a_loop_device_that_has_become_somebody_elses(starts: Starts) -> None:
    other = starts.renew(devices=starts.folder / "elsewhere")
    other.started("plain", starts.names)
    starts.now += START_SECONDS
    other.look()
    assert other.owners() == []
    assert starts.found() == [_START_KIB] * 2
    other.close()


@pytest.mark.parametrize("name", ["../../../etc/passwd", "erofs-", "erofs-1/x", "7:", "sda", "erofs-1\n", ""])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    starts = StartReadAhead(tmp_path / "starts.json", "t", tmp_path, lambda _: 0.0)
    with pytest.raises(errors.InvalidInputError, match="backing devices"):
        starts.started("owner", [name])
    starts.close()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"token": "t"}', b'{"token": "t", "mounts": []}', b"\xff",
                json.dumps({"token": "t", "mounts": {"../x": "owner"}}).encode()]
)  # fmt: skip
def test_a_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "starts.json").write_bytes(content)
    starts = StartReadAhead(tmp_path / "starts.json", "t", tmp_path, lambda _: 0.0)
    assert starts.owners() == []
    starts.close()


@pytest.mark.root
def test_the_server_raises_it_once_the_pack_is_of_no_more_use(
    tmp_path: Path, blobs: stack.BlobServer
) -> None:
    """Not while it is recorded, nor while the pack comes; by a successor of the server, too."""
    layer = _layer()
    pages = len(layer.image) // 4096
    pack = packing.make([layer], [(0, 0, pages // 2)])
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS, packing.add(blobs, pack))
        folder = tmp_path / "mounts"
        folder.mkdir()
        _, points = mount.mount_layers(Mode.EROFS, [("layer", device)], folder, _START_KIB)
        try:
            name = kernelreadahead.backing_device(points[0])
            client.start_recording("owner")
            client.started("owner", [name])
            os.kill(client.status()["processes"]["server"], signal.SIGKILL)
            client.start_recording("owner")
            assert client.status()["starting"] == ["owner"]
            assert kernelreadahead.get(name) == _START_KIB
            client.stop_recording("owner")
            eventually(lambda: client.status()["starting"] == [], "the start is over")
            assert kernelreadahead.get(name) == kernelreadahead.READ_AHEAD_KIB
            client.started("nobody", [name])  # what is wrong with it is nobody's error
        finally:
            mount.unmount_all(points)


def _layer() -> stack.Layer:
    """Of our writer's making: with a boot pack, nothing else is shown to the kernel."""
    node = layer_image.file()
    image = layer_image.build(layer_image.directory({b"file": node}), {node: os.urandom(1 << 20)})
    return stack.make_layer(image, 65536)
