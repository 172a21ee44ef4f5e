"""Images whose layers are whole on this machine: mounted from files of the cache, not through a server."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest

from glowplug import mounting
from imagefs import assembly, image, mount, mounts, reference, trace
from imagefs.fuse import control
from imagefs.origin import connect
from tests.fixtures import block_images, images
from tests.fixtures.block_images import Command
from tests.glowplug.test_run import shell_layer
from tests.imagefs.fuse import stack

pytestmark = pytest.mark.root

DATA = bytes(range(256)) * 8192
BASE = images.tar_of([("etc", None), ("etc/motd", b"base\n"), ("data", DATA)])
TOP = images.tar_of([("etc", None), ("etc/motd", b"top\n"), ("etc/.wh.gone", b"")])


@pytest.fixture
def ref(glowplug: Command, tmp_path: Path) -> str:
    """An image that was read from end to end, and has layer files since, as the device server writes them."""
    found = block_images.make(tmp_path / "image", [shell_layer(), BASE, TOP])
    first = tmp_path / "first"
    first.mkdir()
    glowplug("mount", found, first)
    client = control.DeviceClient.connect(glowplug.state_dir)
    assert client is not None
    for device in client.status()["devices"]:
        (glowplug.state_dir / "devices" / device["name"]).read_bytes()
    glowplug("umount", first)
    for layer in image.open_image(reference.parse(found)).layers:
        stack.write_layer_file(glowplug.cache_dir, layer.map_digest, layer.block_map)
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def test_it_is_said_and_the_bytes_are_the_same(glowplug: Command, ref: str, directory: Path) -> None:
    said = glowplug("mount", ref, directory)
    assert "3 of 3 layers are whole, in files of the block cache" in said.stderr
    assert (directory / "etc/motd").read_bytes() == b"top\n"
    assert (directory / "data").read_bytes() == DATA
    glowplug("umount", directory)
    assert glowplug.left() == []


@pytest.mark.parametrize("mode", ["loop", "fuse"])
def test_the_other_ways_to_mount_read_them_too(
    glowplug: Command, ref: str, directory: Path, mode: str
) -> None:
    glowplug("mount", ref, directory, "--mode", mode)
    assert (directory / "data").read_bytes() == DATA
    glowplug("umount", directory)
    assert glowplug.left() == []


def test_a_process_in_one_outlives_every_process_of_ours(
    glowplug: Command, ref: str, directory: Path
) -> None:
    glowplug("mount", ref, directory)
    client = control.DeviceClient.connect(glowplug.state_dir)
    assert client is not None
    processes = client.status()["processes"]
    keeper = stack.keeper_pid(glowplug.state_dir)
    for pid in [keeper, processes["server"], *processes["workers"]]:
        os.kill(pid, signal.SIGKILL)
    assert (directory / "data").read_bytes() == DATA
    assert (directory / "etc/motd").read_bytes() == b"top\n"
    glowplug("umount", directory)
    mount.unmount_all([glowplug.state_dir / "devices"])  # as the next server does


def test_run_starts_from_them(glowplug: Command, ref: str) -> None:
    said = glowplug("run", ref, "--", "/bin/sh", "-c", "read line < /etc/motd; echo $line; echo > /etc/new")
    assert said.stdout == "top\n"
    assert glowplug.left() == []


def test_status_and_the_cache_say_which_layers_are_whole(
    glowplug: Command, ref: str, directory: Path
) -> None:
    glowplug("mount", ref, directory)
    assert glowplug("status").stdout.count(", whole in a file") == 3
    listed = json.loads(glowplug("cache", "ls", "--json").stdout)
    sizes = [path.stat().st_blocks * 512 for path in (glowplug.cache_dir / "layers").iterdir()]
    assert (listed["layer_files"], listed["layer_files_bytes"]) == (3, sum(sizes))
    assert listed["used_bytes"] > sum(sizes)
    assert "in 3 whole layers" in glowplug("cache", "ls").stdout
    glowplug("umount", directory)


def test_files_that_were_evicted_are_no_error(glowplug: Command, ref: str, directory: Path) -> None:
    for path in (glowplug.cache_dir / "layers").iterdir():
        path.resolve().unlink()
    said = glowplug("mount", ref, directory)
    assert "layers are whole" not in said.stderr
    assert (directory / "data").read_bytes() == DATA
    glowplug("umount", directory)


def test_a_damaged_file_is_found_by_cache_verify(glowplug: Command, ref: str, directory: Path) -> None:
    links = list((glowplug.cache_dir / "layers").iterdir())
    largest = max(links, key=lambda link: link.stat().st_size)
    with largest.resolve().open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"wrong")
    said = glowplug("cache", "verify", "--json", code=1)
    assert json.loads(said.stdout)["damaged"] == [largest.readlink().name]
    said = glowplug("mount", ref, directory)
    assert "2 of 3 layers are whole" in said.stderr
    assert hashlib.sha256((directory / "data").read_bytes()).digest() == hashlib.sha256(DATA).digest()
    glowplug("umount", directory)


def test_a_trace_sees_what_is_read_though_files_could_be_mounted(
    glowplug: Command, ref: str, tmp_path: Path
) -> None:
    file = tmp_path / "trace"
    glowplug("trace", "--output", file, ref, "--", "/bin/sh", "-c", "read line < /etc/motd; : < /data")
    assert trace.decode(file.read_bytes()).reads


def test_a_file_that_goes_between_the_question_and_the_mount(
    glowplug: Command, ref: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache may need the room at any moment: the devices do as well."""
    asked = []

    def named(self: control.DeviceClient, owner: str | None = None) -> dict[str, Path]:
        asked.append(owner)
        layers = image.open_image(reference.parse(ref)).layers
        return {layer.map_digest: tmp_path / "gone" for layer in layers}

    glowplug("mount", ref, directory)  # it starts the server, with the test's settings
    client = control.DeviceClient.connect(glowplug.state_dir)
    assert client is not None
    opened = image.open_image(reference.parse(ref))
    origins = connect.Options()
    record = mounts.Record("test", "", ref, "", False, None, None)
    monkeypatch.setattr(control.DeviceClient, "layer_files", named)
    folder, target = tmp_path / "behind", tmp_path / "target"
    for each in (folder, target):
        each.mkdir()
    devices = client.attach(record.id, assembly.layer_specs(opened), origins)
    try:
        mounting._assemble(opened, devices, folder, target, assembly.Options(), record, client)
        assert asked == [record.id]
        assert (target / "data").read_bytes() == DATA
    finally:
        mount.unmount_all([target])
        client.detach(record.id)
    glowplug("umount", directory)
    assert glowplug.left() == []
