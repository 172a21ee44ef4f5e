"""Lazy snapshots: which Prepare becomes one, what cannot be mounted, quarantine."""

import os
import threading
from pathlib import Path

import pytest

from agent import errors as agent_errors
from agent import snapshots
from agent.snapshots import Kind, Usage
from imagefs import errors, mount
from tests.agent.snapshot_node import Node
from tests.agent.snapshot_node import node as node


def test_a_lazy_prepare(node: Node, tmp_path: Path) -> None:
    (tmp_path / "content").mkdir()
    node.images.offer("sha256:1", tmp_path / "content", mount.RootAttributes())
    labels = {snapshots.REF_LABEL: "sha256:1", "containerd.io/snapshot/cri.image-ref": "r/i:1"}
    with pytest.raises(agent_errors.AlreadyExistsError, match="sha256:1"):
        node.snapshotter.prepare("k8s.io/1/extract", "", labels)
    # As containerd looks for it.
    (found,) = node.snapshotter.walk(['labels."containerd.io/snapshot.ref"==sha256:1,parent==""'])
    assert (found.name, found.kind, found.parent, found.labels) == ("sha256:1", Kind.COMMITTED, "", labels)
    with pytest.raises(errors.NotFoundError):
        node.snapshotter.stat("k8s.io/1/extract")
    assert node.snapshotter.usage("sha256:1") == Usage(7, 4096 * 7)
    assert node.images.mounted == {}, "mounted at first use"
    with pytest.raises(agent_errors.AlreadyExistsError):
        node.snapshotter.prepare("other/2/extract", "", labels)
    assert node.images.calls == ["find sha256:1"], "the second time, nobody asks"
    with pytest.raises(agent_errors.FailedPreconditionError, match="committed"):
        node.snapshotter.mounts("sha256:1")
    node.snapshotter.remove("sha256:1")
    assert node.images.calls[-1] == "released image-sha256:1"
    assert node.rows.images() == []
    assert os.listdir(node.root / "snapshots") == []


def test_one_layer_on_two_parents(node: Node, tmp_path: Path) -> None:
    """A chain id has one parent, but two snapshots of that parent may exist: one unpacked by a namespace,
    one lazy. containerd insists on the parent that it asked with."""
    (tmp_path / "content").mkdir()
    node.images.offer("sha256:2", tmp_path / "content", mount.RootAttributes())
    for parent in ("a/1/sha256:1", "b/1/sha256:1"):
        node.snapshotter.prepare(f"{parent}-active", "", {})
        node.snapshotter.commit(parent, f"{parent}-active", {})
        node.lazy("sha256:2", parent)
        node.lazy("sha256:2", parent)
        (found,) = node.snapshotter.walk([f'labels."{snapshots.REF_LABEL}"==sha256:2,parent=="{parent}"'])
        assert found.parent == parent
    assert node.rows.references("image-sha256:2") == 2


def test_no_block_image_is_an_ordinary_snapshot(node: Node) -> None:
    labels = {snapshots.REF_LABEL: "sha256:1"}
    (made,) = node.snapshotter.prepare("k", "", labels)
    assert made.type == "bind"
    assert node.snapshotter.stat("k").labels == labels
    node.snapshotter.commit("c", "k", labels)
    (again,) = node.snapshotter.prepare("k2", "", labels)
    assert again.type == "bind", "what one namespace unpacked is not given to another"


def test_a_lazy_prepare_on_a_missing_parent(node: Node, tmp_path: Path) -> None:
    (tmp_path / "content").mkdir()
    node.images.offer("sha256:2", tmp_path / "content", None)
    with pytest.raises(errors.NotFoundError, match="nobody"):
        node.snapshotter.prepare("k", "nobody", {snapshots.REF_LABEL: "sha256:2"})


def test_a_layer_that_cannot_be_mounted(node: Node, tmp_path: Path) -> None:
    """The Prepare of a container fails, and leaves nothing that would take its key."""
    (tmp_path / "content").mkdir()
    node.images.offer("sha256:1", tmp_path / "content", mount.RootAttributes())
    node.lazy("sha256:1", "")
    node.images.unavailable = True
    for make in (node.snapshotter.prepare, node.snapshotter.view):
        with pytest.raises(errors.UnavailableError, match="registry is down"):
            make("k", "sha256:1", {})
    assert [info.name for info in node.snapshotter.walk()] == ["sha256:1"]
    node.snapshotter.remove("sha256:1")


def test_quarantine(node: Node, tmp_path: Path) -> None:
    """What is broken says so, and can be removed; its layer's being found again mends it."""
    (tmp_path / "content").mkdir()
    node.images.offer("sha256:1", tmp_path / "content", mount.RootAttributes())
    node.lazy("sha256:1", "")
    node.rows.insert("running", Kind.ACTIVE, "sha256:1", {})
    node.rows.set_broken(node.rows.get("sha256:1").id, "its block map is gone")

    def refused() -> None:
        for call in (
            lambda: node.snapshotter.mounts("running"),
            lambda: node.snapshotter.view("v", "sha256:1", {}),
        ):
            with pytest.raises(errors.UnavailableError, match="quarantined: its block map is gone"):
                call()

    refused()
    assert node.snapshotter.stat("sha256:1").name == "sha256:1"
    offered = node.images.files.pop("sha256:1")
    (ordinary,) = node.snapshotter.prepare("unpack", "", {snapshots.REF_LABEL: "sha256:1"})
    assert ordinary.type == "bind"
    refused()
    node.images.files["sha256:1"] = offered
    node.lazy("sha256:1", "")
    assert {info.name for info in node.snapshotter.walk()} == {"sha256:1", "running", "unpack"}
    assert node.rows.get("sha256:1").broken is None
    assert node.events.kinds == ["healed"]
    for name in ("running", "unpack", "sha256:1"):
        node.snapshotter.remove(name)


def test_a_quarantined_layer_found_in_another_image(node: Node, tmp_path: Path) -> None:
    (tmp_path / "content").mkdir()
    node.images.offer("sha256:1", tmp_path / "content", mount.RootAttributes())
    node.images.offer("other", tmp_path / "content", mount.RootAttributes())
    node.lazy("sha256:1", "")
    node.rows.set_broken(node.rows.get("sha256:1").id, "its registry is gone")
    find = node.images.find_layer
    node.images.find_layer = lambda chain_id, labels: find("other", labels)  # type: ignore[method-assign]
    node.lazy("sha256:1", "")
    row = node.rows.get("sha256:1")
    assert (row.image, row.broken) == ("image-other", None)
    assert [image.block_digest for image in node.rows.images()] == ["image-other"], "the first was released"


def test_a_layer_that_must_not_stand_for_another_repositorys_is_unpacked(node: Node, tmp_path: Path) -> None:
    (tmp_path / "content").mkdir()
    node.images.offer("sha256:1", tmp_path / "content", mount.RootAttributes())
    node.lazy("sha256:1", "")
    node.images.may_serve = lambda block_digest, labels: False  # type: ignore[method-assign]
    labels = {snapshots.REF_LABEL: "sha256:1"}
    assert node.snapshotter.prepare("extract", "", labels), "containerd unpacks it itself"
    assert [info.name for info in node.snapshotter.walk()] == ["sha256:1", "extract"]


def test_many_prepares_of_one_layer_at_once(node: Node, tmp_path: Path) -> None:
    (tmp_path / "content").mkdir()
    node.images.offer("sha256:1", tmp_path / "content", mount.RootAttributes())
    answers: list[str] = []

    def ask(number: int) -> None:
        try:
            node.snapshotter.prepare(f"k{number}", "", {snapshots.REF_LABEL: "sha256:1"})
            answers.append("prepared")
        except agent_errors.AlreadyExistsError:
            answers.append("exists")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["exists"] * 16
    assert [info.name for info in node.snapshotter.walk()] == ["sha256:1"]
