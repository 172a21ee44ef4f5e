"""What must never happen to running pods: whatever fails on the node, who reads an image of ours reads on.

The agent is the real process; a pod is a process that hashes the files of an overlay, mounted as containerd
mounts it, again and again, and writes beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from google.protobuf import empty_pb2

from agent.proto import mount_pb2
from agent.proto import snapshots_pb2 as messages
from imagefs import syscalls
from imagefs.fuse import layers
from imagefs.fuse.control import DeviceClient
from tests.agent.agent_process import Agent, push
from tests.agent.lazy_node import Source
from tests.fixtures import block_images, images, servers

pytestmark = pytest.mark.root

_FILES = {f"data/{number}": random.Random(number).randbytes(150_000) for number in range(6)}
_COLD = random.Random(99).randbytes(700_000)
_TARS = [
    images.tar_of([("data", None), *_FILES.items()]),
    images.tar_of([("cold", _COLD)]),
]
_POD = """
import hashlib, os, sys, time
root, expected = sys.argv[1], list(zip(sys.argv[2::2], sys.argv[3::2]))
number = 0
while True:
    for name, digest in expected:
        with open(f"{root}/{name}", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if hashlib.sha256(file.read()).hexdigest() != digest:
                sys.exit(f"{name}: wrong bytes")
    number += 1
    os.write(1, b"round\\n")
    time.sleep(0.02)
"""


class Pod:
    """See the module. `mounts` is what Prepare answered."""

    def __init__(self, folder: Path, mounts: Sequence[mount_pb2.Mount], *, files: Sequence[str] = ()) -> None:
        self.root = folder / f"pod-{len(list(folder.glob('pod-*')))}"
        self.root.mkdir()
        (mount,) = mounts
        # A copy: what containerd mounts is its own.
        syscalls.mount(mount.source, self.root, mount.type, 0, ",".join(mount.options))
        self._said = folder / f"{self.root.name}.out"
        names = files or list(_FILES)
        expected = [each for name in names for each in (name, _digest(_FILES.get(name, _COLD)))]
        with self._said.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", _POD, str(self.root), *expected], stdout=out, stderr=out
            )

    def reads_on(self) -> None:
        """All files were read once more, from first to last, and were right; and it can write."""
        rounds = self._said.read_bytes().count(b"round")
        until = time.monotonic() + 60
        while self._said.read_bytes().count(b"round") < rounds + 2:
            assert self.process.poll() is None, self._said.read_text()
            assert time.monotonic() < until, self._said.read_text()
            time.sleep(0.01)

    def read(self, name: str) -> subprocess.CompletedProcess[bytes]:
        """A file, by another process: this one must not wait for an origin."""
        return subprocess.run(["sha256sum", self.root / name], capture_output=True, timeout=60)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(30)
        subprocess.run(["umount", "-l", self.root], check=False)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _running(made: Agent) -> Iterator[Agent]:
    made.start()
    try:
        yield made
    finally:
        made.clean_up()


@contextlib.contextmanager
def _pod(agent: Agent, source: Source, **more: object) -> Iterator[Pod]:
    pod = Pod(agent.folder, agent.prepare_image(source, "pod"), **more)  # type: ignore[arg-type]
    try:
        pod.reads_on()
        yield pod
        pod.reads_on()
    finally:
        pod.end()


@pytest.fixture
def image(registry: servers.RegistryServer) -> Source:
    return push(registry, _TARS)


@pytest.fixture
def proxy(registry: servers.RegistryServer) -> Iterator[servers.FaultProxy]:
    made = servers.FaultProxy(registry.host)
    yield made
    made.close()


def _restart(agent: Agent) -> None:
    agent.end(signal.SIGKILL)
    agent.start()


def _commit(agent: Agent, name: str, key: str) -> None:
    agent.call("Commit", messages.CommitSnapshotRequest(name=name, key=key), empty_pb2.Empty)


def _remove(agent: Agent, key: str) -> None:
    agent.call("Remove", messages.RemoveSnapshotRequest(key=key), empty_pb2.Empty)


def _cleanup(agent: Agent) -> None:
    agent.call("Cleanup", messages.CleanupRequest(), empty_pb2.Empty)


def _fails(call: Callable[[], object], *codes: grpc.StatusCode) -> str:
    with pytest.raises(grpc.RpcError) as refusal:
        call()
    assert refusal.value.code() in codes, refusal.value
    return str(refusal.value.details())


def _eventually(condition: Callable[[], bool], agent: Agent, what: str) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, f"never: {what}\n{agent.log.read_text()}"
        time.sleep(0.05)


# -- disks -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk(place: Path, size_bytes: int = 8 << 20) -> Iterator[None]:
    """A filesystem of its own."""
    place.mkdir(mode=0o700)
    syscalls.mount("tmpfs", place, "tmpfs", 0, f"size={size_bytes},mode=700")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def _fill(place: Path) -> None:
    with contextlib.suppress(OSError), open(place / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20)) or file.write(bytes(1))
    # What one write leaves is taken as well: a database needs little.
    with contextlib.suppress(OSError), open(place / "ballast", "ab", buffering=0) as file:
        while True:
            file.write(bytes(512))


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


_PLACES = pytest.mark.parametrize("place", ["root", "state", "cache"])


@_PLACES
def test_a_full_disk(tmp_path: Path, image: Source, place: str, registry: servers.RegistryServer) -> None:
    other = push(registry, [images.tar_of([("other", b"o" * 400_000)])])
    made = Agent(tmp_path)
    with _disk(tmp_path / place), _running(made) as agent, _pod(agent, image) as pod:
        _fill(tmp_path / place)
        pod.reads_on()
        if place == "root":
            codes = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
            assert "full" in _fails(lambda: agent.prepare("more", "", {}), *codes).lower()
        elif place == "state":
            # No layer can be attached: an ordinary pull.
            labels = {**other.labels, "containerd.io/snapshot.ref": other.chain_ids[0]}
            assert agent.prepare("extract", "", labels).mounts
        else:
            agent.prepare_image(other, "other")  # from memory
        pod.reads_on()
        agent.end(signal.SIGKILL)
        pod.reads_on()
        (tmp_path / place / "ballast").unlink()
        agent.start()
        agent.prepare("after", image.chain_ids[-1], {})


@_PLACES
def test_a_disk_that_becomes_read_only(tmp_path: Path, image: Source, place: str) -> None:
    made = Agent(tmp_path)
    with _disk(tmp_path / place), _running(made) as agent, _pod(agent, image) as pod:
        agent.end(signal.SIGKILL)  # what it has open for writing would keep a disk from it
        devices = DeviceClient.connect(agent.state)
        assert devices is not None
        # As the kernel does it after an error, whoever writes: by the superblock, not the mount.
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / place], check=False)
        pod.reads_on()
        os.kill(devices.status()["processes"]["workers"][0], signal.SIGKILL)
        pod.reads_on()
        _remount(tmp_path / place, "rw")
        agent.start()
        agent.prepare("after", image.chain_ids[-1], {})


# -- limits --------------------------------------------------------------------------------------------------


def test_no_descriptor_left(tmp_path: Path, image: Source) -> None:
    with _running(Agent(tmp_path)) as agent, _pod(agent, image) as pod:
        assert agent.process is not None
        pid = agent.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        opened = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (opened - 2, before[1]))
        with contextlib.suppress(grpc.RpcError):
            agent.prepare("starved", image.chain_ids[-1], {})
        pod.reads_on()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        agent.prepare("fed", image.chain_ids[-1], {})
        assert agent.process.poll() is None


_CLOCK = """
import time
def _shifted(real, scale):
    def now():
        try:
            with open({file!r}) as file:
                return real() + int(file.read()) * scale
        except (OSError, ValueError):
            return real()
    return now
time.time = _shifted(time.time, 1)
time.time_ns = _shifted(time.time_ns, 10**9)
"""


def test_a_clock_that_jumps(tmp_path: Path, image: Source, registry: servers.RegistryServer) -> None:
    others = [push(registry, [images.tar_of([("n", bytes([n]) * 9000)])]) for n in range(3)]
    site, jump = tmp_path / "site", tmp_path / "jump"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_CLOCK.format(file=str(jump)))
    made = Agent(tmp_path)
    made.environment["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    with _running(made) as agent, _pod(agent, image) as pod:
        for number, seconds in enumerate((-400 * 86400, 4000 * 86400)):
            jump.write_text(str(seconds))
            agent.prepare_image(others[number], f"jump-{number}")
            pod.reads_on()
        # grpc's own clock cannot be shifted from here: it would wait for the difference when it starts.
        jump.write_text("0")
        _restart(agent)
        agent.prepare_image(others[2], "back")
        _remove(agent, "jump-0")
        assert agent.api.get("/readyz")["ready"] is True


# -- registries ----------------------------------------------------------------------------------------------


def test_a_dead_registry_at_every_moment(
    tmp_path: Path, registry: servers.RegistryServer, proxy: servers.FaultProxy
) -> None:
    image = push(registry, _TARS, by_way_of=proxy.host)
    other = push(registry, [images.tar_of([("x", b"x" * 70_000)])], by_way_of=proxy.host)
    made = Agent(tmp_path, deadline_seconds=3, extra="[images]\nlookup_deadline_seconds = 3\n")
    with _running(made) as agent, _pod(agent, image) as pod:
        proxy.add(servers.Fault(times=None, status=503))
        # PullImage: an ordinary one, and it is said why.
        labels = {**other.labels, "containerd.io/snapshot.ref": other.chain_ids[0]}
        assert agent.prepare("extract", "", labels).mounts
        assert "lookup_failed" in agent.events()
        # At run: what is here is read, what is not fails for whoever reads it, and comes back.
        pod.reads_on()
        assert b"Input/output error" in pod.read("cold").stderr
        pod.reads_on()
        # At restart.
        _restart(agent)
        assert agent.api.get("/readyz")["ready"] is True
        agent.prepare("second", image.chain_ids[-1], {})
        pod.reads_on()
        proxy.clear()
        time.sleep(layers.SAME_READ_SECONDS)  # within this, it is the read that failed
        assert _digest(_COLD).encode() in pod.read("cold").stdout


def test_a_pod_whose_origin_hangs_is_deleted_at_once(
    tmp_path: Path, registry: servers.RegistryServer, proxy: servers.FaultProxy
) -> None:
    """With a read deadline far beyond this test's patience."""
    image = push(registry, _TARS, by_way_of=proxy.host)
    with _running(Agent(tmp_path, deadline_seconds=3000)) as agent:
        pod = Pod(tmp_path, agent.prepare_image(image, "pod"))
        try:
            pod.reads_on()
            proxy.add(servers.Fault(path="/blobs/", times=None, hang=True))
            # Two that wait: one in read, one in a page fault.
            readers = [
                subprocess.Popen(command, stdout=subprocess.DEVNULL)
                for command in (
                    ["cat", str(pod.root / "cold")],
                    [
                        sys.executable,
                        "-c",
                        "import mmap, sys; f = open(sys.argv[1]);"
                        "print(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[-1])",
                        str(pod.root / "cold"),
                    ],
                )
            ]
            _eventually(lambda: bool(proxy.seen("GET", "/blobs/")), agent, "a read that waits")
            for reader in readers:
                assert reader.poll() is None
                reader.kill()
                reader.wait(20)
        finally:
            pod.end()
        _remove(agent, "pod")
        for chain_id in reversed(image.chain_ids):
            _remove(agent, chain_id)
        _cleanup(agent)
        _eventually(lambda: not agent.layer_mounts(), agent, "unmounted")
        devices = DeviceClient.connect(agent.state)
        assert devices is not None
        _eventually(lambda: not devices.status()["devices"], agent, "detached")


def _reboot(agent: Agent) -> None:
    """What it leaves: no process, no mount, an empty state directory."""
    agent.end(signal.SIGKILL)
    devices = DeviceClient.connect(agent.state)
    assert devices is not None
    devices.stop()
    for place in reversed(agent.layer_mounts()):
        subprocess.run(["umount", "-l", place.split()[1]], check=True)
    subprocess.run(["rm", "-rf", agent.state], check=True)


def test_metadata_that_is_gone_after_a_reboot_heals_when_the_registry_is_back(
    tmp_path: Path, registry: servers.RegistryServer, proxy: servers.FaultProxy
) -> None:
    lost = push(registry, _TARS, by_way_of=proxy.host)
    kept = push(registry, [images.tar_of([("k", b"k" * 7000)])])
    made = Agent(tmp_path, deadline_seconds=2, extra="[images]\nlookup_deadline_seconds = 2\n")
    with _running(made) as agent:
        agent.prepare_image(lost, "lost")
        agent.prepare_image(kept, "kept")
        _reboot(agent)
        for path in (tmp_path / "cache").rglob("*"):
            if path.is_file() and len(path.name) >= 64:
                path.unlink()
        proxy.add(servers.Fault(times=None, status=503))
        agent.start()
        assert "quarantined" in agent.events()
        agent.prepare("another", kept.chain_ids[-1], {})
        why = _fails(lambda: agent.prepare("no", lost.chain_ids[-1], {}), grpc.StatusCode.UNAVAILABLE)
        assert "quarantined" in why
        proxy.clear()

        def works() -> bool:
            try:
                return bool(agent.prepare("again", lost.chain_ids[-1], {}))
            except grpc.RpcError:
                return False

        _eventually(works, agent, "healed without a restart")
        pod = Pod(
            tmp_path,
            agent.call("Mounts", messages.MountsRequest(key="again"), messages.MountsResponse).mounts,
        )
        try:
            pod.reads_on()
        finally:
            pod.end()


# -- the agent itself ----------------------------------------------------------------------------------------


def test_killed_in_the_middle_of_everything(tmp_path: Path, image: Source) -> None:
    """SIGKILL, as by the OOM killer, at moments of Prepare, Commit, Mounts, Remove and Cleanup."""
    chance = random.Random(5)
    with _running(Agent(tmp_path)) as agent, _pod(agent, image) as pod:
        stop = threading.Event()

        def containerd() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                key, name = f"work-{number}", f"layer-{number}"
                with contextlib.suppress(grpc.RpcError):
                    agent.prepare(key, image.chain_ids[-1] if number % 2 else "", {})
                    agent.call("Mounts", messages.MountsRequest(key=key), messages.MountsResponse)
                    _commit(agent, name, key)
                    _remove(agent, name)
                    _cleanup(agent)

        asking = [threading.Thread(target=containerd) for _ in range(2)]
        for thread in asking:
            thread.start()
        for _ in range(4):
            time.sleep(0.3 + chance.random() * 0.4)
            _restart(agent)
        stop.set()
        for thread in asking:
            thread.join()
        pod.reads_on()
        _cleanup(agent)
        status = agent.api.get("/api/v1/status")["snapshots"]
        folders = {path.name for path in (agent.root / "snapshots").iterdir()}
        assert all(name.isdigit() for name in folders), folders
        # The lazy layers are committed and have none.
        assert len(folders) == sum(status.values()) - len(image.chain_ids)
        agent.call("Stat", messages.StatSnapshotRequest(key="pod"), messages.StatSnapshotResponse)


def test_an_upgrade_under_a_running_pod(tmp_path: Path, image: Source) -> None:
    with _running(Agent(tmp_path)) as agent, _pod(agent, image) as pod:
        devices = DeviceClient.connect(agent.state)
        assert devices is not None
        mounts, before = agent.layer_mounts(), devices.status()["processes"]
        agent.config.write_text(
            agent.config.read_text().replace("deadline_seconds = 5", "deadline_seconds = 6")
        )
        said = subprocess.run(
            [block_images.GLOWPLUG, "agent", "upgrade", "--no-restart", "--config", agent.config],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert said.returncode == 0, said.stderr
        pod.reads_on()
        after = devices.status()["processes"]
        assert after["server"] != before["server"]
        assert not set(after["workers"]) & set(before["workers"])
        assert agent.layer_mounts() == mounts
        agent.end()
        agent.start()
        assert "settings_kept" not in agent.events(), "the upgrade took them up"
        assert agent.layer_mounts() == mounts
        agent.prepare("after", image.chain_ids[-1], {})


def test_mounts_of_others_in_the_same_state_directory_come_and_go(tmp_path: Path, image: Source) -> None:
    """The last `glowplug umount` does not take the device server from the agent."""
    with _running(Agent(tmp_path)) as agent:
        command = block_images.Command(agent.state, agent.cache)
        devices = DeviceClient.connect(agent.state)
        assert devices is not None
        server = devices.status()["processes"]["server"]
        (tmp_path / "mnt").mkdir()
        command("mount", f"docker://{image.name}", tmp_path / "mnt")
        command("umount", tmp_path / "mnt")
        command("run", f"docker://{image.name}", "--", "/no/such/program", code=127)
        assert devices.status()["processes"]["server"] == server
        with _pod(agent, image):
            pass
