"""What a start finds: orphans, gaps, damage, a registry that is down."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from agent import reconcile
from agent.observer import Recorder
from agent.reconcile import Reconciler
from agent.snapshots import Kind
from agent.snapshotter import Snapshotter
from agent.store import Store
from imagefs import blockmap, errors
from tests.agent.lazy_node import BASE, LazyNode, Source
from tests.agent.lazy_node import node as node
from tests.fixtures import images, servers
from tests.imagefs import scripted

pytestmark = pytest.mark.root


def started(node: LazyNode, *, rebuilt: bool = False, wait_seconds: float = 20.0) -> Snapshotter:
    """What the daemon does with the parts before it listens."""
    snapshotter = Snapshotter(node.settings.root, node.store, node.images, node.observer)
    reconciler = Reconciler(
        node.store, node.images, node.mounts, snapshotter, node.devices, node.observer, wait_seconds
    )
    reconciler.restore(rebuilt=rebuilt)
    node.reconciler = reconciler
    return snapshotter


def lazy_chain(node: LazyNode, snapshotter: Snapshotter, source: Source, key: str) -> None:
    """The snapshots of an image, and an active one on it."""
    parent = ""
    for chain_id in source.chain_ids:
        labels = {**source.labels, "containerd.io/snapshot.ref": chain_id}
        with pytest.raises(errors.ImagefsError):
            snapshotter.prepare(f"extract {chain_id}", parent, labels)
        parent = chain_id
    snapshotter.prepare(key, parent, {})


def test_a_restart_mounts_nothing_anew(node: LazyNode) -> None:
    lazy_chain(node, started(node), node.push([BASE, images.tar_of([("a", b"a")])]), "active")
    before = {path: path.stat().st_dev for path in node.mounted()}
    assert len(before) == 2
    requests = len(node.proxy.requests)
    node.store.close()
    node.start()
    snapshotter = started(node)
    assert {path: path.stat().st_dev for path in node.mounted()} == before
    assert node.all_alive
    assert len(node.proxy.requests) == requests
    assert len(snapshotter.mounts("active")) == 1


def test_what_active_snapshots_use_is_mounted_after_a_reboot_without_a_registry(node: LazyNode) -> None:
    snapshotter = started(node)
    used, unused = node.push([BASE]), node.push([images.tar_of([("b", b"b")])])
    lazy_chain(node, snapshotter, used, "active")
    lazy_chain(node, snapshotter, unused, "removed")
    snapshotter.remove("removed")
    node.reboot()
    node.proxy.close()
    snapshotter = started(node)
    assert len(node.mounted()) == 1
    (mount,) = snapshotter.mounts("active")
    assert str(node.mounted()[0]) in " ".join(mount.options)
    assert not [row for row in node.store.walk() if row.broken]


def test_one_that_cannot_be_mounted_is_quarantined_and_heals(node: LazyNode) -> None:
    snapshotter = started(node)
    good, bad = node.push([BASE]), node.push([images.tar_of([("b", b"b" * 5000)])])
    lazy_chain(node, snapshotter, good, "good")
    lazy_chain(node, snapshotter, bad, "bad")
    (row,) = [row for row in node.images.rows() if row.source_digest == bad.digest]
    (layer,) = row.layers
    (block,) = node.devices.coverage(f"image:{row.block_digest}").values()
    assert block.present_blocks == 1
    node.store.close()
    node.devices.stop()
    subprocess.run(["umount", "-l", *map(str, node.mounted())], check=True)
    _forget_blocks(node, layer.map_digest)
    fault = node.proxy.add(servers.Fault(path=f"/blobs/{layer.blob_digest}", status=503, times=None))
    node.start()
    snapshotter = started(node, wait_seconds=1.0)
    (broken,) = [row for row in node.store.walk() if row.broken]
    assert broken.name == bad.chain_ids[0]
    assert "quarantined" in node.kinds()
    assert snapshotter.mounts("good")
    with pytest.raises(errors.UnavailableError, match="quarantined"):
        snapshotter.mounts("bad")
    fault.times = 0
    _until_healed(node)
    assert snapshotter.mounts("bad")
    assert "healed" in node.kinds()


def test_orphans_are_cleaned(node: LazyNode) -> None:
    row = node.images.pull(node.push([BASE]).name)
    path = node.images.directory(row.block_digest, 0)
    node.store.close()
    for name in ("agent.db", "agent.db-wal", "agent.db-shm"):
        (node.settings.root / name).unlink(missing_ok=True)
    (node.settings.root / "snapshots").mkdir(exist_ok=True)
    for name in ("99", "new-abc", "removed-7"):
        (node.settings.root / "snapshots" / name / "fs").mkdir(parents=True)
    (node.settings.root / "maps" / ".half-written").write_bytes(b"x")
    node.start()
    started(node)
    assert not node.mounted()
    assert not node.owners()
    assert not path.exists()
    assert os.listdir(node.settings.root / "snapshots") == []
    assert os.listdir(node.settings.root / "maps") == []


def test_a_row_without_its_folder_is_quarantined_until_it_is_back(node: LazyNode) -> None:
    snapshotter = started(node)
    snapshotter.prepare("key", "", {})
    row = node.store.get("key")
    folder = snapshotter.folder(row.id)
    folder.rename(node.settings.root / "elsewhere")
    started(node)
    assert node.store.get("key").broken is not None
    snapshotter.prepare("other", "", {})
    (node.settings.root / "elsewhere").rename(folder)
    node.reconciler.heal()
    assert node.store.get("key").broken is None


# -- the database ------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[: len(data)] = b"\xa5" * len(data)
    path.write_bytes(data)


def test_a_damaged_database_is_moved_aside_and_its_copy_takes_over(tmp_path: Path) -> None:
    observer = Recorder()
    store, rebuilt = reconcile.open_store(tmp_path, observer)
    assert not rebuilt
    store.insert("kept", Kind.ACTIVE, "", {"a": "b"})
    reconcile.keep_copy(tmp_path)
    store.insert("lost", Kind.ACTIVE, "", {})
    store.close()
    damage(tmp_path / reconcile.DATABASE)
    store, rebuilt = reconcile.open_store(tmp_path, observer)
    assert rebuilt
    assert [row.name for row in store.walk()] == ["kept"]
    (event,) = [event for event in observer.events() if event.kind == "database_rebuilt"]
    assert event.level == "error"
    assert "1 snapshots" in event.message
    assert len(list(tmp_path.glob("agent.db.corrupt-*"))) >= 1
    store.insert("new", Kind.ACTIVE, "", {})
    store.close()


def test_without_a_copy_it_starts_empty_and_says_so(tmp_path: Path) -> None:
    observer = Recorder()
    (tmp_path / reconcile.DATABASE).write_bytes(b"not a database" * 1000)
    store, rebuilt = reconcile.open_store(tmp_path, observer)
    assert rebuilt
    assert store.walk() == []
    assert "starts empty" in observer.events()[-1].message
    store.close()


def test_a_copy_that_is_damaged_too_is_not_used(tmp_path: Path) -> None:
    Store.open(tmp_path / reconcile.DATABASE).close()
    reconcile.keep_copy(tmp_path)
    for name in ("agent.db", "agent.db.copy"):
        (tmp_path / name).write_bytes(b"x" * 5000)
    store, _ = reconcile.open_store(tmp_path, Recorder())
    assert store.walk() == []
    store.close()


def test_the_copy_is_made_when_something_changed(tmp_path: Path) -> None:
    store, _ = reconcile.open_store(tmp_path, Recorder())
    store.insert("one", Kind.ACTIVE, "", {})
    reconcile.keep_copy(tmp_path)
    first = (tmp_path / "agent.db.copy").stat().st_ino
    reconcile.keep_copy(tmp_path)
    assert (tmp_path / "agent.db.copy").stat().st_ino == first
    store.insert("two", Kind.ACTIVE, "", {})
    reconcile.keep_copy(tmp_path)
    copy = Store.open(tmp_path / "agent.db.copy")
    assert [row.name for row in copy.walk()] == ["one", "two"]
    copy.close()
    store.close()


def test_with_a_rebuilt_database_nothing_is_taken_from_who_may_run(node: LazyNode) -> None:
    snapshotter = started(node)
    lazy_chain(node, snapshotter, node.push([BASE]), "active")
    owners, mounted = node.owners(), node.mounted()
    node.store.close()
    (node.settings.root / "agent.db").write_bytes(b"x" * 5000)
    for name in ("agent.db-wal", "agent.db-shm"):
        (node.settings.root / name).unlink(missing_ok=True)
    reconcile.open_store(node.settings.root, node.observer)[0].close()
    node.start()
    started(node, rebuilt=True)
    assert (node.owners(), node.mounted()) == (owners, mounted)
    assert os.listdir(node.settings.root / "snapshots")


def _forget_blocks(node: LazyNode, map_digest: str) -> None:
    data = (node.settings.root / "maps" / map_digest[7:]).read_bytes()
    for block in blockmap.decode(data).blocks:
        name = block.digest.hex()
        (node.settings.cache.directory / "blocks" / name[:2] / name).unlink(missing_ok=True)


def _until_healed(node: LazyNode) -> None:
    until = time.monotonic() + 30
    while any(row.broken for row in node.store.walk()):
        assert time.monotonic() < until
        node.reconciler.heal()
        time.sleep(0.1)


def test_an_image_that_hangs_is_tried_by_one_thread(node: LazyNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """`heal` comes every few seconds: in a night without a registry it would start thousands."""
    snapshotter = started(node)
    lazy_chain(node, snapshotter, node.push([BASE]), "active")
    (row,) = [row for row in node.store.walk() if row.image is not None]
    node.reconciler._quarantine(row, "for the test")
    gate, calls = threading.Event(), []
    directory = node.images.directory

    def hang(block_digest: str, layer: int) -> Path:
        calls.append(layer)
        gate.wait()
        return directory(block_digest, layer)

    monkeypatch.setattr(node.images, "directory", hang)
    try:
        for _ in range(20):
            node.reconciler.heal()
        assert len(calls) <= 1
    finally:
        gate.set()
    scripted.eventually(lambda: node.store.by_id(row.id).broken is None)
    node.reconciler._quarantine(row, "once more")
    node.reconciler.heal()
    scripted.eventually(lambda: node.store.by_id(row.id).broken is None)
    assert len(calls) == 2
