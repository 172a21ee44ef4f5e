"""What thousands of pulls and removes leave behind: nothing, in the agent, the device server, the kernel."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

import pytest

from agent import errors as agent_errors
from agent.snapshotter import Snapshotter
from imagefs.fuse import statedirectory
from tests.agent.lazy_node import BASE, LazyNode, Source
from tests.agent.lazy_node import node as node
from tests.fixtures import images
from tests.imagefs import scripted

pytestmark = pytest.mark.root

Census = dict[str, int]


def one_life(node: LazyNode, snapshotter: Snapshotter, source: Source) -> None:
    """Pulled, started twice, stopped, removed."""
    parent = ""
    for chain_id in source.chain_ids:
        labels = {**source.labels, "containerd.io/snapshot.ref": chain_id}
        with contextlib.suppress(agent_errors.AlreadyExistsError):
            snapshotter.prepare(f"extract {chain_id}", parent, labels)
        parent = chain_id
    for key in ("one", "other"):
        snapshotter.prepare(key, parent, {})
        snapshotter.mounts(key)
        snapshotter.usage(key)
    for name in ("one", "other", *reversed(source.chain_ids)):
        snapshotter.usage(name)
        snapshotter.remove(name)
    snapshotter.cleanup()
    node.clock.now += 1000
    node.images.sweep()


def census(node: LazyNode) -> Census:
    """What there is of everything that could be left behind."""
    settings, server = node.settings, node.devices.status()["processes"]["server"]
    table = json.loads((settings.state / "devices.json").read_text())
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {
        "agent's descriptors": len(os.listdir("/proc/self/fd")),
        "agent's threads": threading.active_count(),
        "server's descriptors": len(os.listdir(f"/proc/{server}/fd")),
        "mounts": sum(str(settings.root) in line or str(settings.state) in line for line in lines),
        "rows of devices": len(table["devices"]),
        "packs": len(table["packs"]),
        "rows of snapshots": len(node.store.walk()),
        "rows of images": len(node.store.images()),
        "folders": sum(len(os.listdir(settings.root / each)) for each in ("snapshots", "maps")),
        "mount points": len([name for name in os.listdir(settings.root / "layers") if name.isdigit()]),
        "server's maps": len(os.listdir(settings.state / "maps")),
        "remembered": len(node.images._roots) + len(node.images._inodes) + len(node.images._coverage),
    }


def run(node: LazyNode, times: int) -> None:
    snapshotter = Snapshotter(node.settings.root, node.store, node.images, node.observer)
    extra = [images.tar_of([(f"file-{number}", os.urandom(3000))]) for number in range(3)]
    sources = [node.push([BASE, each]) for each in extra]
    for source in sources * 2:
        one_life(node, snapshotter, source)
    assert statedirectory.mounted(statedirectory.device_directory(node.settings.state))
    server = node.devices.status()["processes"]["server"]
    before, before_bytes = census(node), resident_bytes(server)
    for number in range(times):
        one_life(node, snapshotter, sources[number % len(sources)])
    more = {name: 4 if "descriptors" in name or "threads" in name else 0 for name in before}

    def as_before() -> bool:
        now = census(node)
        return all(now[name] <= before[name] + more[name] for name in before)

    try:
        scripted.eventually(as_before)
    except AssertionError:
        now = census(node)
        pytest.fail(f"left behind: { {name: (before[name], now[name]) for name in before} }")
    assert resident_bytes(server) - before_bytes < 16 << 20


def resident_bytes(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_pulls_and_removes_leave_nothing(node: LazyNode) -> None:
    run(node, 30)


@pytest.mark.soak
def test_thousands_of_pulls_and_removes_leave_nothing(node: LazyNode) -> None:
    run(node, 2000)
