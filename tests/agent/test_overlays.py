"""What chains of local and lazy layers show, mounted as containerd mounts them (its cases, and more)."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from imagefs import mount
from tests.agent.snapshot_node import Change, Node, folder, link, own, remove, rename, write
from tests.agent.snapshot_node import node as node


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
