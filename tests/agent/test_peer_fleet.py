"""Eight agents on one machine, each with a cache of its own, start one image at once: how much leaves the
origin, and that every byte is right. The commands and daemons are the real ones, in network namespaces."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator

import pytest

from e2e import fleet
from glowplug.startup import lazy, machine
from imagefs.fuse import control
from tests.fixtures import block_images, images

pytestmark = pytest.mark.root

NODES = 8
MOST = 1.3
"""The origin's bytes for all nodes, of those for one."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fleet.Fleet]:
    """The fleet, two images in its registry, no agent yet."""
    folder = tmp_path_factory.mktemp("fleet")
    try:
        with fleet.open_fleet(NODES, folder) as made:
            for name, seed in (("all-at-once", 1), ("through-deaths", 2)):
                content = random.Random(seed)
                tar = images.tar_of([(f"data/{n:02}", content.randbytes(1 << 20)) for n in range(12)])
                ref = block_images.make(folder / name, [tar])
                copy = [str(lazy.COMMAND), "copy", "--plain-http", ref, f"docker://{made.registry}/{name}:1"]
                machine.check_call(made.origin.command(copy))
            yield made
    finally:
        machine.unmount_below(folder)


def expected(seed: int) -> str:
    content = random.Random(seed)
    return hashlib.sha256(b"".join(content.randbytes(1 << 20) for _ in range(12))).hexdigest()


def fetch_status(node: fleet.Node) -> dict[str, int]:
    client = control.DeviceClient.connect(node.folder / "state")
    assert client is not None
    counters: dict[str, int] = client.status()["fetch"]
    return counters


def test_eight_nodes_cost_the_origin_what_one_does(cluster: fleet.Fleet) -> None:
    alone, *_ = cluster.nodes
    before = cluster.origin_sent_bytes()
    with fleet.reading([alone], "all-at-once", cluster) as readers:
        assert fleet.hashes(readers) == [expected(1)]
    one_bytes = cluster.origin_sent_bytes() - before
    assert one_bytes > 12 << 20
    fleet.forget(alone)
    with cluster.agents(cluster.nodes):
        before = cluster.origin_sent_bytes()
        with fleet.reading(cluster.nodes, "all-at-once", cluster) as readers:
            assert fleet.hashes(readers) == [expected(1)] * NODES
            all_bytes = cluster.origin_sent_bytes() - before
            counters = [fetch_status(node) for node in cluster.nodes]
    assert all_bytes <= MOST * one_bytes, f"{all_bytes / one_bytes:.2f} times what one node needs"
    assert all(counter["peer_blocks"] > 0 and counter["served_blocks"] > 0 for counter in counters)
    assert not any(counter["corrupt_blocks"] for counter in counters)


def test_agents_that_die_under_it_cost_no_byte(cluster: fleet.Fleet) -> None:
    nodes = cluster.nodes[:4]
    for node in nodes:
        fleet.forget(node)
    with cluster.agents(nodes) as agents:
        with fleet.reading(nodes, "through-deaths", cluster) as readers:
            for agent in agents[:2]:
                os.kill(agent.pid, signal.SIGKILL)
            assert fleet.hashes(readers) == [expected(2)] * len(nodes)
