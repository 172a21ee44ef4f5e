"""Prefetch, pins and warmth on a node of the test's own: the registry is real, and is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import api, config, fill, warm
from agent.client import AgentClient
from imagefs import errors
from tests.agent.lazy_node import LazyNode
from tests.agent.lazy_node import node as node
from tests.fixtures import block_images, images, servers
from tests.fixtures.node import Agent
from tests.imagefs.scripted import eventually

pytestmark = pytest.mark.root

DATA = random.Random(1).randbytes(2_000_000)
LAYERS = [
    images.tar_of([("lib", None), ("lib/big.so", DATA)]),
    images.tar_of([("etc", None), ("etc/conf", b"x" * 9000)]),
]
DEAD = servers.Fault(times=None, status=503)


def parts(node: LazyNode, settings: config.Fill | None = None) -> tuple[warm.Warm, fill.Fills]:
    fills = fill.Fills(settings or config.Fill(), node.images, node.store, node.devices, node.observer)
    return warm.Warm(node.images, node.store, node.devices, fills, node.observer), fills


def read(node: LazyNode, block_digest: str) -> bytes:
    return (node.images.directory(block_digest, 0) / "lib/big.so").read_bytes()


def test_a_prefetched_image_starts_without_a_request(node: LazyNode) -> None:
    source = node.push(LAYERS)
    warmer, _ = parts(node)
    found = warmer.prefetch(source.name)
    assert found.prefetched
    eventually(lambda: warmer.is_warm(source.name).copy == "complete")
    known = warmer.is_warm(source.digest)
    assert known.complete
    assert known.present_bytes == known.total_bytes >= len(DATA)
    assert known.to_json()["fraction"] == 1.0
    node.proxy.clear()
    node.proxy.add(DEAD)
    for number, chain_id in enumerate(source.chain_ids):
        layer = node.images.find_layer(chain_id, source.labels)
        assert layer is not None
        assert (layer.block_digest, layer.layer) == (found.block_digest, number)
    assert read(node, found.block_digest) == DATA
    assert node.proxy.seen() == []


def test_pins_and_prefetched_images_survive_a_reboot_without_the_registry(node: LazyNode) -> None:
    source = node.push(LAYERS)
    warmer, _ = parts(node)
    digest = warmer.prefetch(source.name).block_digest
    eventually(lambda: warmer.is_warm(digest).copy == "complete")
    assert warmer.pin(source.name).pinned
    node.proxy.add(DEAD)
    node.reboot()
    warmer, fills = parts(node)
    fills.tick()
    eventually(lambda: warmer.is_warm(source.name).copy == "complete")
    again = warmer.is_warm(source.name)
    assert (again.pinned, again.prefetched, again.complete) == (True, True, True)
    assert warmer.cache()["kept"][0]["image"] == source.name
    assert read(node, digest) == DATA


def test_an_image_is_let_go_by_unpin(node: LazyNode) -> None:
    source = node.push(LAYERS)
    warmer, fills = parts(node)
    digest = warmer.prefetch(source.name).block_digest
    warmer.pin(digest)
    node.clock.now += 1000
    node.images.sweep()
    assert warmer.is_warm(digest).pinned
    warmer.unpin(source.name)
    assert node.store.image(digest) is None
    assert node.owners() == set()
    pins = (node.settings.cache.directory / "pins").iterdir()
    assert [path.name for path in pins if not path.name.startswith(".")] == []
    with pytest.raises(errors.NotFoundError, match="not on this node"):
        warmer.is_warm(source.name)
    with pytest.raises(errors.NotFoundError):
        warmer.unpin(source.name)
    fills.tick()
    assert node.devices.fills()["copies"] == []


def test_a_pin_fetches_nothing_but_holds_what_comes(node: LazyNode) -> None:
    source = node.push(LAYERS)
    warmer, _ = parts(node)
    found = warmer.pin(source.name)
    assert not found.complete
    assert found.copy is None
    assert read(node, found.block_digest) == DATA
    eventually(lambda: warmer.is_warm(source.name).present_bytes > len(DATA))


def test_what_cannot_be_prefetched_says_why(node: LazyNode) -> None:
    plain = node.push(LAYERS, converted=False)
    warmer, _ = parts(node)
    with pytest.raises(errors.NotFoundError, match="no block image"):
        warmer.prefetch(plain.name)
    with pytest.raises(errors.InvalidInputError):
        warmer.prefetch("no name at all!")
    assert node.store.images() == []


def test_over_http(node: LazyNode, tmp_path: Path) -> None:
    source = node.push(LAYERS)
    warmer, _ = parts(node)
    served = api.Api(tmp_path / "agent.sock", "127.0.0.1:0")
    warmer.register(served)
    served.start()
    try:
        client = AgentClient(tmp_path / "agent.sock")
        assert client.post("/api/v1/prefetch", {"image": source.name})["prefetched"]
        eventually(lambda: client.get("/api/v1/warm", {"image": source.name})["complete"])
        (listed,) = client.get("/api/v1/warm")["images"]
        assert listed["fraction"] == 1.0
        assert client.post("/api/v1/pin", {"image": source.name})["pinned"]
        assert client.get("/api/v1/cache")["cache"]["blocks"] > 0
        assert client.post("/api/v1/cache/gc")["removed_blocks"] == 0
        node.clock.now += 1000  # past the hold that follows a pull
        assert client.post("/api/v1/unpin", {"image": source.name}) == {}
        with pytest.raises(errors.NotFoundError):
            client.get("/api/v1/warm", {"image": source.name})
        with pytest.raises(errors.InvalidInputError):
            client.post("/api/v1/pin", {})
    finally:
        served.stop()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path, tmp_path / "hosts")
    made.start()
    yield made
    made.stop()
    for point in reversed(made.mounted()):
        subprocess.run(["umount", "-l", point], check=False)
    from imagefs.fuse import control

    client = control.DeviceClient.connect(made.state)
    if client is not None:
        client.stop()


def test_by_the_command(
    agent: Agent, registry: servers.RegistryServer, tmp_path: Path, node: LazyNode
) -> None:
    """`glowplug prefetch --wait --pin`, `cache ls`, `cache unpin`, with a real agent."""
    source = node.push(LAYERS)
    name = source.name.replace(node.proxy.host, registry.host)
    run = _command(agent)
    warmth = json.loads(run("prefetch", f"docker://{name}", "--wait", "--pin", "--json"))
    assert warmth["complete"]
    assert warmth["copy"] == "complete"
    listing = json.loads(run("cache", "ls", "--json"))
    assert listing["directory"] == str(agent.cache)
    (image,) = listing["images"]
    assert (image["pinned"], image["prefetched"], image["fraction"]) == (True, True, 1.0)
    assert f"image:{warmth['block_digest']}" in {pin["name"] for pin in listing["pins"]}
    assert "100 %" in run("cache", "ls")
    agent.stop()
    agent.start()
    assert json.loads(run("prefetch", f"docker://{name}", "--json"))["complete"]
    run("cache", "unpin", f"image:{warmth['block_digest']}")
    assert json.loads(run("cache", "ls", "--json"))["pins"] == []


def _command(agent: Agent) -> Callable[..., str]:
    environment = {**os.environ, "GLOWPLUG_STATE": str(agent.state)}
    with contextlib.suppress(KeyError):
        del environment["GLOWPLUG_CACHE"]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [block_images.GLOWPLUG, *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return done.stdout

    return run
