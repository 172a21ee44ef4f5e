"""Mount points of layers: what is alive, whose it is, and what a container's overlay makes of it."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
from pathlib import Path

import pytest

from agent import daemon
from agent.images import FILES_SECONDS, owner_of
from agent.mounts import LayerMounts
from agent.reconcile import attached
from agent.rows import ImageRow
from imagefs import blockmap, cachedirectory, holders, kernelreadahead, syscalls
from imagefs.fuse.control import DeviceClient
from tests.agent.lazy_node import BASE, LazyNode
from tests.agent.lazy_node import node as node
from tests.fixtures import images, tars
from tests.imagefs.fuse import stack
from tests.imagefs.scripted import eventually

pytestmark = pytest.mark.root


def test_a_successor_finds_what_is_mounted_and_mounts_nothing_anew(node: LazyNode) -> None:
    row = node.images.pull(node.push([BASE]).name)
    path = node.images.directory(row.block_digest, 0)
    before = path.stat().st_dev
    successor = LayerMounts(node.settings.root / "layers", node.settings.state)
    assert successor.open()
    assert successor.mounted() == node.mounts.mounted()
    number = row.layers[0].mount_number
    (device,) = node.images.attach(row.block_digest)
    assert successor.ensure(number, "layer", device) == path
    assert path.stat().st_dev == before
    assert len(node.mounted()) == 1


def test_mounts_on_a_device_server_that_is_gone_are_replaced(node: LazyNode) -> None:
    row = node.images.pull(node.push([BASE]).name)
    path = node.images.directory(row.block_digest, 0)
    assert node.mounts.renew()
    node.devices.stop()
    DeviceClient.ensure(daemon.server_settings(node.settings, node.origins))
    assert path.is_dir(), "a dead mount looks like one that lives"
    assert not node.mounts.renew()
    assert not node.mounted()
    assert node.mounts.renew()
    node.images.reconcile(attached(node.devices))
    assert (node.images.directory(row.block_digest, 0) / "etc/motd").read_text() == "base\n"


def test_another_layers_mount_at_the_number_gives_way(node: LazyNode) -> None:
    rows = [node.images.pull(node.push([tar]).name) for tar in (BASE, images.tar_of([("other", b"o")]))]
    devices = [node.images.attach(row.block_digest)[0] for row in rows]
    assert (node.mounts.ensure(7, "one", devices[0]) / "etc").exists()
    assert (node.mounts.ensure(7, "other", devices[1]) / "other").exists()
    assert len(node.mounted()) == 1
    node.mounts.unmount(7, devices[0].name)
    assert len(node.mounted()) == 1, "it is not that layer's any more"
    node.mounts.unmount(7, devices[1].name)
    assert not node.mounted()


def test_a_kernel_that_wants_block_devices_gets_loop(node: LazyNode, monkeypatch: pytest.MonkeyPatch) -> None:
    real = syscalls.mount

    def fake(source: object, target: object, filesystem: str | None, flags: int, options: str = "") -> None:
        if filesystem == "erofs" and not str(source).startswith("/dev/loop"):
            raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK), str(target))
        real(str(source), str(target), filesystem, flags, options)

    monkeypatch.setattr(syscalls, "mount", fake)
    row = node.images.pull(node.push([BASE]).name)
    path = node.images.directory(row.block_digest, 0)
    assert (path / "etc/motd").read_text() == "base\n"
    successor = LayerMounts(node.settings.root / "layers", node.settings.state)
    assert successor.open()
    assert successor.mounted() == node.mounts.mounted()


def overlay(lower: Path, folder: Path) -> Path:
    """What a container sees of a layer; its caller unmounts it."""
    for name in ("empty", "merged"):
        (folder / name).mkdir()
    syscalls.mount("test", folder / "merged", "overlay", 0, f"lowerdir={lower}:{folder / 'empty'}")
    return folder / "merged"


def test_setuid_counts_in_the_overlay_and_not_in_the_layer(node: LazyNode, tmp_path: Path) -> None:
    """A container may need setuid programs and capabilities: its own mount's flags decide, as everywhere."""
    layer = tars.Builder().directory(b"./")
    layer.file(b"id", Path("/usr/bin/id").read_bytes(), tars.Attributes(mode=0o4755))
    row = node.images.pull(node.push([bytes(layer)]).name)
    lower = node.images.directory(row.block_digest, 0)
    merged = overlay(lower, tmp_path)
    try:
        through = [_effective_uid_of_nobody(where) for where in (merged, lower)]
    finally:
        subprocess.run(["umount", merged], check=True)
    assert through == ["0", "65534"], "nobody on the host runs a stranger's setuid program"


def _effective_uid_of_nobody(directory: Path) -> str:
    # By descriptor: nobody may not enter the folders above.
    fd = os.open(directory, os.O_PATH)
    try:
        command = ["setpriv", "--reuid", "65534", "--clear-groups", f"/proc/self/fd/{fd}/id", "-u"]
        result = subprocess.run(command, capture_output=True, text=True, pass_fds=[fd], check=True)
        return result.stdout.strip()
    finally:
        os.close(fd)


# -- layers that have files of their own -----------------------------------------------------------------


def write_files(node: LazyNode, row: ImageRow) -> None:
    """The files of an image's layers, as the device server writes them when all blocks are here."""
    devices = node.images.attach(row.block_digest)
    for layer, device in zip(row.layers, devices, strict=True):
        device.read_bytes()
        data = node.images._maps.read(layer.map_digest)
        assert data is not None
        stack.write_layer_file(node.settings.cache.directory, layer.map_digest, blockmap.decode(data))


def note_files(node: LazyNode) -> None:
    """As the agent's upkeep does, half a minute after it did last."""
    node.clock.now += FILES_SECONDS
    node.images.note_files()


def sources(node: LazyNode) -> list[str]:
    """Of the mounts of layers, in mount order."""
    root = str(node.settings.root / "layers")
    return [point.source for point in holders.mount_points() if point.directory.startswith(root)]


def test_a_layer_with_a_file_is_mounted_from_there(node: LazyNode) -> None:
    row = node.images.pull(node.push([BASE]).name)
    write_files(node, row)
    path = node.images.directory(row.block_digest, 0)
    (source,) = sources(node)
    assert Path(source).resolve().is_relative_to(node.settings.cache.directory)
    assert (path / "etc/motd").read_text() == "base\n"
    number, device = row.layers[0].mount_number, row.device(row.layers[0])
    assert node.mounts.read_ahead_kib(number) == kernelreadahead.READ_AHEAD_KIB
    successor = LayerMounts(node.settings.root / "layers", node.settings.state)
    assert successor.open()
    assert successor.find(number, device, in_file=True) == path
    successor.unmount(number, device)
    assert not node.mounted()
    assert not list((node.settings.root / "layers/.files").iterdir())


def test_a_file_that_comes_later_is_mounted_over_the_device_and_no_container_notices(
    node: LazyNode, tmp_path: Path
) -> None:
    row = node.images.pull(node.push([BASE]).name)
    lower = node.images.directory(row.block_digest, 0)
    merged = overlay(lower, tmp_path)
    try:
        with (merged / "etc/motd").open() as earlier:
            write_files(node, row)
            assert node.images.directory(row.block_digest, 0) == lower
            assert len(sources(node)) == 1, "nobody has asked yet whether there are files"
            note_files(node)
            assert node.images.directory(row.block_digest, 0) == lower
            assert len(sources(node)) == 2
            assert node.images.directory(row.block_digest, 0) == lower
            assert len(sources(node)) == 2
            assert earlier.read() == (lower / "etc/motd").read_text() == "base\n"
            assert (merged / "data").read_bytes() == b"d" * 200_000
    finally:
        syscalls.umount(merged, syscalls.MNT_DETACH)
    node.mounts.unmount(row.layers[0].mount_number)
    assert not node.mounted()


def test_a_file_that_went_meanwhile_leaves_the_device(node: LazyNode) -> None:
    row = node.images.pull(node.push([BASE]).name)
    write_files(node, row)
    note_files(node)
    for path in (node.settings.cache.directory / "layers").iterdir():
        path.resolve().unlink()
    path = node.images.directory(row.block_digest, 0)
    (source,) = sources(node)
    assert Path(source) == node.images.attach(row.block_digest)[0]
    assert (path / "etc/motd").read_text() == "base\n"


def test_files_survive_a_boot_once_they_were_hashed(node: LazyNode) -> None:
    row = node.images.pull(node.push([BASE]).name)
    write_files(node, row)
    (path,) = (node.settings.cache.directory / "layers").iterdir()
    os.removexattr(path, cachedirectory.BOOT_ATTRIBUTE)
    node.reboot()
    node.images.directory(row.block_digest, 0)
    (source,) = sources(node)
    assert Path(source) == node.images.attach(row.block_digest)[0], "not before it was hashed"
    eventually(lambda: bool(node.devices.layer_files(owner_of(row.block_digest))))
    note_files(node)
    node.images.directory(row.block_digest, 0)
    assert Path(sources(node)[-1]).resolve() == path.resolve()


def test_where_files_are_not_wanted_there_are_none(node: LazyNode) -> None:
    node.settings = dataclasses.replace(
        node.settings, cache=dataclasses.replace(node.settings.cache, layer_files=False)
    )
    row = node.images.pull(node.push([BASE]).name)
    write_files(node, row)
    node.reboot()
    node.images.directory(row.block_digest, 0)
    (source,) = sources(node)
    assert Path(source) == node.images.attach(row.block_digest)[0]
