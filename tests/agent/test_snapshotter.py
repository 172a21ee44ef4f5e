"""Snapshots with real mounts: containerd's own cases on local, lazy and mixed chains, crashes, cleaning.

A lazy layer here is a real EROFS image, made by mkfs.erofs from what overlayfs wrote, so that whiteouts and
opaque directories are the kernel's own.
"""

import contextlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from agent import errors as agent_errors
from agent import observer, snapshots, snapshotter, store
from agent.rows import ImageRow, LayerRow
from agent.snapshots import Kind, Mount, Usage
from imagefs import errors, holders, mount, syscalls

Change = Callable[[Path], None]


class ErofsImages:
    """LazyImages over image files: a layer is found once it was offered. One block image a layer."""

    def __init__(self, folder: Path, rows: store.Store) -> None:
        self.folder = folder
        self.rows = rows
        self.files: dict[str, Path] = {}
        self.roots: dict[str, mount.RootAttributes | None] = {}
        self.mounted: dict[str, Path] = {}
        self.calls: list[str] = []
        self.unavailable = False

    def offer(self, chain_id: str, tree: Path, root: mount.RootAttributes | None) -> None:
        file = self.folder / f"{len(self.files)}.erofs"
        subprocess.run(["mkfs.erofs", "-x2", file, tree], check=True, stdout=subprocess.DEVNULL)
        self.files[chain_id] = file
        self.roots[chain_id] = root

    def find_layer(self, chain_id: str, labels: Mapping[str, str]) -> snapshotter.Found | None:
        self.calls.append(f"find {chain_id}")
        if chain_id not in self.files:
            return None
        layer = LayerRow(chain_id, "diff", f"map-{chain_id}", 1, "blob", 1)
        self.rows.put_image(ImageRow(f"image-{chain_id}", "source", "ref", "docker://r", (layer,), 1))
        return snapshotter.Found(f"image-{chain_id}", 0)

    def may_serve(self, block_digest: str, labels: Mapping[str, str]) -> bool:
        return True

    def directory(self, block_digest: str, layer: int) -> Path:
        if self.unavailable:
            raise errors.UnavailableError("the registry is down")
        chain_id = block_digest.removeprefix("image-")
        if chain_id not in self.mounted:
            target = self.folder / "layers" / str(len(self.mounted))
            target.mkdir(parents=True)
            mount.mount_layer(None, chain_id, self.files[chain_id], target)
            self.mounted[chain_id] = target
        return self.mounted[chain_id]

    def root_attributes(self, block_digest: str, layer: int) -> mount.RootAttributes | None:
        return self.roots[block_digest.removeprefix("image-")]

    def usage(self, block_digest: str, layer: int) -> Usage:
        return Usage(7, 4096 * 7)

    def released(self, block_digest: str) -> None:
        self.calls.append(f"released {block_digest}")
        if not self.rows.references(block_digest):
            self.rows.remove_image(block_digest)


class Events(observer.Observer):
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def event(self, kind: str, message: str, **fields: object) -> None:  # type: ignore[override]
        self.kinds.append(kind)


class Node:
    """A snapshotter with everything it needs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows = store.Store.open(root / "agent.db")
        self.images = ErofsImages(root, self.rows)
        self.events = Events()
        self.snapshotter = snapshotter.Snapshotter(root, self.rows, self.images, self.events)

    def close(self) -> None:
        mount.unmount_all(list(self.images.mounted.values()))
        self.rows.close()

    def lazy(self, chain_id: str, parent: str) -> None:
        with pytest.raises(agent_errors.AlreadyExistsError):
            self.snapshotter.prepare(f"extract-{chain_id}", parent, {snapshots.REF_LABEL: chain_id})

    def local(self, name: str, parent: str, change: Change = lambda root: None) -> None:
        made = self.snapshotter.prepare(f"{name}-active", parent, {})
        with self.mounted(made) as root:
            change(root)
        self.snapshotter.commit(name, f"{name}-active", {})

    @contextlib.contextmanager
    def mounted(self, mounts: list[Mount]) -> Iterator[Path]:
        """As containerd mounts: relative lower directories, when the options would get too long."""
        target = self.root / "mounted"
        target.mkdir(exist_ok=True)
        (made,) = mounts
        if made.type == "bind":
            syscalls.mount(made.source, target, None, syscalls.MS_BIND)
            if "ro" in made.options:
                syscalls.mount(
                    "none", target, None, syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY
                )
        else:
            options = ",".join(
                option.replace(f"{self.root}/", "") if option.startswith("lowerdir=") else option
                for option in made.options
            )
            subprocess.run(
                ["mount", "-t", "overlay", "overlay", target, "-o", options], check=True, cwd=self.root
            )
        try:
            yield target
        finally:
            syscalls.umount(target)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """All that containerd's suite compares, and more."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        found[str(path.relative_to(root))] = (
            oct(status.st_mode),
            status.st_uid,
            status.st_gid,
            content,
            status.st_rdev if stat.S_ISCHR(status.st_mode) else 0,
            {name: os.getxattr(path, name, follow_symlinks=False) for name in _xattrs(path)},
        )
    return found


def _xattrs(path: Path) -> list[str]:
    return [n for n in os.listxattr(path, follow_symlinks=False) if not n.startswith("trusted.overlay.")]


# --- changes, a layer each -------------------------------------------------------------------------------


def write(path: str, content: str, mode: int = 0o644) -> Change:
    def change(root: Path) -> None:
        (root / path).write_text(content)
        (root / path).chmod(mode)

    return change


def folder(path: str, mode: int = 0o755) -> Change:
    def change(root: Path) -> None:
        (root / path).mkdir()
        (root / path).chmod(mode)

    return change


def remove(path: str) -> Change:
    def change(root: Path) -> None:
        if (root / path).is_dir():
            shutil.rmtree(root / path)
        else:
            (root / path).unlink()

    return change


def own(path: str, uid: int, gid: int) -> Change:
    return lambda root: os.chown(root / path, uid, gid)


def rename(old: str, new: str) -> Change:
    return lambda root: os.rename(root / old, root / new)


def link(old: str, new: str) -> Change:
    return lambda root: os.link(root / old, root / new)


CASES: dict[str, list[list[Change]]] = {
    "basic": [
        [write("foo", "foo\n", 0o777), folder("a"), folder("a/b"), folder("a/b/c")],
        [write("bar", "bar\n", 0o777), write("foo", "bar\n"), remove("a/b")],
    ],
    "file update": [
        [folder("etc", 0o700), write("etc/hosts", "10.0.0.1"), write("etc/profile", "PATH=/usr/bin")],
        [write("etc/hosts", "10.0.0.2"), write("etc/profile", "PATH=/usr/bin", 0o666), folder("root", 0o700)],
    ],
    "directory replaced": [
        [folder("lib", 0o700), write("lib/hidden", "")],
        [remove("lib"), folder("lib", 0o700), write("lib/not-hidden", "")],
        [write("lib/newfile", "")],
    ],
    "owners": [
        [folder("opt", 0o700), folder("opt/a", 0o700), write("opt/a/file", "hello")],
        [own("opt", 1, 1), own("opt/a", 1, 1), own("opt/a/file", 1, 1)],
    ],
    "deleted": [
        [write("foo", "foo\n", 0o777), write("foobar", "foobar\n", 0o777)],
        [remove("foobar")],
        [],
    ],
    "moved from below": [
        [folder("dir1", 0o700), write("dir1/f1", "Hello"), folder("dir2", 0o700), write("dir2/f2", "...")],
        [
            folder("dir3", 0o700),
            write("dir3/f1", "Hello"),
            remove("dir1"),
            link("dir2/f2", "dir3/f2"),
            remove("dir2/f2"),
        ],
    ],
    "renamed": [
        [folder("some", 0o700), write("some/f1", "was here first!"), write("some/f2", "nothing")],
        [write("some/f1-new", "new"), rename("some/f1-new", "some/f1"), rename("some/f2", "some/f3")],
        [rename("some/f3", "f3"), folder("new"), rename("new", "newer"), rename("f3", "newer/f3")],
    ],
    "directory permissions": [
        [folder(f"dir{n}", 0o700) for n in range(1, 6)]
        + [write("dir4/f1", "..."), write("dir5/f1", "..."), own("dir1", 1, 1), own("dir3", 1, 1)],
        [own("dir2", 0, 0), remove("dir3"), own("dir4", 1, 1), own("dir4/f1", 1, 1)],
        [folder("dir3", 0o700), own("dir3", 1, 1), remove("dir5"), folder("dir5", 0o700), own("dir5", 1, 1)],
    ],
    "root permissions": [
        [lambda root: root.chmod(0o1711), own(".", 5, 6), lambda root: os.setxattr(root, "user.a", b"b")],
        [write("a", "a")],
        [own(".", 7, 8)],
        [],
    ],
}


@pytest.mark.root
@pytest.mark.parametrize("kind", ["local", "lazy", "mixed"])
@pytest.mark.parametrize("case", CASES)
def test_layers_show_what_a_plain_folder_shows(node: Node, tmp_path: Path, case: str, kind: str) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    flat.chmod(0o755)
    parent = ""
    for number, changes in enumerate(CASES[case]):
        name = f"sha256:{number}"
        made = node.snapshotter.prepare("active", parent, {})
        with node.mounted(made) as root:
            assert tree(root) == tree(flat)
            for change in changes:
                change(root)
                change(flat)
            assert tree(root) == tree(flat)
        if kind == "local" or (kind == "mixed" and number % 2):
            node.snapshotter.commit(name, "active", {})
        else:
            upper = node.snapshotter.folder(node.rows.get("active").id) / "fs"
            status = upper.lstat()
            attributes = mount.RootAttributes(
                status.st_mode,
                status.st_uid,
                status.st_gid,
                0,
                {os.fsencode(key): os.getxattr(upper, key) for key in _xattrs(upper)},
            )
            node.images.offer(name, upper, attributes)
            node.snapshotter.remove("active")
            node.lazy(name, parent)
        with node.mounted(node.snapshotter.view("view", name, {})) as root:
            assert tree(root) == tree(flat)
            with pytest.raises(OSError, match="Read-only"):
                (root / "x").write_text("x")
        node.snapshotter.remove("view")
        parent = name


@pytest.mark.root
def test_128_layers(node: Node, tmp_path: Path) -> None:
    """Every fourth is lazy, and removes what the one below it made."""
    parent = ""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(128):
        name = f"layer-{number}"
        content = node.root / "content" if number % 4 == 0 else None
        if content is not None:
            content.mkdir()
            write("who", f"{number}")(content)
            write(f"file-{number}", "same")(content)
            if number:
                os.mknod(content / f"file-{number - 1}", stat.S_IFCHR, 0)
            node.images.offer(name, content, mount.RootAttributes())
            node.lazy(name, parent)
            shutil.rmtree(content)
        else:
            node.local(name, parent, lambda root: None)
            upper = node.snapshotter.folder(node.rows.get(name).id) / "fs"
            write("who", f"{number}")(upper)
            write(f"file-{number}", "same")(upper)
        parent = name
    made = node.snapshotter.view("view", parent, {})
    with node.mounted(made) as root:
        assert (root / "who").read_text() == "127"
        expected = {f"file-{n}" for n in range(128) if n % 4 != 3 or n == 127}
        assert {path.name for path in root.iterdir()} == expected | {"who"}
    options = ",".join(node.snapshotter.prepare("a", parent, {})[0].options).replace(f"{node.root}/", "")
    assert len(options) < 4096 - 512, "what containerd shortens must fit"


@pytest.mark.root
def test_attributes_of_a_root_that_the_top_layer_does_not_tell(node: Node, tmp_path: Path) -> None:
    """A tar without an entry for the root: what lies below it decides, through views and active ones."""
    content = tmp_path / "content"
    content.mkdir(mode=0o755)
    said = mount.RootAttributes(stat.S_IFDIR | 0o1711, 5, 6, 10**18, {b"user.a": b"b"})
    node.images.offer("one", content, said)
    node.images.offer("two", content, None)
    node.lazy("one", "")
    node.lazy("two", "one")
    for make in (node.snapshotter.view, node.snapshotter.prepare):
        with node.mounted(make(f"{make.__name__}-key", "two", {})) as root:
            status = root.stat()
            assert (oct(status.st_mode), status.st_uid, status.st_gid) == (oct(said.mode), 5, 6)
            assert status.st_mtime_ns == 10**18
            assert os.getxattr(root, "user.a") == b"b"


@pytest.mark.root
def test_a_lowest_layer_shows_no_whiteouts(node: Node, tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.mkdir()
    os.mknod(content / "gone", stat.S_IFCHR, 0)
    (content / "here").touch()
    node.images.offer("one", content, mount.RootAttributes())
    node.lazy("one", "")
    for make in (node.snapshotter.view, node.snapshotter.prepare):
        with node.mounted(make(f"{make.__name__}-key", "one", {})) as root:
            assert [path.name for path in root.iterdir()] == ["here"]
            assert not (root / "gone").exists()


# --- lazy layers -----------------------------------------------------------------------------------------


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


# --- what containers leave -------------------------------------------------------------------------------


def make_deep(top: Path, levels: int) -> None:
    """Folders inside one another, far beyond Python's stack and the kernel's longest path."""
    folder = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("deeper", dir_fd=folder)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
        inner = os.open("deeper", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)


def test_a_tree_deeper_than_pythons_stack_is_counted_and_deleted(node: Node) -> None:
    """Any container can make one: it must not keep the node's cleanup, or the agent's start, from working."""
    node.snapshotter.prepare("deep", "", {})
    folder = node.snapshotter.folder(node.rows.get("deep").id)
    make_deep(folder / "fs", 3000)
    assert node.snapshotter.usage("deep").inodes > 500
    node.snapshotter.remove("deep")
    node.snapshotter.cleanup()
    assert os.listdir(node.root / "snapshots") == []


def test_deleting_follows_no_link_and_no_mount(node: Node, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others/precious").write_text("still here")
    node.snapshotter.prepare("odd", "", {})
    upper = node.snapshotter.folder(node.rows.get("odd").id) / "fs"
    (upper / "link").symlink_to(tmp_path / "others")
    (upper / "a/b/mounted").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", upper / "a/b/mounted"], check=True)
    try:
        (upper / "a/b/mounted/precious").write_text("too")
        node.snapshotter.remove("odd")
        node.snapshotter.cleanup()
        (left,) = (node.root / "snapshots").iterdir()
        (mounted,) = (point.directory for point in holders.mount_points() if str(left) in point.directory)
        assert (Path(mounted) / "precious").read_text() == "too"
    finally:
        for point in holders.mount_points():
            if point.directory.startswith(str(node.root)):
                subprocess.run(["umount", point.directory], check=True)
    node.snapshotter.cleanup()
    assert os.listdir(node.root / "snapshots") == []
    assert (tmp_path / "others/precious").read_text() == "still here"


# --- user namespaces -------------------------------------------------------------------------------------


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


# --- usage, removal, crashes -----------------------------------------------------------------------------


def test_usage(node: Node) -> None:
    node.snapshotter.prepare("a", "", {})
    upper = node.snapshotter.folder(node.rows.get("a").id) / "fs"
    empty = node.snapshotter.usage("a")
    assert empty.inodes == 1
    (upper / "dir").mkdir()
    (upper / "dir" / "file").write_bytes(bytes(100_000))
    os.link(upper / "dir" / "file", upper / "hardlink")
    with (upper / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 30)
    os.symlink("/etc/passwd", upper / "symlink")
    used = node.snapshotter.usage("a")
    du = subprocess.run(["du", "-s", "-B1", upper], check=True, capture_output=True, text=True).stdout
    assert used == Usage(5, int(du.split()[0]))
    node.snapshotter.commit("c", "a", {})
    assert node.snapshotter.usage("c") == used
    node.snapshotter.view("v", "c", {})
    assert node.snapshotter.usage("v") == Usage(0, 0)


def test_removal_and_cleanup(node: Node) -> None:
    folders = node.root / "snapshots"
    node.snapshotter.prepare("a", "", {})
    node.snapshotter.commit("c", "a", {})
    node.snapshotter.prepare("b", "c", {})
    with pytest.raises(agent_errors.FailedPreconditionError, match="remove"):
        node.snapshotter.remove("c")
    node.snapshotter.remove("b")
    node.snapshotter.prepare("b", "c", {})
    (folders / "new-orphan" / "fs").mkdir(parents=True)
    (folders / "99" / "fs").mkdir(parents=True)
    node.snapshotter.cleanup()
    assert set(os.listdir(folders)) == {str(row.id) for row in node.rows.walk()}
    node.snapshotter.remove("b")
    node.snapshotter.remove("c")
    node.snapshotter.cleanup()
    assert os.listdir(folders) == []
    assert node.events.kinds == []


@pytest.mark.root
def test_what_cannot_be_deleted_is_said_and_the_rest_goes(node: Node) -> None:
    folders = node.root / "snapshots"
    for name in ("new-a", "new-busy", "new-z"):
        (folders / name / "fs").mkdir(parents=True)
    syscalls.mount("tmpfs", folders / "new-busy" / "fs", "tmpfs", 0)
    try:
        node.snapshotter.cleanup()
        assert os.listdir(folders) == ["new-busy"]
        assert node.events.kinds == ["leftover"]
    finally:
        syscalls.umount(folders / "new-busy" / "fs")
    node.snapshotter.cleanup()
    assert os.listdir(folders) == []


def test_cleanup_beside_prepares(node: Node) -> None:
    """Nobody's folder is taken away while it is being made."""
    stop = threading.Event()

    def clean() -> None:
        while not stop.is_set():
            node.snapshotter.cleanup()

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        for number in range(60):
            node.snapshotter.prepare(f"a{number}", "", {})
            folder = node.snapshotter.folder(node.rows.get(f"a{number}").id)
            assert sorted(os.listdir(folder)) == ["fs", "work"]
            if number % 3 == 0:
                node.snapshotter.remove(f"a{number}")
    finally:
        stop.set()
        cleaner.join()
    node.snapshotter.cleanup()
    assert set(os.listdir(node.root / "snapshots")) == {str(row.id) for row in node.rows.walk()}


def test_cleanup_waits_for_a_folder_to_get_its_row(node: Node) -> None:
    folder = node.root / "snapshots" / "1"
    cleaner = threading.Thread(target=node.snapshotter.cleanup)

    def place(number: int) -> None:
        folder.mkdir()
        cleaner.start()
        cleaner.join(0.3)  # it would be done by now, if it did not wait

    assert node.rows.insert("a", Kind.ACTIVE, "", {}, place=place).id == 1
    cleaner.join()
    assert folder.exists()


def test_a_folder_left_by_one_that_was_killed(tmp_path: Path) -> None:
    """Placed, and killed before the transaction's end: its id is not given to another."""
    (tmp_path / "snapshots" / "7" / "fs" / "old").mkdir(parents=True)
    node = Node(tmp_path)
    node.snapshotter.prepare("a", "", {})
    assert node.rows.get("a").id == 8
    node.snapshotter.cleanup()
    assert os.listdir(tmp_path / "snapshots") == ["8"]
    node.close()


@pytest.mark.root
def test_a_running_container_outlives_a_lost_database(tmp_path: Path) -> None:
    """Its folders and those of the layers below it, nobody's by the rows, stay while it is mounted."""
    before = Node(tmp_path)
    before.local("lower", "", write("lower", "x"))
    before.local("unused", "")
    with before.mounted(before.snapshotter.prepare("running", "lower", {})) as root:
        (root / "upper").write_text("y")
        before.close()
        for file in tmp_path.glob("agent.db*"):
            file.unlink()
        node = Node(tmp_path)
        node.snapshotter.prepare("new", "", {})
        node.snapshotter.cleanup()
        assert sorted(os.listdir(tmp_path / "snapshots")) == ["1", "3", "4"]
        (root / "later").write_text("z")
        assert {path.name for path in root.iterdir()} == {"lower", "upper", "later"}
    node.snapshotter.cleanup()
    assert os.listdir(tmp_path / "snapshots") == ["4"]
    node.close()


@pytest.mark.root
def test_no_row_without_its_folder(node: Node) -> None:
    place = node.root / "snapshots" / "1"
    place.mkdir()
    syscalls.mount("tmpfs", place, "tmpfs", 0)
    try:
        with pytest.raises(errors.UnavailableError, match="busy"):
            node.snapshotter.prepare("a", "", {})
        assert node.rows.walk() == []
        assert os.listdir(place.parent) == ["1"]
    finally:
        syscalls.umount(place)
    node.snapshotter.cleanup()
    node.snapshotter.prepare("a", "", {})


_WORKER = """
import sys
from pathlib import Path
from agent import observer, snapshotter, store
class Nobody:
    def find_layer(self, chain_id, labels): return None
    def may_serve(self, block_digest, labels): return True
    def released(self, block_digest): pass
root = Path(sys.argv[1])
made = snapshotter.Snapshotter(root, store.Store.open(root / "agent.db"), Nobody(), observer.Observer())
turn = sys.argv[2]
print("ready", flush=True)
number = 0
while True:
    key = f"{turn}-{number}"
    made.prepare(key, "", {}); made.commit(key + "-c", key, {})
    made.prepare(key + "-2", key + "-c", {})
    if number % 2:
        made.remove(key + "-2"); made.remove(key + "-c")
    if number % 3 == 0:
        made.cleanup()
    number += 1
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Whatever was under way: each row has its folder, and cleanup leaves nothing else."""
    chance = random.Random(11)
    for turn in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(tmp_path), str(turn)], stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(chance.uniform(0.01, 0.15))
            os.kill(worker.pid, signal.SIGKILL)
        node = Node(tmp_path)
        folders = tmp_path / "snapshots"
        for row in node.rows.walk():
            wanted = ["fs"] if row.kind is Kind.VIEW else ["fs", "work"]
            assert sorted(os.listdir(folders / str(row.id))) == wanted
        node.snapshotter.cleanup()
        assert set(os.listdir(folders)) == {str(row.id) for row in node.rows.walk()}
        node.close()


@pytest.mark.root
def test_a_full_disk(tmp_path: Path) -> None:
    """Nothing is made, everything that was there can be used and removed, and then there is room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    syscalls.mount("tmpfs", disk, "tmpfs", 0, "size=2m,nr_inodes=40")
    try:
        node = Node(disk)
        node.snapshotter.prepare("a", "", {})

        def fill() -> None:
            for number in range(40):
                node.snapshotter.prepare(f"more-{number}", "", {})

        with pytest.raises(errors.UnavailableError, match="space"):
            fill()
        before = [info.name for info in node.snapshotter.walk()]
        assert set(os.listdir(disk / "snapshots")) == {str(row.id) for row in node.rows.walk()}
        assert node.snapshotter.mounts("a")[0].type == "bind"
        node.snapshotter.remove(before[-1])
        node.snapshotter.cleanup()
        node.snapshotter.prepare("again", "", {})
        node.close()
    finally:
        syscalls.umount(disk)


def test_names_are_needed(node: Node) -> None:
    for call in (
        lambda: node.snapshotter.stat(""),
        lambda: node.snapshotter.prepare("", "", {}),
        lambda: node.snapshotter.commit("", "a", {}),
        lambda: node.snapshotter.remove(""),
        lambda: node.snapshotter.mounts(""),
        lambda: node.snapshotter.update("", {}, []),
    ):
        with pytest.raises(errors.InvalidInputError, match="the request has no"):
            call()
