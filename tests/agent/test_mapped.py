"""Snapshots in user namespaces: whose files they are, without a copy."""

import contextlib
import os
from pathlib import Path

import pytest

from agent import snapshots
from imagefs import errors, holders, mount
from tests.agent.snapshot_node import Node, folder, own, write
from tests.agent.snapshot_node import node as node


def test_user_namespaces(node: Node) -> None:
    """The upper directory belongs to the mapped root; nothing else does, since its mount maps it."""
    labels = {snapshots.UID_MAPPING_LABEL: "0:100000:65536", snapshots.GID_MAPPING_LABEL: "0:200000:65536"}
    node.snapshotter.prepare("base-active", "", {})
    upper = node.snapshotter.folder(node.rows.get("base-active").id) / "fs"
    os.chown(upper, 3, 4)
    node.snapshotter.commit("base", "base-active", {})

    def owner(key: str) -> tuple[int, int]:
        status = (node.snapshotter.folder(node.rows.get(key).id) / "fs").stat()
        return status.st_uid, status.st_gid

    (made,) = node.snapshotter.prepare("pod", "base", labels)
    assert made.options[:2] == ("uidmap=0:100000:65536", "gidmap=0:200000:65536")
    assert owner("pod") == (100003, 200004)
    assert node.snapshotter.mounts("pod") == [made]
    (made,) = node.snapshotter.prepare("scratch", "", labels)
    assert (made.type, owner("scratch")) == ("bind", (0, 0))
    with pytest.raises(errors.InvalidInputError, match="gidmapping"):
        node.snapshotter.prepare("half", "base", {snapshots.UID_MAPPING_LABEL: "0:1:1"})
    assert {info.name for info in node.snapshotter.walk()} == {"base", "pod", "scratch"}


@pytest.mark.root
def test_a_lazy_layer_in_a_user_namespace(node: Node, tmp_path: Path) -> None:
    """With id-mapped lower directories and the mapped upper one, every file has its owner in the namespace,
    and nothing of the image was copied up for that."""
    content = tmp_path / "content"
    content.mkdir(mode=0o755)
    write("file", "x")(content)
    folder("theirs")(content)
    own("theirs", 33, 34)(content)
    node.images.offer("sha256:1", content, mount.RootAttributes())
    node.lazy("sha256:1", "")
    node.local("sha256:2", "sha256:1", write("second", "y"))
    uids, gids = "0:100000:65536", "0:200000:65536"
    labels = {snapshots.UID_MAPPING_LABEL: uids, snapshots.GID_MAPPING_LABEL: gids}
    (made,) = node.snapshotter.prepare("pod", "sha256:2", labels)
    assert not [option for option in made.options if "map=" in option]
    with node.mounted([made]) as root:
        owners = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in [root, *root.iterdir()]}
    assert owners == {
        "mounted": (100000, 200000),
        "file": (100000, 200000),
        "second": (100000, 200000),
        "theirs": (100033, 200034),
    }
    assert os.listdir(node.snapshotter.folder(node.rows.get("pod").id) / "fs") == []
    assert node.snapshotter.mounts("pod") == [made]
    mapped = node.snapshotter.folder(1).parent.parent / "mapped"
    assert len(list(mapped.glob("*/*"))) == 2
    node.snapshotter.remove("pod")
    assert list(mapped.iterdir()) == []


def test_mapped_layers_below_a_root_that_is_a_link(tmp_path: Path) -> None:
    """To another disk, say. The kernel names their mounts by where it leads: they must be known as ours."""
    (tmp_path / "real").mkdir()
    (tmp_path / "content").mkdir()
    (tmp_path / "root").symlink_to("real")
    labels = {snapshots.UID_MAPPING_LABEL: "0:100000:65536", snapshots.GID_MAPPING_LABEL: "0:200000:65536"}
    with contextlib.closing(Node(tmp_path / "root")) as node:
        node.images.offer("sha256:1", tmp_path / "content", mount.RootAttributes())
        node.lazy("sha256:1", "")
        node.snapshotter.prepare("pod", "sha256:1", labels)
        node.snapshotter.mounts("pod")

        def mapped() -> list[str]:
            found = [point.directory for point in holders.mount_points()]
            return [each for each in found if each.startswith(f"{tmp_path}/real/mapped/")]

        assert len(mapped()) == 1, "it was not mounted twice"
        node.snapshotter.remove("pod")
        assert not mapped()
