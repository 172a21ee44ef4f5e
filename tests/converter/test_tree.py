"""One layer's tree: what each rule makes, and, by the kernel's overlayfs, that it means the right thing."""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter import compare, errors, flatten, limits, rootedpath, tarstream, tree
from converter.node import find
from converter.rootedpath import Path
from tests.fixtures import tars, trees
from tests.fixtures.tars import Attributes, Builder

LIMITS = limits.Limits()


@dataclasses.dataclass(frozen=True)
class Thing:
    """A LowerEntry in memory."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    rdev_major: int = 0
    rdev_minor: int = 0
    target: bytes = b""
    content: bytes = b""
    xattrs: dict[bytes, bytes] | None = None

    @property
    def size(self) -> int:
        return len(self.content)

    def hole_ahead(self, offset: int) -> int:
        return 0

    def read(self, offset: int, length: int) -> bytes:
        return self.content[offset : offset + length]


class Things(dict[str, Thing]):
    """A `Lower` in memory, by path."""

    def lookup(self, path: Path) -> tree.LowerEntry | None:
        return self.get("/" + b"/".join(path).decode())

    def children(self, path: Path) -> Iterator[bytes]:
        for name in self:
            parts = rootedpath.clean(name.encode())
            if parts and parts[:-1] == path:
                yield parts[-1]


def directory(mode: int = 0o755, uid: int = 0, gid: int = 0, mtime_ns: int = 0) -> Thing:
    return Thing(stat.S_IFDIR | mode, uid, gid, mtime_ns)


def file(content: bytes = b"", mode: int = 0o644) -> Thing:
    return Thing(stat.S_IFREG | mode, content=content)


def symlink(target: bytes) -> Thing:
    return Thing(stat.S_IFLNK | 0o777, target=target)


def build(builder: Builder, bounds: limits.Limits = LIMITS) -> tree.LayerTree:
    built = tree.LayerTree(bounds)
    for entry in tarstream.TarReader(io.BytesIO(bytes(builder)), bounds):
        built.add(entry)
    return built


def at(built: tree.LayerTree, path: str) -> tree.Node:
    found = find(built.root, rootedpath.clean(path.encode()))
    assert found is not None, f"{path} is not in the tree"
    return found


def names(built: tree.LayerTree) -> list[str]:
    found = []
    pending: list[tuple[str, tree.Node]] = [("", built.root)]
    while pending:
        path, node = pending.pop()
        for name, child in (node.children or {}).items():
            found.append(f"{path}/{name.decode()}")
            pending.append((found[-1], child))
    return sorted(found)


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"a/b", b"/a/b", b"./a//b/", b"../../a/b", b"a/./c/../b/.", b"a/b/.."])
def test_names_are_cleaned(name: bytes) -> None:
    wanted = ["/a"] if name == b"a/b/.." else ["/a", "/a/b"]
    assert names(build(Builder().directory(name))) == wanted


@pytest.mark.parametrize("name", [b"./", b"/", b".", b"..", b"a/..", b""])
def test_the_root_itself(name: bytes) -> None:
    built = build(Builder().directory(name, Attributes(mode=0o1700, uid=3)))
    assert not built.root_implied
    assert (built.root.mode, built.root.uid, names(built)) == (stat.S_IFDIR | 0o1700, 3, [])
    with pytest.raises(errors.InvalidLayerError, match="root directory cannot be"):
        build(Builder().file(name))


def test_root_is_implied_without_an_entry() -> None:
    assert build(Builder().file(b"a")).root_implied


def test_links_in_a_path_stay_inside() -> None:
    builder = (
        Builder().symlink(b"out", b"../../..").symlink(b"abs", b"/real").symlink(b"chain", b"abs/sub/../sub")
    )
    builder.file(b"out/a").file(b"abs/b").file(b"chain/c").file(b"chain/../d")
    # The entry's name is cleaned as text: chain/../d is d.
    assert names(build(builder)) == [
        "/a",
        "/abs",
        "/chain",
        "/d",
        "/out",
        "/real",
        "/real/b",
        "/real/sub",
        "/real/sub/c",
    ]


def test_loops_and_files_as_parents() -> None:
    with pytest.raises(errors.InvalidLayerError, match=r"entry 'a/x' at byte 1024 .*too many symbolic links"):
        build(Builder().symlink(b"a", b"b").symlink(b"b", b"a").file(b"a/x"))
    with pytest.raises(errors.InvalidLayerError, match="/f leads through something that is not a directory"):
        build(Builder().file(b"f").file(b"f/x"))


def test_long_names() -> None:
    for builder in (Builder().file(b"n" * 256), Builder().file(b"n" * 256 + b"/x")):
        with pytest.raises(errors.InvalidLayerError, match="name of 256 bytes"):
            build(builder)


# -- replacing -------------------------------------------------------------------------------------


def test_directory_over_directory_merges() -> None:
    built = build(Builder().file(b"d/x").directory(b"d", Attributes(mode=0o700, xattrs={b"user.a": b"1"})))
    node = at(built, "d")
    assert (node.mode & 0o7777, node.implied, node.opaque, node.xattrs) == (
        0o700,
        False,
        False,
        {b"user.a": b"1"},
    )
    assert names(built) == ["/d", "/d/x"]


def test_replacements_and_link_counts() -> None:
    built = build(Builder().file(b"d/x").hard_link(b"y", b"d/x").hard_link(b"z", b"y").file(b"d"))
    assert names(built) == ["/d", "/y", "/z"]
    assert at(built, "y") is at(built, "z")
    assert at(built, "y").links == 2
    built = build(Builder().file(b"d").directory(b"d").file(b"d/x"))
    assert at(built, "d").opaque


def test_a_replaced_parent_is_not_remembered() -> None:
    built = build(Builder().file(b"a/x").symlink(b"a", b"b").file(b"a/y").symlink(b"a", b"c").file(b"a/z"))
    assert names(built) == ["/a", "/b", "/b/y", "/c", "/c/z"]


def test_only_regular_files_want_data() -> None:
    built = tree.LayerTree(LIMITS)
    entries = list(
        tarstream.TarReader(
            io.BytesIO(bytes(Builder().file(b"f", b"1").directory(b"d").symlink(b"s", b"f"))), LIMITS
        )
    )
    assert [built.add(entry) for entry in entries] == [at(built, "f"), None, None]


# -- whiteouts -------------------------------------------------------------------------------------


def test_whiteouts() -> None:
    built = build(
        Builder().whiteout(b"d/gone").file(b"d/kept").whiteout(b"d/kept").whiteout(b"d/back").file(b"d/back")
    )
    assert tree.is_whiteout(at(built, "d/gone"))
    assert stat.S_ISREG(at(built, "d/kept").mode)
    assert stat.S_ISREG(at(built, "d/back").mode)


@pytest.mark.parametrize("first", [True, False])
def test_a_directory_that_is_also_whited_out_is_opaque_and_inherits_nothing(first: bool) -> None:
    builder = Builder().whiteout(b"d").file(b"d/x") if first else Builder().file(b"d/x").whiteout(b"d")
    built = build(builder)
    assert not built.depends_on_lower()
    built.resolve(Things({"/d": directory(0o700)}))
    assert at(built, "d").mode == stat.S_IFDIR | 0o755
    assert at(built, "d").xattrs == {b"trusted.overlay.opaque": b"y"}


def test_opaque_directories_drop_whiteouts_inside() -> None:
    built = build(Builder().whiteout(b"d/a").opaque(b"d").whiteout(b"d/sub/b").file(b"d/sub/c").file(b"e/x"))
    assert built.depends_on_lower()
    built.resolve(Things({"/d": directory(0o711), "/d/sub": directory(0o700), "/e": directory(0o701)}))
    assert names(built) == ["/d", "/d/sub", "/d/sub/c", "/e", "/e/x"]
    assert at(built, "d").mode == stat.S_IFDIR | 0o711
    assert at(built, "d").xattrs == {b"trusted.overlay.opaque": b"y"}
    assert at(built, "d/sub").mode == stat.S_IFDIR | 0o755
    assert at(built, "d/sub").xattrs is None
    assert at(built, "e").mode == stat.S_IFDIR | 0o701


def test_an_opaque_root_becomes_whiteouts() -> None:
    built = build(Builder().opaque(b"").file(b"kept/x"))
    assert built.depends_on_lower()
    built.resolve(Things({"/": directory(), "/a": file(), "/kept": directory(0o700)}))
    assert tree.is_whiteout(at(built, "a"))
    assert at(built, "kept").xattrs == {b"trusted.overlay.opaque": b"y"}
    assert built.root.xattrs is None


@pytest.mark.parametrize("name", [b".wh.", b"d/.wh..", b".wh..."])
def test_whiteouts_of_nothing(name: bytes) -> None:
    with pytest.raises(errors.InvalidLayerError, match="whiteout that names nothing"):
        build(Builder().file(name))


def test_aufs_leftovers() -> None:
    builder = Builder().file(b".wh..wh.aufs").directory(b".wh..wh.orph").file(b".wh..wh.plnk/1.2", b"data")
    built = build(builder.hard_link(b"a", b".wh..wh.plnk/1.2").hard_link(b"b", b".wh..wh.plnk/1.2"))
    assert names(built) == ["/a", "/b"]
    assert (at(built, "a").links, at(built, "a").size) == (2, 4)


# -- hard links ------------------------------------------------------------------------------------


def test_hard_links() -> None:
    built = build(Builder().symlink(b"s", b"t").hard_link(b"l", b"s").file(b"f").hard_link(b"f", b"f"))
    assert at(built, "l") is at(built, "s")
    assert at(built, "f").links == 1


@pytest.mark.parametrize(
    ("builder", "problem"),
    [
        (Builder().directory(b"d").hard_link(b"l", b"d"), "to the directory /d"),
        (Builder().hard_link(b"l", b"/"), "root directory"),
        (Builder().whiteout(b"f").hard_link(b"l", b"f"), "this layer removes"),
        (Builder().whiteout(b"d").hard_link(b"l", b"d/f"), "not a directory"),
    ],
)
def test_bad_hard_links(builder: Builder, problem: str) -> None:
    with pytest.raises(errors.InvalidLayerError, match=problem):
        build(builder)


def test_links_to_lower_files_copy_them_up() -> None:
    lower = Things(
        {
            "/d": directory(0o750, uid=4),
            "/d/f": file(b"lower", 0o4755),
            "/d/s": symlink(b"f"),
            "/l": symlink(b"d"),
        }
    )
    built = build(Builder().hard_link(b"one", b"d/f").hard_link(b"two", b"one").hard_link(b"three", b"l/s"))
    assert built.depends_on_lower()
    [copy] = built.resolve(lower)
    assert copy.node is at(built, "one") is at(built, "two") is at(built, "d/f")
    assert (copy.node.mode, copy.node.links, copy.node.size) == (stat.S_IFREG | 0o4755, 3, 5)
    assert copy.entry.read(0, 10) == b"lower"
    assert at(built, "three") is at(built, "d/s")
    assert at(built, "three").target == b"f"
    assert (at(built, "d").mode, at(built, "d").uid) == (stat.S_IFDIR | 0o750, 4)


@pytest.mark.parametrize(
    ("builder", "problem"),
    [
        (Builder().hard_link(b"l", b"d/absent"), "entry 'l' at byte 0 of the tar: .*in no layer"),
        (Builder().hard_link(b"l", b"d"), "directory /d"),
        (Builder().opaque(b"d").hard_link(b"l", b"d/f"), "in no layer"),
        (Builder().opaque(b"").hard_link(b"l", b"d/f"), "nowhere"),
    ],
)
def test_links_to_nothing(builder: Builder, problem: str) -> None:
    lower = Things({"/": directory(), "/d": directory(), "/d/f": file()})
    with pytest.raises(errors.InvalidLayerError, match=problem):
        build(builder).resolve(lower)
    with pytest.raises(errors.InvalidLayerError):
        build(builder).resolve(None)


def test_a_link_target_removed_later_is_still_linked() -> None:
    built = build(Builder().hard_link(b"l", b"f").whiteout(b"f").hard_link(b"m", b"g").file(b"g", b"new"))
    copies = built.resolve(Things({"/f": file(b"f"), "/g": file(b"old")}))
    assert [copy.entry.read(0, 9) for copy in copies] == [b"f", b"old"]
    assert tree.is_whiteout(at(built, "f"))
    assert (at(built, "g").size, at(built, "m").size, at(built, "l").links, at(built, "m").links) == (
        3,
        3,
        1,
        1,
    )
    assert at(built, "g") is not at(built, "m")


# -- the layers below ------------------------------------------------------------------------------


def test_implied_directories_inherit() -> None:
    built = build(Builder().file(b"a/b/x").file(b"new/x"))
    below = Things(
        {
            "/a": directory(0o1777, uid=1, gid=2, mtime_ns=3),
            "/a/b": Thing(stat.S_IFDIR | 0o700, xattrs={b"user.x": b"1", b"trusted.overlay.opaque": b"y"}),
        }
    )
    assert built.resolve(below) == []
    node = at(built, "a")
    assert (node.mode, node.uid, node.gid, node.mtime_ns) == (stat.S_IFDIR | 0o1777, 1, 2, 3)
    assert at(built, "a/b").xattrs == {b"user.x": b"1"}
    assert at(built, "new").mode == stat.S_IFDIR | 0o755


def test_what_does_not_depend_on_lower() -> None:
    assert not build(Builder().directory(b"a").file(b"a/x").whiteout(b"b").opaque(b"a")).depends_on_lower()
    assert not build(Builder().file(b"d").directory(b"d").file(b"d/implied/x")).depends_on_lower()
    assert build(Builder().file(b"a/x")).depends_on_lower()


def test_lower_links_move_implied_directories() -> None:
    lower = Things(
        {
            "/lib": symlink(b"usr/lib"),
            "/usr": directory(0o711),
            "/usr/lib": directory(0o710),
            "/usr/lib/sub": symlink(b"/opt"),
        }
    )
    built = build(
        Builder()
        .file(b"usr/lib/a", b"1")
        .file(b"lib/a", b"22")
        .file(b"lib/sub/b")
        .whiteout(b"lib/c")
        .hard_link(b"lib/l", b"lib/a")
    )
    assert built.resolve(lower) == []
    assert names(built) == ["/opt", "/opt/b", "/usr", "/usr/lib", "/usr/lib/a", "/usr/lib/c", "/usr/lib/l"]
    assert (
        at(built, "usr/lib/a").size,
        at(built, "usr").mode & 0o777,
        at(built, "usr/lib").mode & 0o777,
    ) == (2, 0o711, 0o710)
    assert at(built, "usr/lib/l") is at(built, "usr/lib/a")


def test_a_link_target_found_through_a_lower_link() -> None:
    lower = Things({"/lib": symlink(b"usr/lib"), "/usr": directory(), "/usr/lib": directory()})
    built = build(Builder().file(b"usr/lib/a", b"1").hard_link(b"b", b"lib/a"))
    assert built.resolve(lower) == []
    assert at(built, "b") is at(built, "usr/lib/a")
    assert at(built, "b").links == 2


def test_lower_links_that_lead_nowhere() -> None:
    with pytest.raises(errors.InvalidLayerError, match="too many symbolic links"):
        build(Builder().file(b"a/x")).resolve(Things({"/a": symlink(b"b"), "/b": symlink(b"a")}))
    with pytest.raises(errors.InvalidLayerError, match="not a directory"):
        build(Builder().file(b"a/x")).resolve(Things({"/a": symlink(b"f"), "/f": file()}))


def test_merged_lower() -> None:
    whiteout = Thing(stat.S_IFCHR)
    opaque = Thing(stat.S_IFDIR | 0o700, xattrs={b"trusted.overlay.opaque": b"y"})
    bottom = Things(
        {
            "/": directory(),
            "/a": directory(),
            "/a/x": file(b"1"),
            "/b": directory(),
            "/b/x": file(),
            "/c": directory(),
            "/c/x": file(),
            "/d": file(),
        }
    )
    middle = Things(
        {
            "/": directory(),
            "/a": directory(0o711),
            "/a/x": whiteout,
            "/a/y": file(b"2"),
            "/b": opaque,
            "/b/y": file(),
            "/c": file(b"f"),
            "/d": whiteout,
        }
    )
    top = Things({"/": directory(0o700), "/c": directory(), "/c/z": file()})
    merged = tree.MergedLower([top, middle, bottom])

    def children(path: str) -> list[bytes]:
        return sorted(merged.children(rootedpath.clean(path.encode())))

    assert [children(path) for path in ("", "a", "b", "c", "d", "nope/x")] == [
        [b"a", b"b", b"c"],
        [b"y"],
        [b"y"],
        [b"z"],
        [],
        [],
    ]
    found = merged.lookup((b"a",))
    assert found is not None
    assert found.mode == stat.S_IFDIR | 0o711
    assert merged.lookup((b"c", b"x")) is None
    assert merged.lookup((b"a", b"x")) is None
    root = merged.lookup(())
    assert root is not None
    assert root.mode == stat.S_IFDIR | 0o700


# -- what is refused -------------------------------------------------------------------------------


def test_overlayfs_own_things_are_refused() -> None:
    with pytest.raises(
        errors.InvalidLayerError, match="entry 'd/c' at byte 512 of the tar: a character device 0/0"
    ):
        build(Builder().directory(b"d").device(b"d/c", b"3", 0, 0))
    with pytest.raises(errors.InvalidLayerError, match=r"trusted\.overlay\.redirect"):
        build(Builder().directory(b"d", Attributes(xattrs={b"trusted.overlay.redirect": b"/"})))
    assert names(build(Builder().device(b"b", b"4", 0, 0))) == ["/b"]


def test_xattrs_that_linux_would_not_store_are_dropped() -> None:
    foreign = {b"com.apple.provenance": b"1", b"system.nfs4_acl": b"2", b"user.kept": b"3"}
    built = build(
        Builder().file(b"f", b"", Attributes(xattrs=foreign)).symlink(b"s", b"f", Attributes(xattrs=foreign))
    )
    assert at(built, "f").xattrs == {b"user.kept": b"3"}
    assert at(built, "s").xattrs is None


def test_symlink_targets() -> None:
    with pytest.raises(errors.InvalidLayerError, match="1 to 4095 bytes"):
        build(Builder().symlink(b"s", b""))


def test_implied_directories_count_as_entries() -> None:
    with pytest.raises(errors.LimitError, match="101 entries, implied directories included"):
        build(Builder().file(b"d/" * 200 + b"x"), limits.Limits(max_entries=100))


# -- what the kernel makes of it -------------------------------------------------------------------

_letters = st.sampled_from((b"a", b"b", b"c"))
_paths = st.lists(_letters, min_size=1, max_size=3).map(b"/".join)
_modes = st.sampled_from((0o700, 0o711, 0o1777)).map(lambda mode: Attributes(mode=mode))
_plain = st.one_of(
    st.tuples(st.just("file"), _paths, st.binary(max_size=3)),
    st.tuples(st.just("directory"), _paths, _modes),
    st.tuples(st.just("hard_link"), _paths, _paths),
    st.tuples(st.just("whiteout"), _paths),
    st.tuples(st.just("opaque"), st.one_of(_paths, st.just(b""))),
)
# Paths of the upper layers lead through links of the bottom one (x, y, a/x), never replacing them: extractors
# disagree about what went through a link before it was replaced.
_links = st.tuples(
    st.just("symlink"),
    st.sampled_from((b"x", b"a/x", b"y")),
    st.sampled_from((b"a", b"/b/c", b"../c", b"a/x", b"y/b")),
)
_through = st.builds(
    lambda head, tail: head + b"/" + tail, st.sampled_from((b"x", b"a/x", b"y", b"x/b")), _letters
)
_over_links = st.one_of(
    st.tuples(st.just("file"), _through, st.binary(max_size=3)),
    st.tuples(st.just("directory"), _through, _modes),
    st.tuples(st.just("hard_link"), _through, st.one_of(_paths, _through)),
    st.tuples(st.just("whiteout"), _through),
)
Operation = tuple[Any, ...]


def make(operations: Sequence[Operation]) -> bytes:
    builder = Builder()
    for method, *arguments in operations:
        getattr(builder, str(method))(*arguments)
    return bytes(builder)


def assert_overlay_equals_extraction(layers: list[bytes], workplace: pathlib.Path) -> None:
    try:
        expected = flatten.flatten([io.BytesIO(layer) for layer in layers], LIMITS)
        folder = workplace / "image"
        with trees.tmpfs(folder), trees.overlaid(layers, folder) as merged:
            assert compare.first_difference(expected, merged) is None
    except errors.InvalidLayerError:
        return  # most random hard links lead nowhere
    finally:
        if (workplace / "image").exists():
            (workplace / "image").rmdir()


@pytest.mark.root
@given(layers=st.lists(st.lists(_plain, min_size=1, max_size=7).map(make), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_overlay_equals_extraction(tmp_path: pathlib.Path, layers: list[bytes]) -> None:
    assert_overlay_equals_extraction(layers, tmp_path)


@pytest.mark.root
@given(
    bottom=st.tuples(st.lists(_links, min_size=1, max_size=3), st.lists(_plain, max_size=4)),
    upper=st.lists(
        st.one_of(_over_links, _plain.filter(lambda o: o[0] in ("file", "directory") and o[1] != b"a")),
        max_size=5,
    ),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_overlay_equals_extraction_through_links(
    tmp_path: pathlib.Path, bottom: tuple[list[Operation], list[Operation]], upper: list[Operation]
) -> None:
    assert_overlay_equals_extraction([make(bottom[1] + bottom[0]), make(upper)], tmp_path)


@pytest.mark.root
@pytest.mark.parametrize("count", [1, 2, 3])
def test_torture_layers(tmp_path: pathlib.Path, count: int) -> None:
    layers = tars.torture_layers()[:count]
    expected = flatten.flatten([io.BytesIO(layer) for layer in layers], LIMITS)
    with trees.tmpfs(tmp_path / "image") as folder, trees.overlaid(layers, folder) as merged:
        assert compare.first_difference(expected, merged) is None


@pytest.mark.parametrize(
    "many",
    [
        Builder().symlink(b"a", b"t" * 600).symlink(b"b", b"t" * 600),
        Builder()
        .pax([(b"SCHILY.xattr.user.a", bytes(600))])
        .file(b"a")
        .pax([(b"SCHILY.xattr.user.a", bytes(600))])
        .file(b"b"),
        Builder().directory(b"a").pax([(b"SCHILY.xattr.user.a", bytes(1200))]).directory(b"a"),
        Builder().hard_link(b"a", b"x/" * 30 + b"y"),
    ],
    ids=["targets", "xattrs", "a directory listed twice", "links to elsewhere"],
)
def test_what_a_tree_keeps_is_bounded(many: Builder) -> None:
    build(many, limits.Limits(max_attribute_bytes=4096))
    with pytest.raises(errors.LimitError, match=r"--max-attribute-bytes"):
        build(many, limits.Limits(max_attribute_bytes=1024))


def test_the_reference_keeps_no_more() -> None:
    many = Builder().symlink(b"a", b"t" * 600).symlink(b"b", b"t" * 600)
    with pytest.raises(errors.LimitError, match=r"--max-attribute-bytes"):
        flatten.flatten([io.BytesIO(bytes(many))], limits.Limits(max_attribute_bytes=1024))


@pytest.mark.root
def test_whiteouts_that_hide_nothing_are_not_listed(tmp_path: pathlib.Path) -> None:
    bottom = Builder().file(b"both/gone").file(b"both/kept").directory(b"deep").directory(b"deep/er")
    top = Builder()
    for name in (b"both/.wh.gone", b"alone/.wh.nothing", b"alone/in/.wh.nothing", b".wh.nothing"):
        top.file(name)
    top.file(b"alone/file").file(b"deep/er/.wh.nothing")
    with (
        trees.tmpfs(tmp_path / "image") as folder,
        trees.overlaid([bytes(bottom), bytes(top)], folder) as merged,
    ):
        listed = {
            path: sorted(os.listdir(merged / path)) for path in (".", "both", "alone", "alone/in", "deep/er")
        }
    assert listed == {
        ".": ["alone", "both", "deep"],
        "both": ["kept"],
        "alone": ["file", "in"],
        "alone/in": [],
        "deep/er": [],
    }
