"""`glowplug status`, with and without a server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imagefs.fuse import stack


def _status(state_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    code = "from glowplug import cli; cli.main()"
    command = [sys.executable, "-c", code, "status", "--state", str(state_dir), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_without_a_server(tmp_path: Path) -> None:
    result = _status(tmp_path)
    assert result.returncode == 4
    assert result.stdout == ""
    assert "nothing is mounted" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_with_devices(tmp_path: Path) -> None:
    blobs = stack.BlobServer()
    layer = stack.make_layer(stack.random_image(1 << 20, 1))
    values = stack.settings(tmp_path)
    try:
        with stack.running(values) as client:
            (device,) = client.attach("a mount", [blobs.add(layer)], stack.OPTIONS)
            assert device.read_bytes() == layer.image
            document = json.loads(_status(values.state_dir, "--json").stdout)["server"]
            assert [found["map_digest"] for found in document["devices"]] == [layer.map_digest]
            assert document["fetch"]["fetched_blocks"] == 16
            text = _status(values.state_dir).stdout
            assert "1 MiB" in text
            assert blobs.ref() in text
            assert "for a mount" in text
    finally:
        blobs.close()


@pytest.mark.root
def test_a_disk_without_room_is_said_to_be_why_nothing_is_kept(tmp_path: Path) -> None:
    blobs = stack.BlobServer()
    layer = stack.make_layer(stack.random_image(1 << 17, 1))
    values = stack.settings(tmp_path, free_floor_bytes=1 << 60)
    try:
        with stack.running(values) as client:
            (device,) = client.attach("a mount", [blobs.add(layer)], stack.OPTIONS)
            assert "from memory" not in _status(values.state_dir).stdout
            assert device.read_bytes() == layer.image
            said = _status(values.state_dir).stdout
            assert (
                "2 blocks, 128 KiB, were served from memory: the disk is full, or less of it is free" in said
            )
    finally:
        blobs.close()
