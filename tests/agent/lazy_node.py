"""What the agent's tests of images, mounts and reconciling stand on: a device server of the test's own, a
store, and block images in a real registry that is seen through a proxy with faults."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agent import config, daemon, lookup
from agent.images import Images
from agent.mounts import LayerMounts
from agent.observer import Recorder
from agent.reconcile import Reconciler, attached
from agent.store import Store
from imagefs import reference
from imagefs.fuse.control import DeviceClient
from imagefs.origin import connect
from tests.fixtures import block_images, images, servers

BASE = images.tar_of([("etc", None), ("etc/motd", b"base\n"), ("data", b"d" * 200_000)])


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class Source:
    """An image in the registry. `name` is as containerd writes it."""

    name: str
    digest: str
    chain_ids: list[str]

    @property
    def labels(self) -> dict[str, str]:
        return {lookup.REFERENCE_LABEL: self.name, lookup.MANIFEST_LABEL: self.digest}


class LazyNode:
    """One node. `start` makes the parts anew, as an agent that starts; `reconciler` is a test's own."""

    reconciler: Reconciler

    def __init__(self, folder: Path, registry: servers.RegistryServer, **more: object) -> None:
        self.proxy = servers.FaultProxy(registry.host)
        self.registry = registry
        self.settings = config.Settings(
            root=folder / "root",
            state=folder / "state",
            cache=config.Cache(directory=folder / "cache", free_floor_percent=0),
            reads=config.Reads(deadline_seconds=3.0, workers=2),
            images=config.Images(**{"lookup_deadline_seconds": 20.0, **more}),  # type: ignore[arg-type]
        )
        self.settings.root.mkdir()
        self.clock = Clock()
        self.observer = Recorder()
        self.trust: lookup.Trust | None = None
        self.origins = connect.Options(connect_timeout_seconds=1.0, read_timeout_seconds=1.0)
        self.start()

    def start(self) -> None:
        """The parts, on whatever there is on the disk and in the kernel."""
        self.devices = DeviceClient.ensure(daemon.server_settings(self.settings, self.origins))
        self.store = Store.open(self.settings.root / "agent.db")
        self.mounts = LayerMounts(self.settings.root / "layers", self.settings.state)
        self.all_alive = self.mounts.open()
        self.images = Images(
            self.settings,
            self.store,
            self.devices,
            self.mounts,
            self.observer,
            self.origins,
            self.trust,
            self.clock,
        )
        self.images.reconcile(attached(self.devices))

    def reboot(self) -> None:
        """All that does not survive one: mounts, device server, what it had attached."""
        self.store.close()
        self.devices.stop()
        subprocess.run(["umount", "-l", *map(str, self.mounted())], check=False, capture_output=True)
        self.start()

    def push(
        self,
        tars: Sequence[bytes],
        *,
        converted: bool = True,
        block_bytes: int = 65536,
        repository: str | None = None,
    ) -> Source:
        """An image in the registry, with its block image beside it."""
        repository = repository or servers.unique_name("lazy")
        image = images.make(tars)
        direct = f"docker://{self.registry.host}/{repository}:v1"
        origin = connect.connect(reference.parse(direct), connect.Options())
        image.push(origin, "v1")
        origin.close()
        if converted:
            block_images.convert(direct, block_bytes=block_bytes)
        return Source(
            f"{self.proxy.host}/{repository}:v1",
            image.top,
            lookup.chain_ids([images.digest(tar) for tar in tars]),
        )

    def owners(self) -> set[str]:
        """Who has something attached to the device server."""
        return set(attached(self.devices))

    def mounted(self) -> list[Path]:
        """What is mounted below root/layers, in mount order."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        points = [Path(line.split()[4]) for line in lines]
        return [point for point in points if point.is_relative_to(self.settings.root / "layers")]

    def kinds(self) -> list[str]:
        """The events so far."""
        return [event.kind for event in self.observer.events()]

    def close(self) -> None:
        self.proxy.close()
        self.store.close()
        for point in reversed(self.mounted()):
            subprocess.run(["umount", "-l", point], check=False)
        client = DeviceClient.connect(self.settings.state)
        if client is not None:
            client.stop()


@pytest.fixture
def node(tmp_path: Path, registry: servers.RegistryServer) -> Iterator[LazyNode]:
    """A node whose lookups may take long; tests of deadlines make their own."""
    made = LazyNode(tmp_path, registry)
    yield made
    made.close()
