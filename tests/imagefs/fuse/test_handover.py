"""An upgrade: keeper, server and workers of another build take over while reads are under way; on kernels
that can queue requests again, and on those that cannot."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import errors
from imagefs.fuse import control, handover, protocol
from tests.imagefs.fuse import stack
from tests.imagefs.fuse.stack import Reader, eventually

root = pytest.mark.root

_BLOCK = 65536
_NO_RESEND = """
from imagefs.fuse import protocol
protocol._WANTED &= ~protocol.HAS_RESEND
protocol.HAS_RESEND = 0
"""
_REPOSITORY = Path(__file__).parents[3]

_reads = st.builds(
    protocol.Read,
    unique=st.integers(0, 2**64 - 1),
    node=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**64 - 1),
    size=st.integers(0, 2**32 - 1),
    pid=st.integers(0, 2**32 - 1),
)


@given(st.dictionaries(st.integers(0, 63), st.lists(_reads, min_size=1, max_size=5), max_size=4))
def test_what_is_left_is_taken_once(tmp_path_factory: pytest.TempPathFactory, left: handover.Left) -> None:
    directory = tmp_path_factory.mktemp("state")
    handover.leave(directory, "mount", left)
    assert handover.take(directory, "mount") == left
    assert handover.take(directory, "mount") == {}


def test_nothing_is_taken_from_another_mount_or_version(tmp_path: Path) -> None:
    handover.leave(tmp_path, "mount", {0: [protocol.Read(1, 2, 3, 4, 5)]})
    assert handover.take(tmp_path, "another") == {}
    (tmp_path / "handover.json").write_text('{"version": 99, "token": "mount", "reads": "?"}')
    assert handover.take(tmp_path, "mount") == {}
    for damage in ("", "[]", '{"version": 1, "token": "mount", "reads": [[0]]}'):
        (tmp_path / "handover.json").write_text(damage)
        with pytest.raises(errors.InvalidInputError, match=r"handover\.json"):
            handover.take(tmp_path, "mount")
        assert handover.take(tmp_path, "mount") == {}


@pytest.fixture(params=["resend", "no-resend"])
def kernel(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device server's processes believe that they run on such a kernel."""
    if request.param == "no-resend":
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(_NO_RESEND)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(_REPOSITORY)]))
    return str(request.param)


def _another_build(directory: Path) -> str:
    """An interpreter with a copy of imagefs of its own."""
    build = directory / "another"
    shutil.copytree(_REPOSITORY / "imagefs", build / "imagefs")
    python = build / "python"
    path = os.pathsep.join(filter(None, [str(build), os.environ.get("PYTHONPATH")]))
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python)


def _processes(client: stack.Client) -> dict[str, list[int]]:
    found = client.status()["processes"]
    return {"server": [found["server"]], "workers": found["workers"]}


def _environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextlib.contextmanager
def _reading(device: Path, starts: list[int]) -> Iterator[list[Reader]]:
    readers = [Reader(device, start) for start in starts]
    try:
        yield readers
    finally:
        for reader in readers:
            if reader.running():
                reader.kill()


@root
def test_another_build_takes_over_under_waiting_reads(
    tmp_path: Path, blobs: stack.BlobServer, kernel: str
) -> None:
    layer = stack.make_layer(stack.random_image(12 << 20, 1), _BLOCK)
    with stack.running(stack.settings(tmp_path)) as client:
        assert client.status()["processes"]["survives_kill"] is (kernel == "resend")
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        blobs.open.clear()
        starts = [0, 6 << 20, 12 << 20, 1 << 20]
        with _reading(device, starts) as readers:
            for _ in range(3):  # reads hang in the kernel, in workers and at the origin
                assert blobs.arrived.acquire(timeout=30)
            before = _processes(client)
            client.hand_over(python=_another_build(tmp_path))
            after = _processes(client)
            assert not {*before["server"], *before["workers"]} & {*after["server"], *after["workers"]}
            keeper = _parent(after["server"][0])
            for pid in (keeper, *after["server"], *after["workers"]):
                assert f"{tmp_path}/another" in _environment(pid)
            assert readers[0].running(), "nobody waited for the origin"
            blobs.open.set()
            assert [each.outcome() for each in readers] == [
                stack.digest(layer.image[start:]) for start in starts
            ]


@root
def test_readers_hash_through_several_hand_overs(
    tmp_path: Path, blobs: stack.BlobServer, kernel: str
) -> None:
    layer = stack.make_layer(stack.random_image(24 << 20, 2), _BLOCK)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        stop = threading.Event()
        outcomes: list[str] = []

        def read_on() -> None:
            while not stop.is_set():
                stack.drop_cached_pages(device)
                outcomes.append(Reader(device).outcome())

        threads = [threading.Thread(target=read_on) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            client.hand_over()
            seen = len(outcomes)
            eventually(lambda seen=seen: len(outcomes) > seen, "another round")  # type: ignore[misc]
        stop.set()
        for thread in threads:
            thread.join()
        assert set(outcomes) == {stack.digest(layer.image)}


@root
def test_new_settings_count_and_old_devices_stay(tmp_path: Path, blobs: stack.BlobServer) -> None:
    layer = stack.make_layer(stack.random_image(1 << 20, 3), _BLOCK)
    values = stack.settings(tmp_path)
    with stack.running(values) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        client.hold("agent")
        with open(device, "rb") as held:
            newer = stack.Client(stack.settings(tmp_path, read_deadline_seconds=7.0))
            newer.hand_over()
            assert held.read() == layer.image
        written = control.decode_settings((values.state_dir / "settings.json").read_bytes())
        assert written.read_deadline_seconds == 7.0
        status = newer.status()
        assert [row["owners"] for row in status["devices"]] == [["owner"]]
        assert status["holds"] == ["agent"]


@root
def test_a_build_that_does_not_start_changes_nothing(
    tmp_path: Path, blobs: stack.BlobServer, kernel: str
) -> None:
    layer = stack.make_layer(stack.random_image(4 << 20, 4), _BLOCK)
    with stack.running(stack.settings(tmp_path)) as client:
        (device,) = client.attach("owner", [blobs.add(layer)], stack.OPTIONS)
        before = _processes(client)
        blobs.open.clear()
        with _reading(device, [0]) as (reader,):
            assert blobs.arrived.acquire(timeout=30)
            for python in ("/bin/false", "/no/such/python"):
                with pytest.raises(errors.ConfigurationError, match=python):
                    client.hand_over(python=python)
            assert _processes(client) == before
            client.hand_over()  # an own keeper is there again, and can be replaced
            blobs.open.set()
            assert reader.outcome() == stack.digest(layer.image)


@root
def test_no_server_to_take_over_from(tmp_path: Path) -> None:
    values = stack.settings(tmp_path)
    values.state_dir.mkdir(mode=0o700)
    with pytest.raises(errors.NotFoundError, match="no device server"):
        stack.Client(values).hand_over()
