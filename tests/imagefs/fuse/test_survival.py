"""Processes that are killed in the middle of reads: readers see a pause, right bytes, and no error."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from imagefs.fuse import control, statedirectory
from tests.imagefs.fuse import stack
from tests.imagefs.fuse.stack import Reader, eventually

pytestmark = pytest.mark.root

_BLOCK = 65536


def _processes(client: stack.Client) -> dict[str, list[int]]:
    found = client.status()["processes"]
    return {"server": [found["server"]], "workers": found["workers"]}


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # workers end by themselves once their server is gone
            os.kill(pid, signal.SIGKILL)


def _one_worker(client: stack.Client) -> None:
    _kill(_processes(client)["workers"][:1])


def _all_workers(client: stack.Client) -> None:
    _kill(_processes(client)["workers"])


def _server(client: stack.Client) -> None:
    _kill(_processes(client)["server"])


def _workers_then_server(client: stack.Client) -> None:
    found = _processes(client)
    _kill(found["workers"] + found["server"])


def _server_then_workers(client: stack.Client) -> None:
    found = _processes(client)
    _kill(found["server"] + found["workers"])


@pytest.mark.parametrize(
    "kill", [_one_worker, _all_workers, _server, _workers_then_server, _server_then_workers]
)
def test_readers_outlive(
    tmp_path: Path, blobs: stack.BlobServer, kill: Callable[[stack.Client], None]
) -> None:
    layer = stack.make_layer(stack.random_image(12 << 20, 1), _BLOCK)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        blobs.open.clear()
        readers = [Reader(device), Reader(device, 6 << 20), Reader(device, 12 << 20), Reader(device, 1 << 20)]
        for _ in range(3):  # reads hang in the kernel, in workers and at the origin
            assert blobs.arrived.acquire(timeout=30)
        before = _processes(client)
        kill(client)
        eventually(lambda: _processes(client) != before, "another process")
        assert readers[0].running()
        blobs.open.set()
        image = layer.image
        expected = [image, image[6 << 20 :], b"", image[1 << 20 :]]
        assert [reader.outcome() for reader in readers] == [stack.digest(data) for data in expected]
        # The old workers went by themselves.
        assert "are still there" not in _log(tmp_path)


def test_killed_again_and_again(tmp_path: Path, blobs: stack.BlobServer) -> None:
    """Readers go on while workers and servers die at whatever they are doing."""
    layer = stack.make_layer(stack.random_image(48 << 20, 2), _BLOCK)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        readers = [Reader(device, start << 20) for start in (0, 16, 32)]
        for kill in (_one_worker, _server, _all_workers, _server_then_workers):
            if readers[0].running():
                _kill_and_wait(client, kill)
        outcomes = [reader.outcome() for reader in readers]
        assert outcomes == [stack.digest(layer.image[start << 20 :]) for start in (0, 16, 32)]


def _log(directory: Path) -> str:
    return (directory / "state" / "server.log").read_text()


def _kill_and_wait(client: stack.Client, kill: Callable[[stack.Client], None]) -> None:
    before = _processes(client)
    kill(client)
    eventually(lambda: _processes(client) != before, "another process")


def test_a_keeper_that_is_killed_is_replaced(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = stack.make_layer(stack.random_image(4 << 20, 3), _BLOCK)
    values = stack.settings(tmp_path)
    with stack.running(values) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        old = stack.keeper_pid(values.state_dir)
        blobs.open.clear()
        reader = Reader(device)
        assert blobs.arrived.acquire(timeout=30)
        _kill([old])
        eventually(lambda: stack.keeper_pid(values.state_dir) not in (0, old), "another keeper")
        # The new one does what the old one was for, from its first moment.
        before = _processes(client)
        _server(client)
        eventually(lambda: _processes(client) != before, "another server")
        blobs.open.set()
        assert reader.outcome() == stack.digest(layer.image)


def test_a_keeper_that_is_killed_while_it_starts_is_replaced_too(
    tmp_path: Path, blobs: stack.BlobServer
) -> None:
    layer = stack.make_layer(stack.random_image(4 << 20, 3), _BLOCK)
    values = stack.settings(tmp_path)
    with stack.running(values) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        server = client.status()["processes"]["server"]
        _kill([stack.keeper_pid(values.state_dir)])
        eventually(lambda: _starting_keepers(values.state_dir), "the next keeper")
        _kill(_starting_keepers(values.state_dir))
        eventually(lambda: stack.keeper_pid(values.state_dir) != 0, "another keeper")
        assert Reader(device).outcome() == stack.digest(layer.image)
        assert client.status()["processes"]["server"] == server


def _starting_keepers(state_dir: Path) -> list[int]:
    """Keepers by their command lines, from their first moment on."""
    words = {b"imagefs.fuse.keeper", os.fsencode(state_dir), b"--adopt"}
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if words <= set((entry / "cmdline").read_bytes().split(b"\0")):
                found.append(int(entry.name))
    return found


def test_everything_killed_and_started_anew(tmp_path: Path, blobs: stack.BlobServer) -> None:
    """What a reboot or the death of all leaves: a dead mount, stale sockets, a table of dead devices."""
    layer = stack.make_layer(stack.random_image(1 << 20, 4), _BLOCK)
    spec, values = blobs.add(layer), stack.settings(tmp_path)
    client = control.DeviceClient.ensure(values)
    (device,) = client.attach("owner", [spec], stack.OPTIONS)
    fd = os.open(device, os.O_RDONLY)  # keeps the dead mount busy
    try:
        found = _processes(client)
        old = stack.keeper_pid(values.state_dir)
        os.kill(old, signal.SIGSTOP)  # else it would start another server
        _kill([*found["server"], *found["workers"], old])
        with pytest.raises(OSError, match=r"."):
            os.pread(fd, 4096, 0)
        assert statedirectory.mounted(statedirectory.device_directory(values.state_dir))
        assert (values.state_dir / "control.sock").exists()
        eventually(lambda: control.DeviceClient.connect(values.state_dir) is None, "all are gone")
        with stack.running(values) as again:
            assert len(statedirectory.mounted(statedirectory.device_directory(values.state_dir))) == 1
            assert again.status()["devices"] == []
            (device,) = again.attach("owner", [spec], stack.OPTIONS)
            assert device.read_bytes() == layer.image
    finally:
        os.close(fd)


def test_the_starter_may_die(tmp_path: Path) -> None:
    """The processes outlive the session of the command that started them."""
    values = stack.settings(tmp_path)
    code = (
        "import sys; from pathlib import Path; from imagefs.fuse import control;"
        "control.DeviceClient.ensure(control.decode_settings(sys.stdin.buffer.read()))"
    )
    started = subprocess.run(
        [sys.executable, "-c", code],
        input=control.encode_settings(values),
        start_new_session=True,
        capture_output=True,
        timeout=30,
    )
    assert started.returncode == 0, started.stderr
    client = control.DeviceClient.connect(values.state_dir)
    assert client is not None
    assert client.status()["processes"]["survives_kill"]
    client.stop()
