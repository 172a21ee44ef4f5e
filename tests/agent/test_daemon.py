"""The agent as a process: started, stopped, killed, started twice; what containerd sees of it over gRPC."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from agent import client, lookup
from agent.proto import snapshots_pb2 as messages
from imagefs import errors, reference
from imagefs.fuse.control import DeviceClient
from imagefs.origin import connect
from tests.agent.lazy_node import BASE, Source
from tests.fixtures import block_images, images, servers

pytestmark = pytest.mark.root

_START_SECONDS = 30.0
_PREPARE = "/containerd.services.snapshots.v1.Snapshots/Prepare"


class Agent:
    """`glowplug agent run` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root, self.state = folder / "root", folder / "state"
        self.socket = self.state / "snapshotter.sock"
        self.config = folder / "agent.toml"
        self.config.write_text(
            f'root = "{self.root}"\nstate = "{self.state}"\nsocket = "{self.socket}"\n'
            f'[cache]\ndirectory = "{folder}/cache"\nfree_floor_percent = 0\n'
            "[reads]\ndeadline_seconds = 5\n"
            '[http]\nlisten = "127.0.0.1:0"\n'
        )
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [block_images.GLOWPLUG, "agent", "run", "--config", self.config], stdout=log, stderr=log
            )
        until = time.monotonic() + _START_SECONDS
        while not self.socket.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def end(self, signum: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(signum)
        code = self.process.wait(30)
        self.process = None
        return code

    @property
    def api(self) -> client.AgentClient:
        return client.AgentClient(self.state / "agent.sock")

    def prepare(self, key: str, parent: str, labels: dict[str, str]) -> messages.PrepareSnapshotResponse:
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            call = channel.unary_unary(
                _PREPARE,
                request_serializer=messages.PrepareSnapshotRequest.SerializeToString,
                response_deserializer=messages.PrepareSnapshotResponse.FromString,
            )
            request = messages.PrepareSnapshotRequest(key=key, parent=parent, labels=labels)
            return call(request, timeout=30)  # type: ignore[no-any-return]

    def prepare_image(self, source: Source, key: str) -> None:
        """Every layer, as containerd's unpacker asks for it, and an active snapshot on top."""
        parent = ""
        for chain_id in source.chain_ids:
            with pytest.raises(grpc.RpcError) as refusal:
                self.prepare(
                    f"extract {chain_id}", parent, {**source.labels, "containerd.io/snapshot.ref": chain_id}
                )
            assert refusal.value.code() is grpc.StatusCode.ALREADY_EXISTS
            parent = chain_id
        self.prepare(key, parent, {})

    def layer_mounts(self) -> list[str]:
        """Mount ids and places of the layers that are mounted."""
        lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return [f"{line[0]} {line[4]}" for line in lines if line[4].startswith(f"{self.root}/layers/")]

    def events(self) -> list[str]:
        """The kinds of what happened."""
        return [event["kind"] for event in self.api.get("/api/v1/events")["events"]]

    def message_of_the_day(self) -> str:
        """A file of the image's first layer, wherever that is mounted."""
        found = [Path(line.split()[1]) / "etc/motd" for line in self.layer_mounts()]
        return next(path for path in found if path.exists()).read_text()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path)
    made.start()
    yield made
    if made.process is not None:
        made.end()
    for place in reversed(made.layer_mounts()):
        subprocess.run(["umount", "-l", place.split()[1]], check=False)
    devices = DeviceClient.connect(made.state)
    if devices is not None:
        devices.stop()


@pytest.fixture
def source(registry: servers.RegistryServer) -> Source:
    """An image of two layers with its block image."""
    tars = [BASE, images.tar_of([("top", b"t" * 100_000)])]
    repository = servers.unique_name("daemon")
    name = f"{registry.host}/{repository}:v1"
    image = images.make(tars)
    image.push(connect.connect(reference.parse(f"docker://{name}"), connect.Options()), "v1")
    block_images.convert(f"docker://{name}")
    return Source(name, image.top, lookup.chain_ids([images.digest(tar) for tar in tars]))


def test_lazily_over_grpc_and_through_a_restart(agent: Agent, source: Source) -> None:
    agent.prepare_image(source, "active")
    mounts = agent.layer_mounts()
    assert len(mounts) == 2
    assert agent.api.get("/readyz")["ready"] is True
    assert agent.end() == 0
    assert agent.layer_mounts() == mounts, "mounts outlive the agent"
    assert agent.message_of_the_day() == "base\n"
    agent.start()
    assert agent.layer_mounts() == mounts, "nothing is mounted anew"
    agent.prepare("second", source.chain_ids[-1], {})
    assert agent.layer_mounts() == mounts


def test_killed_and_started_again(agent: Agent, source: Source) -> None:
    agent.prepare_image(source, "active")
    mounts = agent.layer_mounts()
    agent.end(signal.SIGKILL)
    assert agent.message_of_the_day() == "base\n", "what runs goes on reading"
    agent.start()
    assert agent.layer_mounts() == mounts
    status = agent.api.get("/api/v1/status")
    assert status["snapshots"] == {"view": 0, "active": 1, "committed": 2}


def test_a_device_server_that_died_is_started_and_layers_are_mounted_anew(
    agent: Agent, source: Source
) -> None:
    agent.prepare_image(source, "active")
    devices = DeviceClient.connect(agent.state)
    assert devices is not None
    devices.stop()
    until = time.monotonic() + 60
    while "remounting" not in agent.events() or len(agent.layer_mounts()) < 2:
        assert time.monotonic() < until, agent.log.read_text()
        time.sleep(0.1)
    assert agent.message_of_the_day() == "base\n"


@pytest.mark.parametrize("shared", ["--root", "--state", "--socket"])
def test_a_second_agent_on_what_one_has_is_refused(agent: Agent, source: Source, shared: str) -> None:
    agent.prepare_image(source, "container")
    places = {"--root": "other-root", "--state": "other-state", "--socket": "other.sock"}
    del places[shared]
    options = [word for option, name in places.items() for word in (option, agent.folder / name)]
    result = subprocess.run(
        [block_images.GLOWPLUG, "agent", "run", "--config", agent.config, *options],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 9
    assert agent.process is not None
    assert f"pid {agent.process.pid}" in result.stderr
    assert shared in result.stderr
    agent.prepare("still-served", "", {})
    assert agent.message_of_the_day()


def test_settings_that_a_running_device_server_keeps_are_named(agent: Agent) -> None:
    agent.end()
    agent.config.write_text(agent.config.read_text().replace("deadline_seconds = 5", "deadline_seconds = 6"))
    agent.start()
    (said,) = [
        event for event in agent.api.get("/api/v1/events")["events"] if event["kind"] == "settings_kept"
    ]
    assert "reads.deadline_seconds (5.0)" in said["message"]
    assert "cache." not in said["message"]


def test_the_sockets_are_ours_alone(agent: Agent) -> None:
    for path in (agent.socket, agent.state / "agent.sock"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_pull_over_the_api(agent: Agent, source: Source) -> None:
    found = agent.api.post("/api/v1/pull", {"reference": source.name})
    assert found["source_digest"] == source.digest
    assert found["chain_ids"] == source.chain_ids
    assert [manifest["digest"] for manifest in found["manifests"]] == [source.digest]
    # Afterwards the layers are found without labels, as by containerd 1.6's ctr.
    with pytest.raises(grpc.RpcError) as refusal:
        agent.prepare("extract", "", {"containerd.io/snapshot.ref": source.chain_ids[0]})
    assert refusal.value.code() is grpc.StatusCode.ALREADY_EXISTS
    with pytest.raises(errors.NotFoundError):
        agent.api.post("/api/v1/pull", {"reference": f"{source.name.partition('/')[0]}/no/such:v1"})


def test_a_damaged_database_is_said_aloud_and_the_agent_serves(agent: Agent, source: Source) -> None:
    agent.prepare_image(source, "active")
    mounts = agent.layer_mounts()
    agent.end()
    database = agent.root / "agent.db"
    os.truncate(database, 3000)
    agent.start()
    assert "database_rebuilt" in agent.events()
    assert agent.layer_mounts() == mounts, "whoever runs keeps what it has"
    assert list(agent.root.glob("agent.db.corrupt-*"))
    agent.prepare("new", "", {})
