"""A node's life: agent, device server, containerd and the machine die and come back; containers read on."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator

import grpc
import pytest

from glowplug.startup import machine
from tests.fixtures import node, pause

pytestmark = pytest.mark.root

_LAZY, _OTHER = 301, 302
_HASH = (
    "sh",
    "-c",
    "while [ ! -e /stop ]; do /check >/out 2>&1 || cat /out >>/bad; echo round >>/rounds; done; sleep 3600",
)


_OLDEST_AND_NEWEST = pytest.mark.parametrize("on_node", ["1.6", "2.1"], indirect=True)


@pytest.fixture
def on_node(request: pytest.FixtureRequest, node_registry: node.Registry) -> Iterator[node.Node]:
    """A node that the test may wreck; of the newest line, unless the test says which."""
    with node.run(getattr(request, "param", "2.1"), node_registry) as running:
        yield running


class _Hashing:
    """Containers that hash all their files, again and again, from an image that is cold at first."""

    def __init__(self, on_node: node.Node, containers: int, file_bytes: int = 300_000) -> None:
        self._node = on_node
        image = on_node.registry.push(pause.heavy(24, file_bytes, _LAZY), convert=True)
        on_node.cri.pull_image(image)
        assert on_node.registry.layers_fetched(image) == []
        pods = [on_node.cri.run_pod() for _ in range(containers)]
        self._containers = [on_node.cri.start_container(pod, image, _HASH) for pod in pods]

    def finish(self) -> None:
        """Stop them, and look for errors and wrong hashes."""
        for container in self._containers:
            self._rounds(container, 1)
            said = self._node.cri.exec_sync(container, ["sh", "-c", "touch /stop; cat /bad"])
            assert said.stdout == b"", said.stdout[-2000:].decode()
            assert b"No such file" in said.stderr

    def another_round(self) -> None:
        """Wait until each container has read everything from its beginning to its end once more."""
        for container in self._containers:
            self._rounds(container, self._rounds(container, 0) + 2)

    def _rounds(self, container: str, at_least: int) -> int:
        until = time.monotonic() + 60
        while True:
            rounds = len(self._node.cri.exec_sync(container, ["cat", "/rounds"]).stdout.split())
            if rounds >= at_least:
                return rounds
            assert time.monotonic() < until, f"{rounds} rounds, not {at_least}"
            time.sleep(0.1)


def _kill_something(on_node: node.Node, chance: random.Random) -> str:
    kind = chance.choice(["agent", "server", "worker", "worker", "keeper"])
    if kind == "agent":
        on_node.agent.stop(signal.SIGKILL)
        on_node.agent.start()  # as systemd would
    else:
        while not (pids := on_node.agent.processes()[kind]):
            time.sleep(0.01)  # the one killed before is not replaced yet
        replaced = on_node.agent.replaced()
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(pids), signal.SIGKILL)
        # Keeper and device server hold the mount for each other: either may die, not both at once.
        while kind in ("keeper", "server") and on_node.agent.replaced() == replaced:
            time.sleep(0.01)
    return kind


def _kill_while_hashing(on_node: node.Node, containers: int, kills: int) -> None:
    chance = random.Random(7)
    hashing = _Hashing(on_node, containers)
    for _ in range(kills):
        _kill_something(on_node, chance)
        time.sleep(chance.random() * 0.5)
        machine.drop_page_cache()  # so that the next reads are ours to answer
    hashing.another_round()
    hashing.finish()


@_OLDEST_AND_NEWEST
def test_kills_at_random_moments_are_not_seen_by_containers(on_node: node.Node) -> None:
    _kill_while_hashing(on_node, containers=3, kills=8)


@pytest.mark.soak
def test_a_hundred_kills_are_not_seen_by_twenty_containers(on_node: node.Node) -> None:
    _kill_while_hashing(on_node, containers=20, kills=100)


def test_an_agent_that_is_gone_is_not_missed_by_containers(on_node: node.Node) -> None:
    hashing = _Hashing(on_node, containers=2)
    on_node.agent.stop(signal.SIGKILL)
    machine.drop_page_cache()
    hashing.another_round()
    on_node.agent.start()
    image = on_node.registry.push(pause.application(_LAZY), convert=True)
    _pull(on_node, image)
    assert on_node.registry.layers_fetched(image) == []
    hashing.finish()


def _pull(on_node: node.Node, image: str) -> None:
    """As kubelet does, again: containerd looks for a snapshotter that was gone every few seconds only."""
    until = time.monotonic() + 15
    while True:
        try:
            on_node.cri.pull_image(image)
            return
        except grpc.RpcError as exc:
            if exc.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
                raise
        time.sleep(0.5)


@_OLDEST_AND_NEWEST
def test_containerd_comes_back_to_its_containers(on_node: node.Node) -> None:
    hashing = _Hashing(on_node, containers=1)
    on_node.containerd.stop(signal.SIGKILL)
    machine.drop_page_cache()
    on_node.containerd.start()
    hashing.another_round()
    hashing.finish()
    on_node.clear()
    on_node.wait_until_clean()


def test_two_hundred_snapshots_are_the_same_after_a_restart(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_LAZY), convert=True)
    on_node.cri.pull_image(image)
    on_node.containerd.stop()  # which would collect snapshots that it did not make
    before = node.prepare_snapshots(on_node.agent, 200)
    assert len({str(mounts) for mounts in before.values()}) == 200
    on_node.agent.stop(signal.SIGKILL)
    on_node.agent.start()
    assert node.mounts(on_node.agent, list(before)) == before
    on_node.containerd.start()


def _reboot(on_node: node.Node) -> None:
    """What is left of us after a reboot: nothing that runs, is mounted, or lies below /run."""
    daemon, agent = on_node.containerd, on_node.agent
    daemon.stop(signal.SIGKILL)
    daemon.kill_containers()
    agent.stop(signal.SIGKILL)
    agent.kill_devices()
    machine.unmount_below(agent.root.parent)
    for directory in (agent.state, daemon.folder / "state"):
        shutil.rmtree(directory)
    agent.state.mkdir(mode=0o700)
    machine.drop_page_cache()
    agent.start()
    daemon.start()


def test_after_a_reboot_containers_start_though_the_registry_is_down(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_LAZY), convert=True)
    on_node.cri.pull_image(image)
    read_everything = ["sh", "-c", "cat /data/large /data/larger /data/seed | sha256sum"]
    with on_node.cri.running(image, pause.FOREVER) as container:
        expected = on_node.cri.exec_sync(container, read_everything)
        assert expected.exit_code == 0
    with on_node.registry.down():
        _reboot(on_node)
        with on_node.cri.running(image, pause.FOREVER) as container:
            assert on_node.cri.exec_sync(container, read_everything) == expected


def test_one_image_that_cannot_come_back_keeps_no_other_from_it(on_node: node.Node) -> None:
    lost, kept = (on_node.registry.push(pause.application(seed), convert=True) for seed in (_OTHER, _LAZY))
    on_node.cri.pull_image(lost)
    maps_of_lost = set((on_node.agent.root / "maps").iterdir())
    on_node.cri.pull_image(kept)
    read = ["cat", "/etc/passwd"]
    with on_node.cri.running(kept, pause.FOREVER) as container:
        assert on_node.cri.exec_sync(container, read).exit_code == 0
    for path in maps_of_lost:
        path.unlink()
    with on_node.registry.down():
        _reboot(on_node)
        with on_node.cri.running(kept, pause.FOREVER) as container:
            assert on_node.cri.exec_sync(container, read).exit_code == 0
        pod = on_node.cri.run_pod()
        with pytest.raises(grpc.RpcError):
            on_node.cri.start_container(pod, lost, pause.FOREVER)
        on_node.cri.remove_pod(pod.id)
        on_node.cri.remove_image(lost)
