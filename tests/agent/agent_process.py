"""The agent as a process of its own, as its unit would start it; asked over gRPC, as containerd does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent import client, lookup
from agent.proto import mount_pb2
from agent.proto import snapshots_pb2 as messages
from imagefs import reference
from imagefs.fuse.control import DeviceClient
from imagefs.origin import connect
from tests.agent.lazy_node import BASE, Source
from tests.fixtures import block_images, images, servers

_START_SECONDS = 30.0
_CALL_SECONDS = 30.0
_SERVICE = "/containerd.services.snapshots.v1.Snapshots/"


class Agent:
    """`glowplug agent run` in a folder of its own. `environment` is added to ours."""

    def __init__(self, folder: Path, *, deadline_seconds: float = 5, extra: str = "") -> None:
        self.folder = folder
        self.root, self.state, self.cache = folder / "root", folder / "state", folder / "cache"
        self.socket = self.state / "snapshotter.sock"
        self.config = folder / "agent.toml"
        self.config.write_text(
            f'root = "{self.root}"\nstate = "{self.state}"\nsocket = "{self.socket}"\n'
            f'[cache]\ndirectory = "{self.cache}"\nfree_floor_percent = 0\n'
            f"[reads]\ndeadline_seconds = {deadline_seconds}\nworkers = 2\n"
            f'[http]\nlisten = "127.0.0.1:0"\n{extra}'
        )
        self.environment: dict[str, str] = {}
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.launch()
        self.wait()

    def launch(self) -> None:
        self.socket.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [block_images.GLOWPLUG, "agent", "run", "--config", self.config],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )

    def wait(self) -> None:
        """Until it serves."""
        assert self.process is not None
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

    def clean_up(self) -> None:
        """Whatever a test left."""
        if self.process is not None:
            self.end()
        for place in reversed(self.layer_mounts()):
            subprocess.run(["umount", "-l", place.split()[1]], check=False)
        devices = DeviceClient.connect(self.state)
        if devices is not None:
            devices.stop()

    # -- as containerd asks --------------------------------------------------------------------------------

    def call(self, method: str, request: Any, response: Any) -> Any:
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            call = channel.unary_unary(
                _SERVICE + method,
                request_serializer=type(request).SerializeToString,
                response_deserializer=response.FromString,
            )
            return call(request, timeout=_CALL_SECONDS)

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> messages.PrepareSnapshotResponse:
        request = messages.PrepareSnapshotRequest(key=key, parent=parent, labels=labels)
        made: messages.PrepareSnapshotResponse = self.call(
            "Prepare", request, messages.PrepareSnapshotResponse
        )
        return made

    def prepare_layers(self, source: Source) -> None:
        """Every layer, as containerd's unpacker asks for it; each must be lazy."""
        parent = ""
        for chain_id in source.chain_ids:
            with pytest.raises(grpc.RpcError) as refusal:
                self.prepare(
                    f"extract {chain_id}", parent, {**source.labels, "containerd.io/snapshot.ref": chain_id}
                )
            assert refusal.value.code() is grpc.StatusCode.ALREADY_EXISTS
            parent = chain_id

    def prepare_image(self, source: Source, key: str) -> Sequence[mount_pb2.Mount]:
        """Every layer, and an active snapshot on top; its mounts."""
        self.prepare_layers(source)
        return self.prepare(key, source.chain_ids[-1], {}).mounts

    # -- what is there -------------------------------------------------------------------------------------

    @property
    def api(self) -> client.AgentClient:
        return client.AgentClient(self.state / "agent.sock")

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
    """One that runs."""
    made = Agent(tmp_path)
    made.start()
    yield made
    made.clean_up()


@pytest.fixture
def source(registry: servers.RegistryServer) -> Source:
    """An image of two layers with its block image."""
    return push(registry, [BASE, images.tar_of([("top", b"t" * 100_000)])])


def push(
    registry: servers.RegistryServer,
    tars: Sequence[bytes],
    *,
    by_way_of: str | None = None,
    converted: bool = True,
) -> Source:
    """An image, with its block image of small blocks; named as it is reached at `by_way_of`, HOST:PORT."""
    repository = servers.unique_name("daemon")
    direct = f"docker://{registry.host}/{repository}:v1"
    image = images.make(tars)
    origin = connect.connect(reference.parse(direct), connect.Options())
    image.push(origin, "v1")
    origin.close()
    if converted:
        block_images.convert(direct, block_bytes=65536)
    name = f"{by_way_of or registry.host}/{repository}:v1"
    return Source(name, image.top, lookup.chain_ids([images.digest(tar) for tar in tars]))
