"""Whole devices through the kernel: bytes, names, owners, and what is refused."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import os
import random
import signal
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from imagefs import errors, syscalls
from imagefs.fuse import control, controlmessage, statedirectory
from tests.imagefs.fuse import stack
from tests.imagefs.fuse.stack import Reader

pytestmark = pytest.mark.root


@pytest.mark.parametrize(
    ("block_bytes", "size", "frame_bytes"),
    [
        (65536, 3 << 20, 65536),
        (65536, 4096, 65536),
        (1 << 20, (5 << 20) + 8192, 1 << 20),
        (1 << 20, (5 << 20) + 8192, 4096),
        (4 << 20, (17 << 20) + 4096, 4 << 20),
        (4 << 20, (17 << 20) + 4096, 256 << 10),
    ],
)
def test_a_device_has_the_bytes_of_the_image(
    tmp_path: Path, blobs: stack.BlobServer, block_bytes: int, size: int, frame_bytes: int
) -> None:
    image = stack.random_image(size, 1, zero_blocks=(1, 2), block_bytes=block_bytes)
    layer = stack.make_layer(image, block_bytes, frame_bytes)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        assert device.stat().st_size == size
        assert stat.S_IMODE(device.stat().st_mode) == 0o400
        assert hashlib.sha256(device.read_bytes()).hexdigest() == hashlib.sha256(image).hexdigest()
        fd = os.open(device, os.O_RDONLY)
        try:
            assert os.pread(fd, 100, size) == b""
            assert os.pread(fd, 100, size - 7) == image[-7:]
            pick = random.Random(2)
            for _ in range(50):
                offset, length = pick.randrange(size), pick.randrange(1, 200_000)
                assert os.pread(fd, length, offset) == image[offset : offset + length]
        finally:
            os.close(fd)
        with pytest.raises(OSError, match="Read-only"):
            device.open("wb")


def test_direct_reads_go_round_the_page_cache(tmp_path: Path, blobs: stack.BlobServer) -> None:
    image = stack.random_image(4 << 20, 3)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(stack.make_layer(image))], stack.OPTIONS)
        out = subprocess.run(
            ["dd", f"if={device}", "iflag=direct", "bs=3M", "status=none"], capture_output=True, check=True
        )
        assert out.stdout == image


def test_many_readers_at_once(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layers = [stack.make_layer(stack.random_image(6 << 20, seed), 1 << 20) for seed in range(3)]
    with stack.running(stack.settings(tmp_path)) as client:
        devices = client.attach("owner", [blobs.add(layer) for layer in layers], stack.OPTIONS)
        readers = [Reader(device) for device in devices for _ in range(3)]
        outcomes = [reader.outcome() for reader in readers]
        assert outcomes == [stack.digest(layer.image) for layer in layers for _ in range(3)]
        # One fetch per block, however many waited for it.
        assert client.status()["fetch"]["fetched_blocks"] == sum(len(x.block_map.blocks) for x in layers)


def test_the_kernel_mounts_an_erofs_image(tmp_path: Path, blobs: stack.BlobServer) -> None:
    source, mounted = tmp_path / "source", tmp_path / "mounted"
    (source / "deep").mkdir(parents=True)
    mounted.mkdir()
    content = {f"deep/{n}": random.Random(n).randbytes(n * 3001) for n in range(60)}
    for name, data in content.items():
        (source / name).write_bytes(data)
    subprocess.run(["mkfs.erofs", "-x-1", tmp_path / "image", source], check=True, capture_output=True)
    layer = stack.make_layer((tmp_path / "image").read_bytes(), 65536)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        syscalls.mount(device, mounted, "erofs", syscalls.MS_RDONLY)
        try:
            assert {name: (mounted / name).read_bytes() for name in content} == content
        finally:
            syscalls.umount(mounted)


def test_names_come_and_go_with_their_owners(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layers = [stack.make_layer(stack.random_image(4096 * (seed + 1), seed)) for seed in range(3)]
    specs = [blobs.add(layer) for layer in layers]
    values = stack.settings(tmp_path)
    with stack.running(values) as client:
        first = client.attach("a", specs[:2], stack.OPTIONS)
        client.attach("a", specs[:2], stack.OPTIONS)  # counts once
        second = client.attach("b", specs[1:], stack.OPTIONS)
        directory = statedirectory.device_directory(values.state_dir)
        assert set(os.listdir(directory)) == {path.name for path in {*first, *second}}
        nodes = {path.name: path.stat().st_ino for path in {*first, *second}}
        client.detach("a")
        assert set(os.listdir(directory)) == {path.name for path in second}
        assert not client.stop_if_idle()
        client.detach("nobody")
        client.detach("b")
        assert os.listdir(directory) == []
        assert os.listdir(values.state_dir / "maps") == []
        (again,) = client.attach("c", specs[:1], stack.OPTIONS)
        assert again.stat().st_ino == nodes[again.name]
        assert again.read_bytes() == layers[0].image
        client.detach("c")
        assert client.stop_if_idle()
        assert control.DeviceClient.connect(values.state_dir) is None


def test_a_held_server_does_not_end_as_idle(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = stack.make_layer(stack.random_image(65536, 3))
    with stack.running(stack.settings(tmp_path)) as client:
        client.hold("agent")
        client.attach("mount", [blobs.add(layer)], stack.OPTIONS)
        client.detach("mount")
        assert not client.stop_if_idle()
        os.kill(client.status()["processes"]["server"], signal.SIGKILL)
        assert not client.stop_if_idle(), "its successor knows"
        client.detach("agent")
        assert client.stop_if_idle()
        client.hold("agent")  # starts another


def test_more_devices_than_one_listing_holds(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layers = [stack.make_layer(number.to_bytes(2) * 2048) for number in range(1, 601)]
    values = stack.settings(tmp_path)
    with stack.running(values) as client:
        devices = client.attach("owner", [blobs.add(layer) for layer in layers], stack.OPTIONS)
        listed = os.listdir(statedirectory.device_directory(values.state_dir))
        assert sorted(listed) == sorted(path.name for path in devices)


def test_a_block_map_comes_from_the_origin_if_the_client_has_none(
    tmp_path: Path, blobs: stack.BlobServer
) -> None:
    layer = stack.make_layer(stack.random_image(100 * 4096, 4))
    blobs.add(layer)
    with stack.running(stack.settings(tmp_path)) as client:
        spec = layer.spec(blobs.ref(), with_map=False)
        (device,) = client.attach("owner", [spec], stack.OPTIONS)
        assert device.read_bytes() == layer.image


def test_what_attach_refuses(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer, other = (stack.make_layer(stack.random_image(8192, seed)) for seed in (5, 6))
    good, values = blobs.add(layer), stack.settings(tmp_path)
    with stack.running(values) as client:
        wrong_blob = control.LayerSpec(
            good.origin_ref, good.map_digest, good.map_size, "sha256:" + "0" * 64, 1
        )
        with pytest.raises(errors.IntegrityError, match="is of blob"):
            client.attach("owner", [good, wrong_blob], stack.OPTIONS)
        with pytest.raises(errors.NotFoundError):
            client.attach("owner", [other.spec(blobs.ref(), with_map=False)], stack.OPTIONS)
        forged = control.LayerSpec(
            good.origin_ref, other.map_digest, 1, good.blob_digest, 1, map_bytes=layer.map_bytes
        )
        with pytest.raises(errors.IntegrityError, match="bytes are not"):
            client.attach("owner", [forged], stack.OPTIONS)
        with pytest.raises(errors.InvalidInputError):
            client.attach("", [good], stack.OPTIONS)
        assert client.status()["devices"] == []


def test_a_state_directory_is_ours_alone(tmp_path: Path, blobs: stack.BlobServer) -> None:
    values = stack.settings(tmp_path)
    values.state_dir.mkdir(mode=0o755)
    with stack.running(values):
        assert stat.S_IMODE(values.state_dir.stat().st_mode) == 0o700
        for name in ("control.sock", "keeper.sock", "server.log", "settings.json"):
            assert stat.S_IMODE((values.state_dir / name).stat().st_mode) == 0o600, name
        # Not even a process that gets at the socket is served, if it is another user's.
        for path, mode in ((values.state_dir, 0o755), (values.state_dir / "control.sock", 0o666)):
            path.chmod(mode)
        assert _ping_as(65534, values.state_dir) == b""
        assert _ping_as(0, values.state_dir) != b""


def _ping_as(uid: int, state_dir: Path) -> bytes:
    """What another user's process is answered."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.chdir(state_dir)
            os.setuid(uid)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect("control.sock")
                controlmessage.send(connection, {"op": "ping"})
                os.write(writer, connection.recv(100))
        except ConnectionError:
            pass
        except BaseException as exc:
            os.write(writer, repr(exc).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def test_the_control_socket_bounds_its_messages(tmp_path: Path, blobs: stack.BlobServer) -> None:
    values = stack.settings(tmp_path)
    with stack.running(values) as client:
        for message in (b"\xff\xff\xff\xff", b"\0\0\0\x02[]", b"\0\0\0\x04nope", b"\0\0"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(os.fspath(values.state_dir / "control.sock"))
                connection.sendall(message)
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(100) == b""
        assert client.status()["devices"] == []


def test_starters_race(tmp_path: Path, blobs: stack.BlobServer) -> None:
    values = stack.settings(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        clients = list(pool.map(lambda _: control.DeviceClient.ensure(values), range(6)))
    try:
        assert len({client.status()["processes"]["server"] for client in clients}) == 1
    finally:
        clients[0].stop()


def test_a_server_that_cannot_work_says_so(tmp_path: Path, blobs: stack.BlobServer) -> None:
    (tmp_path / "cache").write_text("in the way")
    values = stack.settings(tmp_path)
    with stack.running(values) as client, pytest.raises(errors.ConfigurationError, match="cache"):
        client.status()


def test_reading_what_was_detached_fails(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = stack.make_layer(stack.random_image(4 << 20, 7), 65536)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        fd = os.open(device, os.O_RDONLY)
        try:
            assert os.pread(fd, 4096, 0) == layer.image[:4096]
            client.detach("owner")
            with pytest.raises(OSError) as caught:
                os.pread(fd, 4096, 3 << 20)
            assert caught.value.errno == errno.EIO
        finally:
            os.close(fd)


def test_a_map_stays_for_who_attaches_while_its_last_owner_goes(
    tmp_path: Path, blobs: stack.BlobServer
) -> None:
    """Else a successor of the server would have to ask the origin for it, which may be dead by then."""
    shared, slow = (stack.make_layer(stack.random_image(8192, seed)) for seed in (40, 41))
    values = stack.settings(tmp_path)
    blobs.add(slow)
    with stack.running(values) as client:
        (device,) = client.attach("first", [blobs.add(shared)], stack.OPTIONS)
        blobs.open.clear()
        specs = [shared.spec(blobs.ref()), slow.spec(blobs.ref(), with_map=False)]
        second = threading.Thread(target=client.attach, args=("second", specs, stack.OPTIONS))
        second.start()
        assert blobs.arrived.acquire(timeout=30)  # the shared layer's map was read by then
        client.detach("first")
        blobs.open.set()
        second.join()
        assert device.read_bytes() == shared.image
        maps = {path.name for path in (values.state_dir / "maps").iterdir()}
        assert {f"sha256:{name}" for name in maps} == {shared.map_digest, slow.map_digest}


def test_origins_that_nobody_has_layers_of_are_closed(tmp_path: Path, blobs: stack.BlobServer) -> None:
    """Also while something else is attached: on a node something always is."""
    kept = stack.make_layer(stack.random_image(8192, 50))
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("kept", [blobs.add(kept)], stack.OPTIONS)
        descriptors = Path(f"/proc/{client.status()['processes']['server']}/fd")
        before = len(list(descriptors.iterdir()))
        for number in range(20):
            layer = stack.make_layer(stack.random_image(8192, 60 + number))
            blobs.add(layer)
            spec = layer.spec(blobs.ref(f"team/image-{number}"), with_map=False)
            client.attach("passing", [spec, kept.spec(spec.origin_ref)], stack.OPTIONS)
            client.detach("passing")
        stack.eventually(lambda: len(list(descriptors.iterdir())) <= before + 4, "descriptors are given back")
        assert device.read_bytes() == kept.image


def test_a_state_directory_behind_a_link(tmp_path: Path, blobs: stack.BlobServer) -> None:
    """As /var/run is one on every host: the kernel names the mount without it."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    layer = stack.make_layer(stack.random_image(8192, 90))
    with stack.running(stack.settings(tmp_path / "link")) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        assert device.read_bytes() == layer.image


def test_a_server_that_hangs_holds_nobody_up_for_good(
    tmp_path: Path, blobs: stack.BlobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_ANSWER_SECONDS", 1)
    with stack.running(stack.settings(tmp_path)) as client:
        server = client.status()["processes"]["server"]
        os.kill(server, signal.SIGSTOP)
        try:
            with pytest.raises(errors.UnavailableError, match="did not answer status within 1 s"):
                client.status()
        finally:
            os.kill(server, signal.SIGCONT)
        monkeypatch.setattr(control, "_ANSWER_SECONDS", 60)
        assert client.status()["devices"] == []
