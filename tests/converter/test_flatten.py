"""The reference tree against umoci, and the comparison against every kind of difference."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import subprocess
from collections.abc import Callable

import pytest

from converter import compare, errors, flatten, limits, rootedpath
from tests.fixtures import images, tars, trees
from tests.fixtures.tars import Attributes, Builder

LIMITS = limits.Limits()


def flat(*layers: Builder | bytes) -> flatten.Flattened:
    return flatten.flatten([io.BytesIO(bytes(layer)) for layer in layers], LIMITS)


def paths(*layers: Builder) -> list[str]:
    return [rootedpath.show(path) for path, _ in flat(*layers).walk()]


def attributes(path: str, *layers: Builder) -> flatten.Attributes:
    return dict(flat(*layers).walk())[rootedpath.clean(path.encode())]


# -- flattening ------------------------------------------------------------------------------------


def test_attributes_and_content() -> None:
    found = attributes(
        "f", Builder().file(b"f", b"12345", Attributes(0o4711, 5, 6, "7.5", {b"user.a": b"b"}))
    )
    assert (found.mode, found.uid, found.gid, found.mtime_ns) == (0o104711, 5, 6, 7_500_000_000)
    assert (found.size, found.sha256, found.xattrs) == (
        5,
        hashlib.sha256(b"12345").digest(),
        {b"user.a": b"b"},
    )


def test_walk_ascends() -> None:
    # In the order of names, not of text: "a-" comes after everything in "a".
    assert paths(Builder().file(b"a-").file(b"a/z").file(b"b").file(b"a/b/c")) == [
        "/",
        "/a",
        "/a/b",
        "/a/b/c",
        "/a/z",
        "/a-",
        "/b",
    ]


def test_whiteouts_delete_what_is_below_only() -> None:
    bottom = Builder().file(b"d/old").file(b"d/sub/old").file(b"e")
    assert paths(bottom, Builder().whiteout(b"d").whiteout(b"e")) == ["/"]
    assert paths(bottom, Builder().file(b"d/new").whiteout(b"d").file(b"e").whiteout(b"e")) == [
        "/",
        "/d",
        "/d/new",
        "/e",
    ]
    assert paths(bottom, Builder().file(b"d/sub/new").opaque(b"d").whiteout(b"e")) == [
        "/",
        "/d",
        "/d/sub",
        "/d/sub/new",
    ]
    assert paths(bottom, Builder().opaque(b"")) == ["/"]


def test_a_directory_made_anew_inherits_nothing() -> None:
    bottom = Builder().directory(b"d", Attributes(mode=0o700, uid=9))
    assert attributes("d", bottom, Builder().file(b"d/x")).uid == 9
    assert attributes("d", bottom, Builder().file(b"d/x").opaque(b"d")).uid == 9
    assert attributes("d", bottom, Builder().file(b"d/x").whiteout(b"d")).uid == 0
    assert attributes("d", bottom, Builder().directory(b"d", Attributes(uid=3)).whiteout(b"d")).uid == 3


def test_links_to_lower_files_are_copies() -> None:
    bottom = Builder().file(b"a", b"1").hard_link(b"b", b"a")
    merged = dict(flat(bottom, Builder().hard_link(b"c", b"a")).walk())
    groups = {path[-1]: found.link_group for path, found in merged.items() if path}
    assert groups[b"a"] == groups[b"c"] != groups[b"b"]
    assert merged[(b"c",)].sha256 == merged[(b"b",)].sha256


def test_what_is_refused_names_entry_and_place() -> None:
    with pytest.raises(
        errors.InvalidLayerError,
        match="entry 'l' at byte 512 of the tar: a hard link to /x, which is nowhere",
    ):
        flat(Builder().file(b"a").hard_link(b"l", b"x"))
    with pytest.raises(errors.InvalidLayerError, match="not a directory"):
        flat(Builder().file(b"a").file(b"a/b"))
    assert paths(Builder().file(b"a"), Builder().file(b"a/b")) == ["/", "/a", "/a/b"]
    with pytest.raises(errors.InvalidLayerError, match="too many symbolic links"):
        flat(Builder().symlink(b"a", b"a").file(b"a/b"))
    with pytest.raises(errors.LimitError, match="--max-entries"):
        flatten.flatten([io.BytesIO(bytes(Builder().file(b"d/" * 50 + b"f")))], limits.Limits(max_entries=20))


@pytest.mark.root
@pytest.mark.parametrize("count", [1, 3])
def test_umoci_unpacks_the_same(tmp_path: pathlib.Path, count: int) -> None:
    layers = tars.torture_layers(for_umoci=True)[:count]
    images.make(layers).write_layout(tmp_path / "layout")
    with trees.tmpfs(tmp_path / "out") as out:
        command = ["umoci", "raw", "unpack", "--image", f"{tmp_path}/layout:latest", str(out / "rootfs")]
        subprocess.run(command, check=True, capture_output=True)
        found = list(compare.differences(flat(*layers), out / "rootfs"))
    left = {
        (rootedpath.show(difference.path), difference.what)
        for difference in found
        if difference.what != "mtime differs"
    }
    wanted = {("/etc/xattrs", "xattr user.empty differs")}  # umoci drops empty xattrs
    if count == 3:
        wanted |= {
            ("/.wh..wh.plnk", "too much"),  # umoci does not know AUFS' leftovers
            ("/.wh..wh.plnk/123.4", "too much"),
            ("/never-there", "missing"),  # made by containerd for the whiteout in it
            ("/etc/symlink-too", "hard link differs"),  # overlayfs copies up: see converter.flatten
        }
    assert left == wanted
    # Directories that no entry names, or that something was put into later, get the time of the unpacking.
    late = {difference.path for difference in found if difference.what == "mtime differs"}
    assert late <= {path for path, entry in flat(*layers).walk() if entry.mode & 0o170000 == 0o040000}


# -- comparing -------------------------------------------------------------------------------------


def image() -> Builder:
    return (
        Builder()
        .directory(b"./", Attributes(mode=0o755, mtime=1))
        .directory(b"d", Attributes(mode=0o755, mtime=1))
        .file(b"d/f", b"content", Attributes(mtime=1, xattrs={b"user.a": b"1", b"trusted.mine": b"2"}))
        .hard_link(b"d/g", b"d/f")
        .file(b"d/h", b"content", Attributes(mtime=1))
        .symlink(b"s", b"d", Attributes(mode=0o777, mtime=1))
        .device(b"dev", b"3", 1, 3, Attributes(mtime=1))
    )


def rewrite(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, (1, 1))


def make_directory(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def relink(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to("x")
    os.utime(path, (1, 1), follow_symlinks=False)


def remake_device(path: pathlib.Path) -> None:
    path.unlink()
    os.mknod(path, 0o020644, os.makedev(1, 5))
    os.utime(path, (1, 1))


def link(path: pathlib.Path) -> None:
    path.unlink()
    os.link(path.with_name("f"), path)


def unlink_group(path: pathlib.Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    os.setxattr(path, "user.a", b"1")
    path.chmod(0o644)
    os.utime(path, (1, 1))


CHANGES: list[tuple[str, Callable[[pathlib.Path], object], str]] = [
    ("d/h", lambda p: p.unlink(), "/d/h: missing: expected a regular file, found nothing"),
    ("d/e", lambda p: p.mkdir(), "/d/e: too much: expected nothing, found a directory"),
    (
        "d/h",
        make_directory,
        "/d/h: type differs: expected a regular file, found a directory",
    ),
    ("d", lambda p: p.chmod(0o1700), "/d: mode differs: expected 0755, found 1700"),
    ("s", lambda p: os.lchown(p, 5, 6), "/s: owner differs: expected 0:0, found 5:6"),
    (
        "d/f",
        lambda p: os.utime(p, ns=(0, 10**9 + 1)),
        "/d/f: mtime differs: expected 1000000000 ns, found 1000000001 ns",
    ),
    (
        "d/f",
        lambda p: os.setxattr(p, "user.a", b"9"),
        "/d/f: xattr user.a differs: expected b'1', found b'9'",
    ),
    ("d/f", lambda p: os.removexattr(p, "user.a"), "/d/f: xattr user.a differs: expected b'1', found None"),
    ("d/h", lambda p: os.setxattr(p, "user.b", b""), "/d/h: xattr user.b differs: expected None, found b''"),
    ("d/h", lambda p: rewrite(p, b"contenT"), "/d/h: content differs: expected sha256 ed7002b4"),
    ("d/h", lambda p: rewrite(p, b"longer content"), "/d/h: size differs: expected 7 bytes, found 14 bytes"),
    ("s", relink, "/s: link target differs: expected b'd', found b'x'"),
    ("dev", remake_device, "/dev: device differs: expected 1:3, found 1:5"),
    (
        "d/g",
        unlink_group,
        "/d/g: hard link differs: expected the same inode as an earlier name, found another one",
    ),
]


@pytest.mark.root
@pytest.mark.parametrize(("path", "change", "sentence"), CHANGES)
def test_first_difference(
    tmp_path: pathlib.Path, path: str, change: Callable[[pathlib.Path], object], sentence: str
) -> None:
    expected = flat(image())
    with trees.tmpfs(tmp_path / "image") as folder:
        [root] = trees.materialize_image([bytes(image())], folder)
        assert compare.first_difference(expected, root) is None
        change(root / path)
        for directory in ("d", "."):
            os.utime(root / directory, (1, 1))
        found = compare.first_difference(expected, root)
    assert found is not None
    assert found.startswith(sentence)


@pytest.mark.root
def test_an_unexpected_hard_link_is_a_difference(tmp_path: pathlib.Path) -> None:
    builder = Builder().directory(b"./", Attributes(mtime=1, mode=0o755))
    builder.file(b"f", b"same", Attributes(mtime=1)).file(b"g", b"same", Attributes(mtime=1))
    with trees.tmpfs(tmp_path / "image") as folder:
        [root] = trees.materialize_image([bytes(builder)], folder)
        link(root / "g")
        os.utime(root, (1, 1))
        found = compare.first_difference(flat(builder), root)
    assert found == "/g: hard link differs: expected an inode of its own, found that of an earlier name"


@pytest.mark.root
def test_paths_of_any_depth_are_compared(tmp_path: pathlib.Path) -> None:
    deep = b"d/" * 2000 + b"f"
    builder = Builder().file(deep, b"1")
    with trees.tmpfs(tmp_path / "image") as folder:
        (folder / "root").mkdir()
        fd = os.open(folder / "root", os.O_RDONLY)
        for _ in range(2000):
            os.mkdir("d", dir_fd=fd)
            inner = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = inner
        os.close(fd)
        last = list(compare.differences(flat(builder), folder / "root"))[-1]
    assert (last.path, last.what) == (rootedpath.clean(deep), "missing")
